"""The passes from which a radius learns, at the weights that a step has left."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lets_kernels.around.amp import Scaler
from lets_kernels.parts.passes import Gradients, by_index
from lets_kernels.step.step import Closure, as_loss, check_same_graph

if TYPE_CHECKING:
    from lets_kernels.sam import SAM


def learn(o: "SAM", train_closure: Closure | None, val_closure: Closure | None, scaler: Scaler | None) -> None:
    """The body of :meth:`SAM.radius_step`."""
    radius = o.radius
    if not radius.learns:
        raise RuntimeError(
            "radius_step() is for a learned radius with closures: rho=LearnedRadius(...); with validation='next' "
            "and rho='auto' the steps themselves are enough, so leave it out"
        )
    if val_closure is None or (train_closure is None and radius.needs_train_closure):
        raise ValueError("radius_step(train_closure, val_closure) needs both closures for this radius")
    o.refuse_another_step("radius_step()")
    if not o._radius_waits:
        raise RuntimeError(
            "radius_step() comes after second_step(), once a step, and before the next first_step() or perturbed(), "
            "which write where the last step has left what the radius learns from"
        )
    observed, o._trial, o._radius_waits, o._missed = o._trial, None, False, None
    if observed is None:  # a step that the radius does not learn from
        return
    trial, versions = observed
    check_same_graph(trial.captured, "radius_step()", "the step before it")
    if any(g._version != v for g, v in versions):
        raise RuntimeError(
            "the gradients of the perturbed pass were changed in place before radius_step(); zero them with "
            "set_to_none=True"
        )
    assert o._buckets is not None
    buckets = o._buckets.buckets  # those of the step, whatever has been frozen since
    kept = [(p, p.grad) for b in buckets for p in b.params]
    train: list[Gradients] | None = None
    train_loss = None
    o.network.statistics.hold()  # these passes are not among those at θ that count
    try:
        if radius.needs_train_closure:
            assert train_closure is not None
            o._drop_gradients()
            train_loss = _loss(o, train_closure, scaler, "train_closure")
            train = [by_index(b.gather(own=True)) for b in buckets]
        o._drop_gradients()
        val_loss = _loss(o, val_closure, scaler, "val_closure")
        val = [by_index(b.gather(own=train is None)) for b in buckets]  # the radius may wait for the next pass
    except BaseException:
        o._scaling.give_up()
        raise
    finally:
        o.network.statistics.release()
        for p, grad in kept:
            p.grad = grad
        o._mark_gradients()
    o._passes += 1 + (train is not None)
    with torch.no_grad():
        radius.observe(trial, val, val_loss, train, train_loss, o.param_groups, o.replicas)


def _loss(o: "SAM", closure: Closure, scaler: Scaler | None, name: str) -> Tensor:
    return as_loss(o.samples.loss(o.samples.whole(o._pass(scaler), closure)), name)
