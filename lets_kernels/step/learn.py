"""The passes from which a radius learns, at the weights that a step has reached."""

import torch
from torch import Tensor

from lets_kernels.around.amp import Scaler
from lets_kernels.learning.moving import Observed, Summed
from lets_kernels.parts.passes import by_index
from lets_kernels.parts.samples import Closure
from lets_kernels.space.buckets import Bucket
from lets_kernels.step.capture import check_same_graph
from lets_kernels.step.engine import Engine
from lets_kernels.step.losses import as_loss


def learn(e: Engine, train_closure: Closure | None, val_closure: Closure | None, scaler: Scaler | None) -> None:
    """The body of :meth:`SAM.radius_step`."""
    w, now, radius, replicas = e.work, e.now, e.work.setting.learning, e.work.setting.replicas
    if radius is None or not radius.learns:
        raise RuntimeError(
            "radius_step() is for a learned radius with closures: rho=LearnedRadius(...); with validation='next' "
            "and rho='auto' the steps themselves are enough, so leave it out"
        )
    if val_closure is None or (train_closure is None and radius.needs_train_closure):
        raise ValueError("radius_step(train_closure, val_closure) needs both closures for this radius")
    e.refuse_another_step("radius_step()")
    if not now.radius_waits:
        raise RuntimeError(
            "radius_step() comes after second_step(), once a step, and before the next first_step() or perturbed(), "
            "which overwrite what the radius learns from"
        )
    trial, now.lesson, now.radius_waits, now.missed = now.lesson, None, False, None
    if trial is None:  # a step that the radius does not learn from
        return
    check_same_graph(trial.captured, "radius_step()", "the step before it")
    if any(g._version != v for g, v in trial.versions):
        raise RuntimeError(
            "the gradients of the perturbed pass were changed in place before radius_step(); zero them with "
            "set_to_none=True"
        )
    buckets = trial.buckets  # the step's own buckets, even if parameters have been frozen since
    kept = [(p, p.grad) for b in buckets for p in b.params]
    train: Summed | None = None
    # No gradient has a name here: each is gone before the next one is there, unless the radius itself keeps it.
    w.setting.network.statistics.hold()  # running statistics do not count these passes
    try:
        if radius.needs_train_closure:
            assert train_closure is not None
            w.drop_gradients()
            train_loss = _loss(e, train_closure, scaler, "train_closure")
            with torch.no_grad():
                trial, train = radius.take_train(
                    trial, _observed(buckets, train_loss, radius.goes_along_train), replicas
                )
        w.drop_gradients()
        val_loss = _loss(e, val_closure, scaler, "val_closure")
        with torch.no_grad():
            val = radius.take_val(trial, _observed(buckets, val_loss, radius.goes_along_train and train is None))
    except BaseException:
        w.scaling.give_up()
        raise
    finally:
        w.setting.network.statistics.release()
        for p, grad in kept:
            p.grad = grad
        e.mark_gradients()
    w.progress.gradients += 1 + (train is not None)
    with torch.no_grad():
        radius.observe(trial, val, train, w.groups, replicas)


def _observed(buckets: list[Bucket], loss: Tensor, own: bool) -> Observed:
    """The gradients that are there now. ``own``: they are kept beyond the next backward."""
    return Observed([by_index(b.gather(own=own)) for b in buckets], loss)


def _loss(e: Engine, closure: Closure, scaler: Scaler | None, name: str) -> Tensor:
    samples = e.work.setting.samples
    return as_loss(samples.loss(samples.whole(e.work.a_pass(scaler), closure)), name)
