"""The restore fused with the step of a base optimizer: a copy, and torch's own fused step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lets_kernels.ops import reference
from lets_kernels.ops.foreach.perturb import restore_
from lets_kernels.ops.foreach.shared import ALL, Plan, alike, differ, fits, lists, on_host, one, pieces, plan_of
from lets_kernels.ops.reference.shared import PerRun, Tensors
from lets_kernels.ops.reference.step import restore_bsam_, restore_lion_

__all__ = ["restore_adamw_", "restore_bsam_", "restore_lion_", "restore_sgd_"]


def restore_sgd_(
    params: Tensors, grads: Tensors, momenta: Tensors, saved: Tensor, dirty: Tensor, table: Tensor, gate: Tensor,
    lr: PerRun, momentum: PerRun, weight_decay: PerRun, nesterov: bool, maximize: bool,
) -> None:  # fmt: skip
    """As :func:`lets_kernels.ops.reference.restore_sgd_`, by ``torch._fused_sgd_``."""
    if not on_host(saved, dirty, gate):
        numbers = lr, momentum, weight_decay
        reference.restore_sgd_(params, grads, momenta, saved, dirty, table, gate, *numbers, nesterov, maximize)
        return
    if differ(lr, momentum, weight_decay):
        for part in alike(table, lr, momentum, weight_decay):
            own: Any = [*map(part.of, (params, grads, momenta)), saved, dirty.clone(), part.table, gate, *part.numbers]
            own += [nesterov, maximize]
            restore_sgd_(*own)
        dirty.fill_(0)
        return
    lr, momentum, weight_decay = map(one, (lr, momentum, weight_decay))
    plan, columns = plan_of(table), [params, [saved], grads, *([momenta] if momentum else [])]
    if not (lr and fits(plan, saved.dtype, *columns)):
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
    dirty: Tensor, table: Tensor, gate: Tensor, lr: PerRun, beta1: PerRun, beta2: PerRun, eps: PerRun,
    weight_decay: PerRun, decoupled: bool, maximize: bool,
) -> None:  # fmt: skip
    """As :func:`lets_kernels.ops.reference.restore_adamw_`, by ``torch._fused_adam_`` or ``torch._fused_adamw_``."""
    lists_ = params, grads, exp_avgs, exp_avg_sqs, steps
    if not on_host(saved, dirty, gate, *steps):
        numbers = lr, beta1, beta2, eps, weight_decay
        reference.restore_adamw_(*lists_, saved, dirty, table, gate, *numbers, decoupled, maximize)
        return
    if differ(lr, beta1, beta2, eps, weight_decay):
        for part in alike(table, lr, beta1, beta2, eps, weight_decay):
            own: Any = [*map(part.of, (params, grads, exp_avgs, exp_avg_sqs)), [steps[i] for i in part.places]]
            own += [saved, dirty.clone(), part.table, gate, *part.numbers, decoupled, maximize]
            restore_adamw_(*own)
        dirty.fill_(0)
        return
    lr, beta1, beta2, eps, weight_decay = map(one, (lr, beta1, beta2, eps, weight_decay))
    plan, columns = plan_of(table), [params, [saved], grads, exp_avgs, exp_avg_sqs]
    if not (lr and len(steps) == len(table) and fits(plan, saved.dtype, *columns)):
        numbers = lr, beta1, beta2, eps, weight_decay
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
