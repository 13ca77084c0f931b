"""From a recipe to what it trains: a loader for each kind of data, what it expects, and a toy in the same format."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from lets_kernels.experiment import images, toy_images, toy_texts
from lets_kernels.experiment.glue import glue
from lets_kernels.experiment.recipes import Recipe
from lets_kernels.experiment.task import Task
from lets_kernels.experiment.translation import translation


@dataclass(frozen=True)
class Source:
    """What the user names: the data's path, and a folder with a pretrained network where a recipe starts from one."""

    path: Path
    checkpoint: Path | None = None


@dataclass(frozen=True)
class Kind:
    """A kind of data set.

    Args:
        load: a recipe's task from what the user names; the integer is the seed.
        expects: what the path holds, for the user.
        toy: writes a few generated samples in the same format into a folder, which is then the path.
    """

    load: Callable[[Recipe, Source, int], Task]
    expects: str
    toy: Callable[[Recipe, Path], object]


def _cifar(classes: int) -> Callable[[Recipe, Source, int], Task]:
    def load(recipe: Recipe, source: Source, seed: int) -> Task:
        noise, smoothing = recipe.data.options.get("noise", 0.0), recipe.data.options.get("smoothing", 0.0)
        return images.cifar(source.path, classes, recipe.network, noise, smoothing, seed)

    return load


def _imagenet(recipe: Recipe, source: Source, seed: int) -> Task:
    return images.imagenet(source.path, recipe.network, recipe.data.options.get("smoothing", 0.0))


KINDS = {
    "cifar10": Kind(
        _cifar(10),
        "the unpacked folder cifar-10-batches-py, or an .npz file of JPEGs",
        lambda recipe, folder: toy_images.write_cifar(folder, 10),
    ),
    "cifar100": Kind(
        _cifar(100),
        "the unpacked folder cifar-100-python",
        lambda recipe, folder: toy_images.write_cifar(folder, 100),
    ),
    "imagenet": Kind(
        _imagenet,
        "a folder with train and val, in each a folder of images for each class",
        lambda recipe, folder: toy_images.write_imagenet(folder),
    ),
    "glue": Kind(
        lambda recipe, source, seed: glue(source.path, recipe.data.options["task"], source.checkpoint),
        "GLUE's archive, unpacked: a folder for each task, such as CoLA with train.tsv and dev.tsv",
        lambda recipe, folder: toy_texts.write_glue(folder, recipe.data.options["task"], 4, 8),
    ),
    "translation": Kind(
        lambda recipe, source, seed: translation(source.path, **recipe.data.options),
        "a folder with train.de, train.en, test.de and test.en, a sentence a line",
        lambda recipe, folder: toy_texts.write_translation(folder, 4),
    ),
}


def toy(recipe: Recipe, folder: Path) -> tuple[Recipe, Source]:
    """The recipe in two steps of two samples, on generated files written into ``folder``, with the real network."""
    path = folder / recipe.data.kind
    KINDS[recipe.data.kind].toy(recipe, path)
    return replace(recipe, epochs=1, batch_size=2, seeds=1), Source(path)
