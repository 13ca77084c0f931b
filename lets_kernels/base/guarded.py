"""Steps of optimizers from other packages that happen only if a flag on the device says so."""

from typing import Any

import torch
from torch import Tensor

from lets_kernels.base.foreign import own_step
from lets_kernels.space.shards import local


def guarded_step(optimizer: torch.optim.Optimizer, gate: Tensor) -> None:
    """``optimizer.step()`` if ``gate`` (0-d) is not zero; otherwise parameters and state stay as they were.

    If the parameters are on the CPU, the gate is read, which waits for nothing if the gate is there too. On
    accelerators the step always runs, and the device undoes it if the gate is closed, so that the host does not wait.
    This costs a copy of parameters and state. State on the host (Adam's step count unless ``capturable``) then counts
    skipped steps too.
    """
    if gate.device.type == "cpu" or any(d.type == "cpu" for d in _devices(optimizer)):
        if gate.item() != 0:
            own_step(optimizer)
        return
    step_and_undo(optimizer, gate)


def step_and_undo(optimizer: torch.optim.Optimizer, gate: Tensor) -> None:
    """What :func:`guarded_step` does on accelerators: never reads ``gate`` on the host."""
    closed = {device: gate.to(device) == 0 for device in _devices(optimizer)}
    before = {key: t.detach().clone() for key, t in _tensors(optimizer).items() if t.device in closed}
    own_step(optimizer)
    with torch.no_grad():
        for key, t in _tensors(optimizer).items():
            if t.device in closed:
                old = before[key] if key in before else torch.zeros_like(t)
                t.copy_(torch.where(closed[t.device], old, t))


def make_state(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer whose parameters have no gradients make its state, if it needs a state and has none.

    It takes the step that torch.distributed.checkpoint takes for this: along zeros, with lr = 0, so no parameter moves.
    """
    if all(optimizer.state.get(p) for group in optimizer.param_groups for p in group["params"]):
        return
    before = [group.get("lr") for group in optimizer.param_groups]
    for group, lr in zip(optimizer.param_groups, before, strict=True):
        if lr is not None:
            group["lr"] = torch.zeros_like(lr) if isinstance(lr, Tensor) else 0.0
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    try:
        own_step(optimizer)
    finally:
        for group, lr in zip(optimizer.param_groups, before, strict=True):
            if lr is not None:
                group["lr"] = lr
        optimizer.zero_grad()


def _devices(optimizer: torch.optim.Optimizer) -> set[torch.device]:
    return {p.device for group in optimizer.param_groups for p in group["params"]}


def _tensors(optimizer: torch.optim.Optimizer) -> dict[Any, Tensor]:
    """Parameters and state tensors, by the place where they are found."""
    found: dict[Any, Tensor] = {}
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        found[p] = local(p)
        for name, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor):
                found[(p, name)] = local(value)
    return found
