"""docs/experiments.md: its table is that of the recipes, its result that of the committed run."""

import json
import re
import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "experiments.md").read_text()


def test_the_table_is_that_of_the_recipes():
    made = runpy.run_path(str(ROOT / "docs" / "list_experiments.py"))
    lines = PAGE.split(made["BEGIN"])[1].split(made["END"])[0].strip().splitlines()
    hours = re.compile(r"\| [\d.,e-]+ \|$")  # counting them takes a minute
    assert [hours.sub("|", line) for line in lines] == [hours.sub("|", line) for line in made["rows"](lambda recipe: 1)]
    assert all(hours.search(line) for line in lines[2:] if line.startswith("|"))
