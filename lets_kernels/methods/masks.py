"""The Fisher information of single samples, by which Sparse SAM may select its mask."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lets_kernels.base.state import Look
from lets_kernels.parts.passes import FirstPass
from lets_kernels.space.runs import Runs
from lets_kernels.step.step import Closure

if TYPE_CHECKING:
    from lets_kernels.methods.fisher import SparseSAM


def update_mask(o: "SparseSAM", closure: Closure, samples: int) -> None:
    """The body of :meth:`SparseSAM.update_mask`."""
    if o.direction.kind != "fisher":
        raise ValueError("update_mask() is for kind='fisher'; a dynamic mask is selected within steps")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, not {samples}")
    o.refuse_another_step("update_mask()")
    buckets = o._agreed_space().buckets
    kept = [(p, p.grad) for b in buckets for p in b.params]
    runs = [b.all_runs() for b in buckets]
    sums = [[torch.zeros_like(p, dtype=_wide(p)) for p in each.params] for each in runs]
    o.network.statistics.hold()
    try:
        for _ in range(samples):
            o._drop_gradients()
            o.samples.whole(o._pass(None), closure)
            for bucket, own in zip(buckets, sums, strict=True):
                _add(own, bucket.gather())
    finally:
        o.network.statistics.release()
        for p, grad in kept:
            p.grad = grad
        o._mark_gradients()
    home = o.skipped.device
    found = torch.stack([t.sum(dtype=torch.float64).to(home) for own in sums for t in own])
    total = o.replicas.mean(found.sum())
    if not bool(torch.isfinite(total) & (total > 0)):
        raise ValueError(
            "the squared gradients of these samples sum up to zero or to no finite number, so the mask stays: does the "
            "closure call backward(), on a loss that no gradient scaler has scaled?"
        )
    first = FirstPass(
        runs, o.param_groups, o._step_number, home, o.replicas, o.random, o.held, Look.at(o.base_optimizer), keeps=False
    )
    with torch.no_grad():
        o.direction.select(first, sums)


def _wide(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


@torch.no_grad()
def _add(sums: list[Tensor], runs: Runs) -> None:
    for i, g in zip(runs.indices, runs.grads, strict=True):
        wide = g.to(sums[i].dtype)
        sums[i].addcmul_(wide, wide)
