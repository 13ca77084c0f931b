"""From a recipe to what it trains: the loaders by name, and what the papers say to name on the command line."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lets_kernels.experiment import images
from lets_kernels.experiment.recipes import Recipe
from lets_kernels.experiment.task import Task


@dataclass(frozen=True)
class Kind:
    """A kind of data set: how a recipe's is loaded from the path that the user names; the integer is the seed."""

    load: Callable[[Recipe, Path, int], Task]
    expects: str


def _cifar(classes: int) -> Callable[[Recipe, Path, int], Task]:
    def load(recipe: Recipe, path: Path, seed: int) -> Task:
        noise, smoothing = recipe.data.options.get("noise", 0.0), recipe.data.options.get("smoothing", 0.0)
        return images.cifar(path, classes, recipe.network, noise, smoothing, seed)

    return load


KINDS = {
    "cifar10": Kind(_cifar(10), "the unpacked folder cifar-10-batches-py, or an .npz file of JPEGs"),
    "cifar100": Kind(_cifar(100), "the unpacked folder cifar-100-python"),
}
