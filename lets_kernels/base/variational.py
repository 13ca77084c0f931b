"""The step of Variational SAM (bSAM: Möllenhoff & Khan, ICLR 2023), as a base optimizer."""

from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from lets_kernels.space.shards import local


class VariationalSGD(torch.optim.Optimizer):
    """m ← β₁m + (1 − β₁)(ĝ + δω), ω ← ω − α m/s.

    The precision s is state of this optimizer, but the direction :class:`lets_kernels.Posterior` updates it, since it
    sees the gradient at the sample. From the beginning m is ``state[p]["exp_avg"]`` and s is ``state[p]["precision"]``.

    Args:
        params: parameters or groups of them.
        lr: α.
        beta1: β₁ in [0, 1).
        weight_decay: δ ≥ 0.
        precision: the s to begin with.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self, params: ParamsT, lr: float, beta1: float = 0.9, weight_decay: float = 1e-4, precision: float = 1.0
    ) -> None:
        if not float(lr) >= 0:
            raise ValueError(f"lr must be >= 0, not {lr}")
        if not 0 <= beta1 < 1:
            raise ValueError(f"beta1 must be in [0, 1), not {beta1}")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay must be >= 0, not {weight_decay}")
        if not precision > 0:
            raise ValueError(f"precision must be positive, not {precision}")
        defaults = {"lr": lr, "beta1": beta1, "weight_decay": weight_decay, "precision": precision}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for p in group["params"]:
            own = {
                name: torch.zeros_like(p, memory_format=torch.preserve_format, requires_grad=False) for name in _STATE
            }
            local(own["precision"]).fill_(group["precision"])
            self.state[p].update(own)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Like torch's, but into tensors with the parameters' memory layout, which the ops need."""
        super().load_state_dict(state_dict)
        for p, own in self.state.items():
            for name in own.keys() & set(_STATE):
                home = torch.zeros_like(p, memory_format=torch.preserve_format, requires_grad=False)
                own[name] = home.copy_(own[name])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step along the present gradients. Raises ``ValueError`` for a closure."""
        if closure is not None:
            raise ValueError("VariationalSGD takes no closure; BSAM does")
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                average, precision = (local(self.state[p][name]) for name in _STATE)
                weights, gradient = local(p), local(p.grad)
                average.mul_(group["beta1"]).add_(gradient + group["weight_decay"] * weights, alpha=1 - group["beta1"])
                weights.sub_(group["lr"] * (average / precision))


_STATE = ("exp_avg", "precision")
