"""What every experiment trains: samples by their indices, a network, its loss, and the score that is reported."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn


class MissingData(Exception):
    """A file or a package that an experiment needs is not there; the message names the way out."""


class Batch(NamedTuple):
    """What the network is called with, ``network(*inputs)``, and the targets; the first dimension is the sample's."""

    inputs: tuple[Tensor, ...]
    targets: Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(tuple(x.to(device, non_blocking=True) for x in self.inputs), self.targets.to(device))


class Source(Protocol):
    """A data set. Any process may ask for any batch: what is random in one follows from its seed alone."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int], seed: int | None) -> Batch:
        """These samples, on the CPU: augmented by the random numbers of ``seed``, or as they are if it is None."""
        ...


@dataclass(frozen=True)
class Task:
    """Data with what is trained on it.

    Args:
        train, test: the data sets.
        network: makes the network, on the CPU; its initial weights follow from torch's global generator.
        loss: the mean loss of a batch, 0-d, in nats for a classification.
        score: of a network in evaluation mode on batches of the test set, on the network's device; more is better.
        measure: what the score is, with its unit, for tables and axes: ``"test accuracy, %"``.
        losses: the loss of each sample, (n,), and the network's outputs, for methods that choose among the samples;
            None if samples have no loss of their own.
    """

    train: Source
    test: Source
    network: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Batch], Tensor]
    score: Callable[[nn.Module, Iterable[Batch]], float]
    measure: str
    losses: Callable[[nn.Module, Batch], tuple[Tensor, Tensor]] | None = None
