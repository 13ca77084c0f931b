"""The blocks of code on a page of the documentation."""

import re

BLOCK = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def blocks(page, *languages):
    """The language and the text of each block in one of these languages, without the columns that a list sets it in."""
    found = [(name, indent, text) for indent, name, text in BLOCK.findall(page.read_text()) if name in languages]
    return [(name, re.sub(f"^{indent}", "", text, flags=re.MULTILINE)) for name, indent, text in found]


def before(diff):
    """What stands there as long as the lines with + are not in."""
    return _side(diff, "+")


def after(diff):
    """What stands there when the lines with - are gone and those with + are in."""
    return _side(diff, "-")


def _side(diff, other):
    return "".join(line[1:] or "\n" for line in diff.splitlines(keepends=True) if not line.startswith(other))
