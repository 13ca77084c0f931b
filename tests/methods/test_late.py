"""Late SAM: which steps it perturbs, and when a learned radius learns."""

import pytest
import torch

import lets_kernels as lk
from support.given_gradients import Toy

SGD = torch.optim.SGD


@pytest.mark.parametrize(
    "steps, fraction, begin",
    [(200, 0.125, 175), (160, 0.0625, 150), (10, 1.0, 0), (10, 0.26, 7), (10, 0.24, 8), (1, 1.0, 0), (3, 0.9, 0)],
)
def test_the_last_steps_perturb_and_those_beyond_the_end(steps, fraction, begin):
    schedule = lk.Tail(steps, fraction)
    assert [schedule.perturbs(t) for t in range(2 * steps)] == [t >= begin for t in range(2 * steps)]


@pytest.mark.parametrize("steps, fraction", [(10, 0.0), (10, 0.04)])
def test_a_share_of_no_step_never_perturbs(steps, fraction):
    assert not any(map(lk.Tail(steps, fraction).perturbs, range(30)))


@pytest.mark.parametrize("validation", ["closure", "next"])
def test_a_learned_radius_learns_from_the_last_steps_alone(validation):
    """Before, nothing asks for a validation gradient either."""
    toy = Toy(torch.float64)
    options = {"validation": "next"} if validation == "next" else {}
    opt = lk.LateSAM(toy.params, SGD, lk.LearnedRadius(0.1, **options), steps=8, fraction=0.5, lr=0.1)
    calls, radii = [], []

    def closure(kind, factor):
        def run():
            calls.append(kind)
            toy.set_grads([factor * p.detach() ** 3 for p in toy.params])
            return torch.tensor(factor)

        return run

    for _ in range(8):
        closures = (closure("train", 1.0), closure("val", 2.0)) if opt.radius.learns else (closure("train", 1.0),)
        opt.step(*closures)
        radii.append(float(opt.rho))
    if validation == "closure":
        # Each of the last four steps has two passes, and then both closures at the new weights.
        assert calls == ["train"] * 4 + ["train", "train", "train", "val"] * 4
        moved = 4
    else:
        assert calls == ["train"] * (4 + 8)
        moved = 5  # one step later: it is the next gradient from which it learns
    assert radii[:moved] == pytest.approx([0.1] * moved, rel=1e-15)
    assert all(a != b for a, b in zip(radii[moved - 1 :], radii[moved:], strict=False))


@pytest.mark.parametrize(
    "options, match",
    [({"steps": 0}, "steps must be at least 1"), ({"steps": 9, "fraction": 1.1}, r"fraction must be in \[0, 1\]")],
)
def test_what_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        lk.LateSAM(Toy(torch.float32).params, SGD, **options, lr=0.1)
