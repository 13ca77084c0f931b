"""All methods: collects ``METHODS`` from the pages, where each stands below the class, and prints two Markdown tables.

``python -m lets_kernels methods`` prints the tables, and docs/methods.md contains them. For every line the tests
construct the optimizer, count its gradients and measure its memory; the demo finds the methods here.
"""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import lets_kernels.methods as pages
from lets_kernels.sam import SAM

#: The source of a default. A default without a stated source is ours.
PAPER, CODE, OURS = "the paper's", "the authors' code's", "ours"
#: For a radius of which, as we have checked, the method's own source says nothing.
AS_SAM = "SAM's"
#: The remark on a method whose first gradients are taken at θ + δ.
STARTS = "two-step shape: first pass in `first_pass()`"


@dataclass(frozen=True)
class Row:
    """One way to construct a method, as a line of the table."""

    name: str
    #: The arguments after the parameters and the base optimizer, written with names that lets_kernels exports.
    arguments: str
    #: Gradients a step, in words that tests/methods/test_catalogue.py reads: ``"2"``, ``"1 + p"``, ``"1 to 2"``.
    gradients: str = "2"
    #: Memory kept from step to step, without the saved weights, counted in buffers as large as the float32 parameters.
    #: One byte an element is 1/4.
    state: float = 0.0
    #: The first gradients live through the second pass.
    holds: bool = False
    #: The gradients that are there at once, at most, in buffers as large as the parameters; None: 2 if it holds the
    #: first, otherwise 1.
    gradients_at_once: int | None = None
    remark: str = ""
    paper: str = ""  # if it is not the method's paper

    @property
    def keeps(self) -> str:
        """The state, as the table shows it."""
        return {0.0: "–", 0.25: "N/4"}.get(self.state, f"{self.state:g}N")

    @property
    def peak(self) -> int:
        """The most memory that a step needs for a while, beside activations, in buffers as large as the parameters."""
        return 1 + self.holds if self.gradients_at_once is None else self.gradients_at_once


@dataclass(frozen=True)
class Method:
    """A method: the class that constructs it, its paper, its parts, and the sources of its defaults."""

    cls: type[SAM]
    name: str
    paper: str
    #: The parts in which it differs from plain SAM.
    parts: tuple[type, ...]
    #: The source of each default in the constructor's signature.
    defaults: Mapping[str, str] = field(default_factory=dict)
    rows: tuple[Row, ...] = ()

    def whose(self, **defaults: str) -> "Method":
        """The method, with the source of each default, in the order of the signature."""
        return replace(self, defaults=defaults)

    def row(self, name: str, arguments: str, **rest: Any) -> "Method":
        """The method, with one more :class:`Row`."""
        return replace(self, rows=(*self.rows, Row(name, arguments, **rest)))

    @property
    def key(self) -> str:
        """The method's name on the command line."""
        return self.name.lower().replace(" ", "-").replace("δ", "delta")

    @property
    def own_base(self) -> bool:
        """True for a method that has no base optimizer."""
        return "base_optimizer" not in inspect.signature(self.cls).parameters

    @property
    def values(self) -> dict[str, Any]:
        """The defaults in the constructor's signature, without the options that every method has from SAM."""
        everyones = inspect.signature(SAM).parameters
        return {
            name: parameter.default
            for name, parameter in inspect.signature(self.cls).parameters.items()
            if parameter.default is not parameter.empty
            and (parameter.kind is not parameter.KEYWORD_ONLY or name not in everyones)
        }

    def line(self, row: Row) -> str:
        """The call that constructs this row, with the names ``params`` and ``SGD = torch.optim.SGD``."""
        first = "params" if self.own_base else "params, SGD"
        return f"{self.cls.__name__}({first}, {row.arguments})"


@cache
def methods() -> tuple[Method, ...]:
    """The ``METHODS`` of all files in this folder: SAM first, the others by year and name."""
    names = sorted(module.name for module in pkgutil.iter_modules(pages.__path__, f"{pages.__name__}."))
    found = [m for name in names for m in getattr(importlib.import_module(name), "METHODS", ())]
    return tuple(sorted(found, key=lambda m: (m.cls is not SAM, re.findall(r"\d{4}", m.paper), m.name)))


def table() -> str:
    """The table of how each method is constructed, and what it costs."""
    lines = [
        "| method | paper | parts | construct | gradients a step | keeps | holds | peak | remark |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for method in methods():
        parts = ", ".join(f"`{part.__name__}`" for part in method.parts) or "–"
        for row in method.rows:
            paper, held = row.paper or method.paper, "g" if row.holds else "–"
            lines.append(
                f"| {row.name} | {paper} | {parts} | `{method.line(row)}` | {row.gradients} | {row.keeps} | {held} "
                f"| {row.peak}N | {row.remark or '–'} |"
            )
    return "\n".join(lines)


def defaults() -> str:
    """The table of where each default comes from."""
    lines = ["| method | argument | default | whose |", "|---|---|---|---|"]
    for method in methods():
        for name, value in method.values.items():
            lines.append(f"| `{method.cls.__name__}` | `{name}` | `{value!r}` | {method.defaults[name]} |")
    return "\n".join(lines)


def described(key: str) -> str:
    """One method, for a terminal: what the two tables say of it.

    Raises:
        ValueError: there is no method of this name.
    """
    known = {method.key: method for method in methods()}
    if key not in known:
        raise ValueError(f"no method {key!r}; there are {', '.join(known)}")
    method = known[key]
    parts = ", ".join(part.__name__ for part in method.parts)
    lines = [f"{method.name}: {method.paper}", *([f"  parts: {parts}"] if parts else [])]
    for row in method.rows:
        held = "the first gradients are held through the second pass; " if row.holds else ""
        kept = row.keeps if row.state else "none"
        cost = f"gradients a step: {row.gradients}; memory kept: {kept}; {held}peak: {row.peak}N"
        lines += ["", f"  {method.line(row)}", f"      {cost}", *([f"      {row.remark}"] if row.remark else [])]
    own = [f"  {name}={value!r}: {method.defaults[name]}" for name, value in method.values.items()]
    return "\n".join([*lines, *(["", "  whose the defaults are:", *(f"  {line}" for line in own)] if own else [])])


def text() -> str:
    """Both tables."""
    return f"{table()}\n\n{defaults()}"
