"""Which parts go together."""

from typing import TYPE_CHECKING

from lets_kernels.space.distributed import ALONE

if TYPE_CHECKING:
    from lets_kernels.sam import SAM


def check_parts(o: "SAM") -> None:
    """``ValueError`` where two parts of an optimizer, or a part and an option, contradict each other."""
    direction, schedule, descent, synced = o.direction, o.schedule, o.descent, o.network.sync_perturbation
    names = {part: type(part).__name__ for part in (direction, schedule, descent)}
    o.radius.check_passes(synced, direction, o.samples)
    if not direction.needs_gradient:
        for part, wanted in ((descent, descent.holds_first), (schedule, schedule.looks_at_gradient)):
            if wanted:
                raise ValueError(
                    f"{names[part]} needs a first gradient, and {names[direction]} takes none: a step has one pass only"
                )
        if not synced or o.network.same_rng:
            option = "same_rng=True" if o.network.same_rng else "sync_perturbation=False"
            raise ValueError(
                f"{option} is about the first of two passes, and {names[direction]} takes one; leave it out"
            )
    if o.network.same_rng and not o.samples.second_is_whole:
        raise ValueError(
            f"same_rng=True with {type(o.samples).__name__}: the forward pass that selects samples uses up the numbers "
            "that the second pass would draw again; leave it out"
        )
    if direction.starts and schedule.looks_at_gradient:
        raise ValueError(
            f"{names[schedule]} decides by the gradient at the weights, and that of {names[direction]} is taken beside "
            "them: take another schedule"
        )
    if not synced and o.replicas.asked == ALONE:
        raise ValueError("sync_perturbation=False: a step that one rank skips all must skip; leave 'alone' out")
    if not synced and not schedule.capturable:
        raise ValueError(
            f"sync_perturbation=False with {names[schedule]}: a step that does not perturb would go along each rank's "
            "own gradient; perturb at every step (schedule=Always()), or leave it out"
        )
    if not synced and direction.remembers:
        raise ValueError(
            f"sync_perturbation=False with {names[direction]}: it would keep an average or a mask of each rank's own "
            "first gradients, of which replicas must hold the same, and a saved state can hold but one; leave it out"
        )
    if not synced and descent.holds_first:
        raise ValueError(
            f"sync_perturbation=False with {names[descent]}: it would combine each rank's own first gradient with the "
            "mean of the second ones, and replicas would drift apart; leave it out"
        )


def check_micro_batches(o: "SAM") -> None:
    """``ValueError`` where a step cannot go over micro-batches that are perturbed one by one."""
    reason = None
    if o.radius.moves or o.descent.holds_first:
        what = type(o.radius if o.radius.moves else o.descent).__name__
        reason = f"{what} compares the two gradients of one step"
    elif o.schedule.looks_at_gradient:
        reason = f"{type(o.schedule).__name__} decides by the gradient of the whole batch"
    elif not o.direction.needs_gradient:
        reason = f"{type(o.direction).__name__} perturbs all micro-batches alike, so accumulate them in one closure"
    elif o.direction.remembers:
        reason = f"{type(o.direction).__name__} remembers one first gradient a step"
    elif o.samples.per_sample:
        reason = f"{type(o.samples).__name__} looks at the samples of one batch"
    if reason is not None:
        raise ValueError(f"{reason}: give step() one closure, not a list")
