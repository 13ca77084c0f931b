"""All runs of some recipes, each in a folder of its own: stop it at any time, and the same command goes on."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lets_kernels.experiment.recipes import Recipe
from lets_kernels.experiment.task import Task
from lets_kernels.experiment.train import RESULT, Options, settings, train

#: Loads a recipe's data for a seed.
Load = Callable[[Recipe, int], Task]


@dataclass(frozen=True)
class Run:
    """One training."""

    recipe: Recipe
    method: str
    seed: int

    def folder(self, output: Path) -> Path:
        return output / self.recipe.name / self.method / str(self.seed)


def runs(recipes: Sequence[Recipe], methods: Sequence[str] | None, seeds: int | None) -> list[Run]:
    """Seed by seed, so that whoever stops early has compared all methods. None: the recipe's own."""
    return [
        Run(recipe, name, seed)
        for recipe in recipes
        for seed in range(recipe.seeds if seeds is None else seeds)
        for name in (recipe.methods if methods is None else methods)
    ]


def finished(run: Run, output: Path, options: Options) -> dict[str, Any] | None:
    """The results of a run that is over, with the settings of today."""
    try:
        found: dict[str, Any] = json.loads((run.folder(output) / RESULT).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    wanted = json.loads(json.dumps(settings(run.recipe, run.method, run.seed, options)))
    return found if found["settings"] == wanted else None


def campaign(planned: Sequence[Run], load: Load, output: Path, options: Options) -> Iterator[dict[str, Any]]:
    """Each run's results, made now or read. The data of a recipe and seed is read once."""
    loaded: tuple[Recipe, int, Task] | None = None
    for run in planned:
        found = finished(run, output, options)
        if found is None:
            if loaded is None or loaded[:2] != (run.recipe, run.seed):
                loaded = (run.recipe, run.seed, load(run.recipe, run.seed))
            folder = run.folder(output)
            found = train(run.recipe, run.method, run.seed, loaded[2], folder, options)
        yield found
