"""docs/experiments.md: its table is that of the recipes, its result that of the committed run."""

import json
import re
import runpy
from pathlib import Path

from lets_kernels.experiment.recipes import RECIPES
from lets_kernels.experiment.report import table
from lets_kernels.experiment.train import Options, settings

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "experiments.md").read_text()


def test_the_table_is_that_of_the_recipes():
    made = runpy.run_path(str(ROOT / "docs" / "list_experiments.py"))
    lines = PAGE.split(made["BEGIN"])[1].split(made["END"])[0].strip().splitlines()
    hours = re.compile(r"\| [\d.,e-]+ \|$")  # counting them takes a minute
    assert [hours.sub("|", line) for line in lines] == [hours.sub("|", line) for line in made["rows"](lambda recipe: 1)]
    assert all(hours.search(line) for line in lines[2:] if line.startswith("|"))


def test_the_result_is_that_of_the_committed_runs():
    kept = json.loads((ROOT / "benchmarks" / "results" / "experiment-cifar10-small.json").read_text())
    recipe = RECIPES["cifar10-small"]
    runs = {("cifar10-small", run["settings"]["method"]): [run] for run in kept["runs"]}
    assert [name for _, name in runs] == list(recipe.methods)
    for (_, name), (run,) in runs.items():
        wanted = settings(recipe, name, 0, Options())
        assert run["settings"] == json.loads(json.dumps(wanted)) and len(run["epochs"]) == recipe.epochs
        assert run["environment"]["cpu"] and re.fullmatch(r"[0-9a-f]{40}", run["environment"]["commit"])
    part = PAGE.split("<!-- begin: small -->\n")[1].split("<!-- end: small -->")[0]
    assert table(runs, [recipe], markdown=True) in part and "one seed" in part
    assert kept["command"] in part
