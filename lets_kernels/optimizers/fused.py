"""Restore fused into the base optimizer's step, for the optimizers whose arithmetic the ops know.

The base optimizer stays the owner of its options and its state: the ops work on its own state tensors, under the names
that it gives them, so its checkpoints and schedulers notice nothing. What the ops do not cover, it does itself.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from lets_kernels.layout import Runs

Group = Mapping[str, Any]
State = Mapping[Tensor, dict[str, Any]]


def _not_plain(group: Group, names: tuple[str, ...]) -> str | None:
    """Why a group has options that the ops do not know, or None."""
    for name in names:
        if group.get(name):
            return f"{name}={group[name]!r}"
    if isinstance(group["lr"], Tensor) and group["lr"].device.type != "cpu":
        return "lr is a tensor on an accelerator"
    return None


def _state(runs: Runs, state: State, name: str) -> list[Tensor]:
    """One state tensor a run, made of zeros (which is how SGD's and Adam's averages begin) where there is none."""
    found = []
    for i in runs.indices:
        own = state[runs.bucket.params[i]]
        if own.get(name) is None:
            own[name] = torch.zeros_like(runs.bucket.params[i], memory_format=torch.preserve_format)
        found.append(own[name])
    return found


def _fits(runs: Runs, tensors: list[Tensor]) -> bool:
    return not runs.copies and all(
        t.stride() == p.stride() and t.dtype is p.dtype and t.device == p.device
        for t, p in zip(tensors, runs.params, strict=True)
    )


class FusedStep(Protocol):
    """How one base optimizer is fused."""

    @staticmethod
    def refuses(group: Group) -> str | None:
        """Why these options need the optimizer itself, in words, or None."""

    @staticmethod
    def prepare(runs: Runs, group: Group, state: State) -> Callable[[Tensor], None] | None:
        """The step on these runs, to be called with the gate; None where the state's memory does not suit."""


class FusedSGD:
    """torch.optim.SGD without dampening: its momentum buffers then begin at zero, which a skipped step can leave."""

    @staticmethod
    def refuses(group: Group) -> str | None:
        return _not_plain(group, ("dampening", "differentiable"))

    @staticmethod
    def prepare(runs: Runs, group: Group, state: State) -> Callable[[Tensor], None] | None:
        momenta = _state(runs, state, "momentum_buffer") if group["momentum"] else []
        if not _fits(runs, momenta or runs.params):
            return None
        b, momentum, nesterov = runs.bucket, float(group["momentum"]), bool(group["nesterov"])
        options = (float(group["lr"]), momentum, float(group["weight_decay"]), nesterov, bool(group["maximize"]))

        def step(gate: Tensor) -> None:
            b.ops.restore_sgd_(runs.weights, runs.grads, momenta, b.saved, b.dirty, runs.table, gate, *options)

        return step


class FusedAdam:
    """torch.optim.Adam and AdamW, without amsgrad."""

    @staticmethod
    def refuses(group: Group) -> str | None:
        if any(isinstance(beta, Tensor) for beta in group["betas"]):
            return "betas are tensors"
        return _not_plain(group, ("amsgrad", "differentiable"))

    @staticmethod
    def prepare(runs: Runs, group: Group, state: State) -> Callable[[Tensor], None] | None:
        averages, squares = _state(runs, state, "exp_avg"), _state(runs, state, "exp_avg_sq")
        steps = []
        for i in runs.indices:
            own = state[runs.bucket.params[i]]
            # Beside the parameters, so that counting it waits for nothing; torch's Adam reads it from anywhere.
            count = own.get("step", torch.zeros((), dtype=torch.float32))
            own["step"] = count.to(runs.bucket.device)
            steps.append(own["step"])
        if not (_fits(runs, averages) and _fits(runs, squares)) or any(s.dtype is not torch.float32 for s in steps):
            return None
        b = runs.bucket
        options = (
            float(group["lr"]),
            *map(float, group["betas"]),
            float(group["eps"]),
            float(group["weight_decay"]),
            bool(group["decoupled_weight_decay"]),
            bool(group["maximize"]),
        )

        def step(gate: Tensor) -> None:
            b.ops.restore_adamw_(
                runs.weights, runs.grads, averages, squares, steps, b.saved, b.dirty, runs.table, gate, *options
            )

        return step


FUSED: dict[type, type[FusedStep]] = {
    torch.optim.SGD: FusedSGD,
    torch.optim.Adam: FusedAdam,
    torch.optim.AdamW: FusedAdam,
}


def refusal(base: torch.optim.Optimizer) -> str | None:
    """Why the base optimizer must step by itself, in words; None where the fused step may stand for it."""
    kind = FUSED.get(type(base))
    if kind is None:
        return f"{type(base).__name__} has no fused step"
    if base._optimizer_step_pre_hooks or base._optimizer_step_post_hooks:
        return "the base optimizer has step hooks"
    patched = base.__dict__.get("step")
    if patched is not None and not getattr(patched, "_wrapped_by_lr_sched", False):
        return "the base optimizer's step was replaced"
    for group in base.param_groups:
        reason = kind.refuses(group)
        if reason is not None:
            return reason
    return None
