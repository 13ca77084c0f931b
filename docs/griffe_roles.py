"""Docstrings are written for `help()`, with Sphinx's roles: on the site these become links."""

import re
from typing import Any

from griffe import Extension, Object

_ROLE = re.compile(r":(?:class|meth|func|mod|attr):`~?(?P<path>[\w.]+)`")


class Roles(Extension):
    """Each role becomes a reference that mkdocs-autorefs looks up and, where there is no such page, leaves as code."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring:
            text = _ROLE.sub(_reference, obj.docstring.value)
            obj.docstring.value = re.sub(r" ?::$", ":", text, flags=re.MULTILINE)


def _reference(found: re.Match[str]) -> str:
    path = found["path"]
    full = path if path.startswith("lets_kernels.") else f"lets_kernels.{path}"
    return f'<autoref optional identifier="{full}"><code>{path.rsplit(".", 1)[-1]}</code></autoref>'
