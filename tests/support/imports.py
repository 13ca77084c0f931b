"""Which packages a file needs before any of its functions runs, by its text and that of all of ours that it imports."""

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def executed(node):
    """All nodes that run when the module is imported: those within no function."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield child
            yield from executed(child)
        elif not isinstance(child, ast.Lambda):
            for decorator in child.decorator_list:
                yield from (decorator, *executed(decorator))


def modules(file):
    """The names of the modules that a file imports, and of those without which it skips itself."""
    package = file.parent.relative_to(ROOT).parts
    for node in executed(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = [*(package[: len(package) + 1 - node.level] if node.level else ()), *filter(None, [node.module])]
            yield ".".join(parts)
            yield from (".".join([*parts, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "importorskip":
            yield node.args[0].value


def sources(name, folder):
    """Our files that importing a module runs: its packages' and its own."""
    parts = name.split(".")
    for start in (ROOT, ROOT / "tests", ROOT / "csrc", folder):
        for i in range(1, len(parts) + 1):
            base = start.joinpath(*parts[:i])
            yield from (file for file in (base.with_suffix(".py"), base / "__init__.py") if file.exists())


def ours(name, folder):
    """Whether a module is one of this project's, compiled ones included."""
    first = name.split(".")[0]
    starts = (ROOT, ROOT / "tests", ROOT / "csrc", folder)
    return any((start / first).is_dir() or (start / f"{first}.py").exists() for start in starts)


@functools.cache
def direct(file):
    """The foreign packages that a file imports itself, and our files that it runs."""
    names = set(modules(file))
    foreign = {name.split(".")[0] for name in names if not ours(name, file.parent)}
    return foreign, {source for name in names for source in sources(name, file.parent)}


def needed(file):
    """All foreign packages that importing a file imports."""
    seen, ahead, found = set(), [file], set()
    while ahead:
        file = ahead.pop()
        if file not in seen:
            seen.add(file)
            foreign, own = direct(file)
            found |= foreign
            ahead += own
    return found
