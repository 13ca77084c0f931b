"""What a radius is that goes by what the steps show: one that learns from gradients, and one that compares two."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lets_kernels.learning.hypergradient import Trial
from lets_kernels.parts.direction import Direction
from lets_kernels.parts.passes import Gradients
from lets_kernels.parts.radius import Radius
from lets_kernels.parts.samples import Samples
from lets_kernels.space.buckets import Bucket
from lets_kernels.space.distributed import Replicas


class MovingRadius(Radius):
    """Base class of a radius that is one optimizer's own, and the same on all ranks."""

    moves = True

    def check_passes(self, sync_perturbation: bool, direction: Direction, samples: Samples) -> None:
        """Raise ``ValueError`` where the radius cannot use the gradients of a step's two passes."""


@dataclass
class Observed:
    """The gradients of one pass at the weights that a step has left, and its loss."""

    gradients: list[Gradients]  # an entry for each bucket
    loss: Tensor | None  # 0-d float64


@dataclass
class NextPass:
    """The first gradients of a step, for a radius that has waited for them since the one before."""

    gradients: list[Gradients]  # an entry for each of the buckets
    loss: Tensor | None  # that goes with them
    buckets: list[Bucket]
    finite: Tensor  # bool, 0-d: every element is, on every rank; else nothing may be learned


class LearningRadius(MovingRadius):
    """Base class of a radius that learns from the gradients after a step; ``due`` says from which steps."""

    #: A step is still to be learned from, once the next first gradient is there.
    waits = False
    #: `observe` needs the vectors of the perturbation.
    needs_vectors = False
    #: `complete` needs the loss that goes with that gradient.
    needs_train_loss = False
    #: `observe` needs the training gradient at the new weights.
    needs_train_closure = False

    def due(self, step: int) -> bool:
        """True if the radius learns from step number ``step``, counting from 0 those that perturb."""
        raise NotImplementedError

    def observe(
        self,
        trial: Trial,
        val: Observed | None,
        train: Observed | None,
        groups: Sequence[dict[str, Any]],
        replicas: Replicas,
    ) -> None:
        """Learn from one step, or keep it until ``complete``.

        Args:
            trial: the step.
            val: the validation gradients at the new weights. None for a radius that does not ``learn`` from closures:
                it waits for the next first gradient.
            train: the training gradients there, where it needs them.
            groups: the param groups.
            replicas: the ranks that take part.
        """
        raise NotImplementedError

    def complete(self, after: NextPass, groups: Sequence[dict[str, Any]], replicas: Replicas) -> None:
        """Learn from the step that waits, now that the next one's first gradient is there."""
        raise NotImplementedError


class ComparingRadius(MovingRadius):
    """Base class of a radius that goes by the two gradients of each step that perturbs."""

    #: A radius a param group, and products by groups.
    per_group = False

    @property
    def memory(self) -> Tensor:
        """What it remembers, float64 of shape [radii, numbers]; under several ranks each takes over the first one's."""
        raise NotImplementedError

    def compare(self, products: Tensor, gate: Tensor, groups: Sequence[dict[str, Any]]) -> None:
        """Go by one step.

        Args:
            products: ĝ·ĝ, g·ĝ, g·g, g·Δ and Δ·Δ over all ranks, float64 of shape [radii, 5]; Δ is by how much the
                weights have moved since the last step that perturbed, zero where that is not known.
            gate: 0-d, zero where the step is skipped; nothing may change then.
            groups: the param groups.
        """
        raise NotImplementedError
