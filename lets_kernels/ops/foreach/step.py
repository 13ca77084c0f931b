"""The restore fused with the step of a base optimizer: a copy, and torch's own fused step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lets_kernels.ops import reference
from lets_kernels.ops.foreach.perturb import restore_
from lets_kernels.ops.foreach.shared import ALL, Plan, fits, lists, on_host, pieces, plan_of
from lets_kernels.ops.reference.shared import Tensors
from lets_kernels.ops.reference.step import restore_bsam_, restore_lion_

__all__ = ["restore_adamw_", "restore_bsam_", "restore_lion_", "restore_sgd_"]


def restore_sgd_(
    params: Tensors, grads: Tensors, momenta: Tensors, saved: Tensor, dirty: Tensor, table: Tensor, gate: Tensor,
    lr: float, momentum: float, weight_decay: float, nesterov: bool, maximize: bool,
) -> None:  # fmt: skip
    """As :func:`lets_kernels.ops.reference.restore_sgd_`, by ``torch._fused_sgd_``."""
    plan, columns = plan_of(table), [params, [saved], grads, *([momenta] if momentum else [])]
    if not (lr and on_host(saved, dirty, gate) and fits(plan, saved.dtype, *columns)):
        numbers = lr, momentum, weight_decay
        reference.restore_sgd_(params, grads, momenta, saved, dirty, table, gate, *numbers, nesterov, maximize)
    elif not gate.item():
        restore_(params, saved, dirty, table)
    else:

        def step(_: list[int], theta: list[Tensor], g: list[Tensor], *m: list[Tensor]) -> None:
            torch._fused_sgd_(
                theta, g, m[0] if m else [], lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov,
                maximize=maximize, dampening=0.0, is_first_step=False,
            )  # fmt: skip

        _restored(plan, dirty, lists(plan, *columns), step)


def restore_adamw_(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, steps: Tensors, saved: Tensor,
    dirty: Tensor, table: Tensor, gate: Tensor, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
    decoupled: bool, maximize: bool,
) -> None:  # fmt: skip
    """As :func:`lets_kernels.ops.reference.restore_adamw_`, by ``torch._fused_adam_`` or ``torch._fused_adamw_``."""
    plan, columns = plan_of(table), [params, [saved], grads, exp_avgs, exp_avg_sqs]
    ours = lr and len(steps) == len(table) and on_host(saved, dirty, gate, *steps)
    if not (ours and fits(plan, saved.dtype, *columns)):
        numbers = lr, beta1, beta2, eps, weight_decay
        lists_ = params, grads, exp_avgs, exp_avg_sqs, steps
        reference.restore_adamw_(*lists_, saved, dirty, table, gate, *numbers, decoupled, maximize)
    elif not gate.item():
        restore_(params, saved, dirty, table)
    else:
        fused = torch._fused_adamw_ if decoupled else torch._fused_adam_

        def step(places: list[int], theta: list[Tensor], g: list[Tensor], m: list[Tensor], v: list[Tensor]) -> None:
            fused(
                theta, g, m, v, [], [steps[i] for i in places], lr=lr, beta1=beta1, beta2=beta2, eps=eps,
                weight_decay=weight_decay, amsgrad=False, maximize=maximize,
            )  # fmt: skip

        torch._foreach_add_(list(steps), 1)
        _restored(plan, dirty, lists(plan, *columns), step)


def _restored(plan: Plan, dirty: Tensor, columns: list[list[Tensor]], step: Callable[..., Any]) -> None:
    """A step on the weights from before they were perturbed: on lists of weights, old weights, gradients and state.

    Numbers of 16 bits are widened and stored by pieces, since torch's fused steps round some of them more than once.
    """
    theta, old, *others = columns
    if dirty.item():
        torch._foreach_copy_(theta, old)
    if theta[0].element_size() >= 4:
        step(list(range(len(theta))), theta, *others)
    else:
        for places, (weights, g, *state) in pieces(plan, ALL, theta, *others):
            widened = [[x.float() for x in column] for column in (weights, g, *state)]
            step(places, *widened)
            for to, found in zip((weights, *state), (widened[0], *widened[2:]), strict=True):
                torch._foreach_copy_(to, found)
    dirty.fill_(0)
