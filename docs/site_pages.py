"""What mkdocs is told of the repository: pages that lie outside of docs/, and what becomes of links to its files.

The README, the examples and some other pages are read on their own too, so they stay where they are, and links in
every page are written for a reader of the repository. Here a link to a page of the site becomes one within the site,
a picture is copied, and a link to any other file becomes its path: the site does not hold the sources.
"""

import ast
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
#: Pages by their place in the repository, and their place in the site.
PAGES = {
    "README.md": "index.md",
    "examples/README.md": "examples.md",
    "CONTRIBUTING.md": "contributing.md",
    "csrc/README.md": "csrc.md",
    "CHANGELOG.md": "changelog.md",
}
PAGES |= {f"examples/{path.name}": f"examples/{path.stem}.md" for path in (ROOT / "examples").glob("*.py")}
SOURCES = {page: source for source, page in PAGES.items()}

_FENCED = re.compile(r"(^ *```.*?^ *```)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\[\]]*)\]\((?P<target>[^()\s#]*)(?P<anchor>#[^()\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages, and the pictures that pages of docs/ show from elsewhere."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text()
        if source.endswith(".py"):
            text = as_page(source, text)
        files.append(File.generated(config, page, content=text))
    for page in [*files.documentation_pages()]:
        for found in _LINK.finditer(page.content_string):
            path = place(page.src_uri, found["target"])
            if found["picture"] and path and not path.startswith("docs/") and not files.get_file_from_path(path):
                files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links as the site needs them."""

    def within_the_site(found: re.Match[str]) -> str:
        path = place(page.file.src_uri, found["target"])
        if path is None:
            return found[0]
        if path in PAGES or path.startswith("docs/"):
            target = PAGES.get(path) or path.removeprefix("docs/")
        elif found["picture"]:
            target = path
        else:
            return found["text"] if "/" in found["text"] else f"{found['text']} (`{path}`)"
        target = os.path.relpath(target, Path(page.file.src_uri).parent)
        return f"{found['picture']}[{found['text']}]({target}{found['anchor'] or ''})"

    pieces = _FENCED.split(markdown)  # every second one is a block of code
    pieces[::2] = [_LINK.sub(within_the_site, piece) for piece in pieces[::2]]
    return "".join(pieces)


def place(page: str, target: str) -> str | None:
    """The file that a link means, from the root of the repository; None if it is no file of it."""
    if not target or "://" in target or target.startswith("mailto:"):
        return None
    folder = Path(SOURCES.get(page) or f"docs/{page}").parent
    path = os.path.relpath(ROOT / folder / target, ROOT)
    if not (ROOT / path).exists():
        raise ValueError(f"{page}: no file {target}")
    readme = f"{path}/README.md"  # what a reader of the repository sees there
    return readme if readme in PAGES else path


def as_page(source: str, text: str) -> str:
    """A program as a page: the words at its top, then its code."""
    module = ast.parse(text)
    words = ast.get_docstring(module)
    code = "\n".join(text.splitlines()[module.body[0].end_lineno or 0 :]).strip()
    title, _, rest = (words or "").partition("\n")
    return f"# {Path(source).name}\n\n{title}\n{rest}\n\n```python\n{code}\n```\n"
