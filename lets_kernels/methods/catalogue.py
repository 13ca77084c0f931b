"""All methods, collected from their pages: two tables in Markdown.

``python -m lets_kernels methods`` prints them, and docs/methods.md holds them. The tests construct every line, count
its gradients and measure what it keeps.
"""

import importlib
import pkgutil
import re
from functools import cache

import lets_kernels.methods as pages
from lets_kernels.methods.page import Method
from lets_kernels.sam import SAM


@cache
def methods() -> tuple[Method, ...]:
    """What the files beside this one have under ``METHODS``: SAM first, the others by year and name."""
    names = sorted(module.name for module in pkgutil.iter_modules(pages.__path__, f"{pages.__name__}."))
    found = [m for name in names for m in getattr(importlib.import_module(name), "METHODS", ())]
    return tuple(sorted(found, key=lambda m: (m.cls is not SAM, re.findall(r"\d{4}", m.paper), m.name)))


def table() -> str:
    """How each is constructed, and what it costs."""
    lines = [
        "| method | paper | parts | construct | gradients a step | keeps | holds | remark |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in methods():
        parts = ", ".join(f"`{part.__name__}`" for part in method.parts) or "–"
        for row in method.rows:
            paper, held = row.paper or method.paper, "g" if row.holds else "–"
            lines.append(
                f"| {row.name} | {paper} | {parts} | `{method.line(row)}` | {row.gradients} | {row.keeps} | {held} "
                f"| {row.remark or '–'} |"
            )
    return "\n".join(lines)


def defaults() -> str:
    """Where each default comes from."""
    lines = ["| method | argument | default | whose |", "|---|---|---|---|"]
    for method in methods():
        for name, value in method.values.items():
            lines.append(f"| `{method.cls.__name__}` | `{name}` | `{value!r}` | {method.defaults[name]} |")
    return "\n".join(lines)


def text() -> str:
    """Both tables."""
    return f"{table()}\n\n{defaults()}"
