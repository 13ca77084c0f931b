"""Which gradient to step along: the descent part of a method."""

from typing import Any

from torch import Tensor

from lets_kernels.runs import Runs


class Descent:
    """Base class. ``holds_first`` asks the engine to keep the first gradients until the descent is chosen."""

    holds_first = False

    def gradients(self, perturbed: Runs, first: dict[int, Tensor]) -> list[Tensor]:
        """What the base optimizer steps along, in the order of ``perturbed``.

        Args:
            perturbed: one bucket's runs with the gradients at the perturbed weights.
            first: the first gradients of that bucket by parameter index; empty unless ``holds_first``.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What a descent carries from step to step, under the same keys at any time."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Perturbed(Descent):
    """Along the gradient at the perturbed weights (SAM: Foret et al., ICLR 2021, Algorithm 1)."""

    def gradients(self, perturbed: Runs, first: dict[int, Tensor]) -> list[Tensor]:
        return perturbed.grads
