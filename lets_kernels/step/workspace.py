"""What every step works with: what was set, the base optimizer, what is kept from step to step, and the tables."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lets_kernels.around.amp import LossScaling, Scaler
from lets_kernels.base.state import Look
from lets_kernels.parts.passes import FirstPass
from lets_kernels.parts.progress import Progress
from lets_kernels.parts.samples import Pass
from lets_kernels.space.buckets import Runs
from lets_kernels.step.setting import Setting
from lets_kernels.step.tables import Tables


@dataclass(eq=False)
class Workspace:
    """Nothing here tells whether a step has begun; see now.py for that."""

    setting: Setting
    base: torch.optim.Optimizer  # whose groups and state are the optimizer's
    progress: Progress
    tables: Tables
    scaling: LossScaling = field(default_factory=LossScaling)

    @property
    def groups(self) -> list[dict[str, Any]]:
        return self.base.param_groups

    def params(self) -> list[Tensor]:
        """In the order in which a saved state numbers them."""
        return [p for group in self.base.param_groups for p in group["params"]]

    def gradients(self) -> list[Tensor]:
        """Those that are there."""
        grads = [p.grad for group in self.base.param_groups for p in group["params"] if p.requires_grad]
        return [g for g in grads if g is not None]

    def has_gradient(self) -> bool:
        """True if there is one."""
        for group in self.base.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.requires_grad:
                    return True
        return False

    def drop_gradients(self) -> None:
        for group in self.base.param_groups:
            for p in group["params"]:
                p.grad = None

    def first_pass(self, runs: list[Runs], keeps: bool = False, synced: bool = True) -> FirstPass:
        """What a direction sees.

        Args:
            runs: of the buckets that take part.
            keeps: the vectors of the perturbation are asked for after it.
            synced: False for the gradients of this rank alone.
        """
        progress = self.progress
        return FirstPass(
            runs=runs,
            groups=self.base.param_groups,
            step=progress.step,
            home=progress.skipped.device,
            replicas=self.setting.replicas if synced else None,
            random=progress.random,
            held=progress.held,
            base=Look.at(self.base),
            keeps=keeps,
        )

    def a_pass(self, scaler: Scaler | None) -> Pass:
        """How a closure makes one."""
        return Pass(lambda closure: self.call(closure, scaler), self.drop_gradients, scaler)

    def call(self, closure: Callable[..., Any], scaler: Scaler | None = None) -> Any:
        """A pass by a closure, with gradients enabled and unscaled afterwards; what the closure returned."""
        with torch.enable_grad():
            loss = closure()
        if scaler is not None:
            self.scaling.unscale(scaler, self.base.param_groups)
        return loss
