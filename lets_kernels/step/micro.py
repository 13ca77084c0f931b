"""One step over micro-batches, each perturbed along its own gradient: m-sharpness in one process."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lets_kernels.around.amp import Scaler
from lets_kernels.parts.samples import Closure
from lets_kernels.step.contexts import FirstPassContext
from lets_kernels.step.engine import Engine
from lets_kernels.step.losses import loss_in
from lets_kernels.step.setting import Setting


def micro_step(e: Engine, closures: Sequence[Closure], scaler: Scaler | None) -> list[Any]:
    """:meth:`SAM.step` over a list of closures; the base optimizer steps along the mean of their gradients.

    Each closure is treated like a rank of its own under ``sync_perturbation=False``, so with m micro-batches this is
    the m-sharpness of Foret et al. (ICLR 2021, §4.1). Needs one buffer of gradients more than a step with one closure.
    """
    if not closures:
        raise ValueError("step([]): no closures, no gradients")
    _check(e.work.setting)
    losses, perturbed, totals, sums, passes = [], list[Tensor | None](), [], dict[Tensor, Tensor](), 0
    try:
        for closure in closures:
            e.work.drop_gradients()
            with FirstPassContext(e):
                losses.append(e.work.call(closure, scaler))
            e.begin(zero_grad=True, loss=loss_in(losses[-1]))
            step = e.begun_step
            if step.perturbs:
                step.perturbed_loss = loss_in(e.work.call(closure, scaler))
                step.passes += 1
            else:
                step.return_gradients()
            with torch.no_grad():
                step.restore()
            perturbed.append(step.perturbed_loss)
            passes += step.passes
            totals.append(step.total)
            _add(sums, e)
        for p, total in sums.items():
            p.grad = total.div_(len(closures))
        e.begun_step.goes_along(totals, passes, _mean(map(loss_in, losses)), _mean(perturbed))
        e.finish()
    except BaseException:
        e.restore()
        e.work.scaling.give_up()
        e.mark_gradients()
        raise
    return losses


def _check(s: Setting) -> None:
    """``ValueError`` if the method cannot perturb along each micro-batch's own gradient."""
    reason = None
    if s.radius.moves or s.descent.looks_back:
        what = type(s.radius if s.radius.moves else s.descent).__name__
        reason = f"{what} compares the two gradients of one step"
    elif s.schedule.looks_at_gradient:
        reason = f"{type(s.schedule).__name__} decides by the gradient of the whole batch"
    elif not s.direction.needs_gradient:
        reason = f"{type(s.direction).__name__} perturbs all micro-batches alike, so accumulate them in one closure"
    elif s.direction.ascents > 1:
        reason = f"{type(s.direction).__name__} takes several gradients before the last one"
    elif s.direction.remembers or s.length.remembers:
        what = type(s.direction if s.direction.remembers else s.length).__name__
        reason = f"{what} remembers one first gradient a step"
    elif s.samples.per_sample:
        reason = f"{type(s.samples).__name__} looks at the samples of one batch"
    if reason is not None:
        raise ValueError(f"{reason}: give step() one closure, not a list")


def _mean(losses: Iterable[Tensor | None]) -> Tensor | None:
    """The mean of the losses that are known."""
    known = [loss for loss in losses if loss is not None]
    return torch.stack(known).mean() if known else None


@torch.no_grad()
def _add(sums: dict[Tensor, Tensor], e: Engine) -> None:
    for p in (p for group in e.work.groups for p in group["params"] if p.grad is not None):
        if p in sums:
            sums[p] += p.grad
        else:
            sums[p] = p.grad.detach().clone()  # the next pass may use the same memory
