"""Writes the table of docs/experiments.md: python docs/list_experiments.py. The hours take it some minutes."""

import tempfile
from pathlib import Path

from lets_kernels.experiment import hours
from lets_kernels.experiment.campaign import runs
from lets_kernels.experiment.data import KINDS, toy
from lets_kernels.experiment.recipes import NU, RECIPES, TABLES

PAGE = Path(__file__).parent / "experiments.md"
BEGIN, END = "<!-- begin: which table -->\n", "<!-- end: which table -->\n"


def rows(estimate):
    """A line for each table, then where its settings are from; ``estimate`` gives the hours of a recipe."""
    yield "| `lets-kernels experiment …` | repeats | recipes | runs | GPU hours |"
    yield "|---|---|---|--:|--:|"
    tables = [*TABLES.items(), ("cifar10-small", ("cifar10-small",))]
    for name, recipes in tables:
        found = [RECIPES[one] for one in recipes]
        shows = "; ".join(dict.fromkeys(recipe.shows for recipe in found))
        of = ", ".join(f"`{one}`" for one in recipes)
        count = sum(len(recipe.methods) * recipe.seeds for recipe in found)
        took = sum(map(estimate, found))
        yield (
            f"| `{name}` | {shows} | {of} | {count} | {took:,.0f} |"
            if took >= 10
            else (f"| `{name}` | {shows} | {of} | {count} | {took:.1g} |")
        )
    yield ""
    for name, recipes in tables:
        found = [RECIPES[one] for one in recipes]
        source = "; ".join(dict.fromkeys(recipe.source for recipe in found))
        differs = "; ".join(dict.fromkeys(what for recipe in found for what in recipe.differs if what != NU))
        yield f"- `{name}`: settings: {source}." + (f" It differs: {differs}." if differs else "")


def counted(recipe):
    """The hours of all its runs, at the speed that is assumed."""
    with tempfile.TemporaryDirectory() as folder:
        small, source = toy(recipe, Path(folder))
        per_gradient = hours.gradient(KINDS[recipe.data.kind].load(small, source, 0), recipe.data.tokens)
    return hours.hours(recipe, runs([recipe], None, None), per_gradient, hours.SPEED)


if __name__ == "__main__":
    before, rest = PAGE.read_text().split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(before + BEGIN + "\n" + "\n".join(rows(counted)) + "\n\n" + END + after)
