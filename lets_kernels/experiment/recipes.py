"""The recipes: what each experiment of the papers trains, on what, how long, and with which optimizers."""

from dataclasses import dataclass, field
from typing import Any

from torch.optim import SGD, Optimizer


@dataclass(frozen=True)
class Data:
    """What a recipe reads.

    Args:
        kind: the loader's name: ``cifar10``, ``cifar100``, ``imagenet``, ``glue`` or ``translation``.
        samples: in the training set of the paper, for the estimate of the time.
        options: for the loader.
    """

    kind: str
    samples: int
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """One experiment.

    Args:
        name: on the command line.
        shows: where it stands in the papers.
        data: what is read.
        network: its name, as in the papers.
        epochs, batch_size: batches that are not full are left out.
        base: the base optimizer's class, with ``lr`` and ``options``.
        schedule: of the learning rate, step by step: up over ``warmup`` of all steps, then to zero (``cosine``,
            ``linear``) or down with the root of the step (``inverse-sqrt``).
        methods: names of :mod:`~lets_kernels.experiment.methods`.
        seeds: how many the paper has.
        differs: from the paper, in words.
    """

    name: str
    shows: str
    data: Data
    network: str
    epochs: int
    batch_size: int
    lr: float
    methods: tuple[str, ...]
    base: type[Optimizer] = SGD
    options: dict[str, Any] = field(default_factory=lambda: {"momentum": 0.9, "weight_decay": 5e-4})
    schedule: str = "cosine"
    warmup: float = 0.0
    seeds: int = 5
    differs: tuple[str, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """What a run's file says of it; a run with other settings is another run."""
        common = {"data": self.data.kind, "network": self.network, "epochs": self.epochs, "batch_size": self.batch_size}
        base = {"base": self.base.__name__, "lr": self.lr, **self.options}
        schedule = {"schedule": self.schedule, **({"warmup": self.warmup} if self.warmup else {})}
        return {**common, **self.data.options, **base, **schedule}


#: The experiments that the commands of the documentation run; the papers' follow below.
RECIPES: dict[str, Recipe] = {}


def _add(*recipes: Recipe) -> tuple[str, ...]:
    RECIPES.update((recipe.name, recipe) for recipe in recipes)
    return tuple(recipe.name for recipe in recipes)


TABLES: dict[str, tuple[str, ...]] = {}

SMALL = _add(
    Recipe(
        "cifar10-small",
        "none: what two cores can do in an hour",
        Data("cifar10", 50_000),
        "ResNet-18, width 16",
        epochs=6,
        batch_size=128,
        lr=0.1,
        methods=("base", "sam", "auto", "lets-sam"),
        seeds=1,
        differs=("a quarter of ResNet-18's width", "six epochs", "one seed"),
    )
)
