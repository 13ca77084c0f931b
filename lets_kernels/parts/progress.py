"""What an optimizer keeps from step to step, in addition to the state of its parts and of the base optimizer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lets_kernels.around.randomness import Randomness
from lets_kernels.checks import check_count, check_keys, check_scalar
from lets_kernels.parts.passes import Held


class Progress:
    """How far training has come: counts, random numbers, and the tensors that parts keep for every parameter."""

    def __init__(self, random: Randomness, device: torch.device) -> None:
        #: The number of steps, of steps that perturbed, and of the gradients that all steps have taken.
        self.step = self.perturbed_steps = self.gradients = 0
        #: The number of skipped steps, on the first bucket's device, where all scalars of a step meet.
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.random, self.held = random, Held()
        #: The parameters in the groups, as they were at the last look.
        self.placed: Sequence[Sequence[Tensor]] = ()
        random.to(device)

    @property
    def home(self) -> torch.device:
        """The device where the scalars of a step meet."""
        return self.skipped.device

    def to(self, device: torch.device) -> None:
        """The parameters have moved to a device: move the scalars there too."""
        self.skipped = self.skipped.to(device)

    def count(self, gradients: int, perturbed: bool) -> None:
        """Count a step that has been taken."""
        self.step += 1
        self.gradients += gradients
        self.perturbed_steps += perturbed
        self.random.advance()

    def state_dict(self) -> dict[str, Any]:
        return {
            "random": self.random.state_dict(),
            "step": self.step,
            "gradients": self.gradients,
            "perturbed_steps": self.perturbed_steps,
            "skipped": self.skipped.clone(),
        }

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Raise ``ValueError`` if ``load_state_dict`` could not take this state; changes nothing."""
        check_keys(state["random"], self.random.state_dict(), "the random numbers")
        check_count(state["random"]["seed"], "the seed")
        check_scalar(state["random"]["count"], "the count of random steps")
        check_count(state["step"], "the step number")
        check_count(state["gradients"], "the number of gradients")
        check_count(state["perturbed_steps"], "the number of perturbed steps")
        check_scalar(state["skipped"], "the number of skipped steps")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.random.load_state_dict(state["random"])
        self.step, self.gradients = int(state["step"]), int(state["gradients"])
        self.perturbed_steps = int(state["perturbed_steps"])
        self.skipped.copy_(state["skipped"])
