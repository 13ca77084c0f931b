"""The Fisher information of single samples, by which Sparse SAM may select its mask."""

import torch
from torch import Tensor

from lets_kernels.parts.direction import Masked
from lets_kernels.parts.samples import Closure
from lets_kernels.space.buckets import Runs
from lets_kernels.step.engine import Engine


def update_mask(e: Engine, direction: Masked, closure: Closure, samples: int) -> None:
    """The body of :meth:`SparseSAM.update_mask`."""
    w, network = e.work, e.work.setting.network
    if direction.kind != "fisher":
        raise ValueError("update_mask() is for kind='fisher'; a dynamic mask is selected within steps")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, not {samples}")
    e.refuse_another_step("update_mask()")
    buckets = w.tables.agreed().buckets
    kept = [(p, p.grad) for b in buckets for p in b.params]
    runs = [b.all_runs() for b in buckets]
    sums = [[torch.zeros_like(p, dtype=_wide(p)) for p in each.params] for each in runs]
    network.statistics.hold()
    try:
        for _ in range(samples):
            w.drop_gradients()
            w.setting.samples.whole(w.a_pass(None), closure)
            for bucket, own in zip(buckets, sums, strict=True):
                _add(own, bucket.gather())
    finally:
        network.statistics.release()
        for p, grad in kept:
            p.grad = grad
        e.mark_gradients()
    home = w.progress.home
    found = torch.stack([t.sum(dtype=torch.float64).to(home) for own in sums for t in own])
    total = w.setting.replicas.mean(found.sum())
    if not bool(torch.isfinite(total) & (total > 0)):
        raise ValueError(
            "the squared gradients of these samples sum up to zero or to no finite number, so the mask stays: does the "
            "closure call backward(), on a loss that no gradient scaler has scaled?"
        )
    first = w.first_pass(runs)
    with torch.no_grad():
        direction.select(first, sums)


def _wide(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


@torch.no_grad()
def _add(sums: list[Tensor], runs: Runs) -> None:
    for i, g in zip(runs.indices, runs.grads, strict=True):
        wide = g.to(sums[i].dtype)
        sums[i].addcmul_(wide, wide)
