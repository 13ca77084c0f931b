"""One step over micro-batches, each perturbed along its own gradient: m-sharpness in one process."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lets_kernels.around.amp import Scaler
from lets_kernels.step.combinations import check_micro_batches
from lets_kernels.step.step import Closure, loss_in

if TYPE_CHECKING:
    from lets_kernels.sam import SAM


def micro_step(o: "SAM", closures: Sequence[Closure], scaler: Scaler | None) -> list[Any]:
    """:meth:`SAM.step` over a list of closures; the base optimizer steps along the mean of their gradients.

    As a rank of its own would for every closure (``sync_perturbation=False``), so with m micro-batches this is the
    m-sharpness of Foret et al. (ICLR 2021, §4.1). One buffer of gradients more than a step with one closure.
    """
    if not closures:
        raise ValueError("step([]): no closures, no gradients")
    check_micro_batches(o)
    losses, perturbed, totals, sums, passes = [], list[Tensor | None](), [], dict[Tensor, Tensor](), 0
    try:
        for closure in closures:
            o._drop_gradients()
            with o.first_pass():
                losses.append(o._call(closure, scaler))
            o.first_step(zero_grad=True, loss=loss_in(losses[-1]))
            step = o.begun_step
            if step.perturbs:
                step.perturbed_loss = loss_in(o._call(closure, scaler))
                step.passes += 1
            else:
                step.return_gradients()
            with torch.no_grad():
                step.restore()
            perturbed.append(step.perturbed_loss)
            passes += step.passes
            totals.append(step.total)
            _add(sums, o)
        for p, total in sums.items():
            p.grad = total.div_(len(closures))
        step = o.begun_step
        step.totals, step.passes = totals, passes
        step.returned = True  # no pass is left that the end of the step would have to count
        step.loss, step.perturbed_loss = _mean(map(loss_in, losses)), _mean(perturbed)
        o._finish()
    except BaseException:
        o.restore()
        o._scaling.give_up()
        o._mark_gradients()
        raise
    return losses


def _mean(losses: Iterable[Tensor | None]) -> Tensor | None:
    """The mean of the losses that are known."""
    known = [loss for loss in losses if loss is not None]
    return torch.stack(known).mean() if known else None


@torch.no_grad()
def _add(sums: dict[Tensor, Tensor], o: "SAM") -> None:
    for p in (p for group in o.param_groups for p in group["params"] if p.grad is not None):
        if p in sums:
            sums[p] += p.grad
        else:
            sums[p] = p.grad.detach().clone()  # the memory may be that of the next pass too
