"""Loss scaling on ranks that are perturbed one by one: an overflow that only one of them sees."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from support.ddp_training import batch, optimizer, replica
from support.given_gradients import snapshot
from support.guard_bands import same_bits


def scaled(rank, shape, which, check_finite):
    """Two steps under a scaler, with an overflow on rank 1 in one pass of the first; the scale after each, the end."""
    model = replica()
    opt = optimizer(model, sync_perturbation=False, check_finite=check_finite)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
    scales, calls = [], []

    def run(step):
        calls.append(1)
        model.zero_grad()
        x, y = batch(rank, step)
        loss = cross_entropy(model(x), y)
        overflows = rank == 1 and len(calls) == which + 1
        scaler.scale(loss * (torch.inf if overflows else 1.0)).backward()
        return loss

    for step in range(3):
        if shape == "closure":
            opt.step(lambda s=step: run(s), scaler=scaler)
        else:
            with opt.first_pass():
                run(step)
            opt.unscale_first(scaler)
            opt.first_step(zero_grad=True)
            run(step)
            scaler.step(opt)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales, snapshot(opt)


@pytest.mark.parametrize("check_finite", [True, False])
@pytest.mark.parametrize("shape", ["closure", "two-steps"])
@pytest.mark.parametrize("which", [0, 1], ids=["first", "second"])
def test_an_overflow_in_one_ranks_own_pass_backs_off_the_scale_on_all(ranks, which, shape, check_finite):
    """Else ranks would average gradients of different scales from then on, and drift."""
    (scales, end), (other_scales, other_end) = ranks.run(scaled, shape, which, check_finite)
    assert scales == other_scales == [4.0, 4.0, 4.0]
    assert same_bits(end, other_end)
    assert all(map(torch.isfinite, map(torch.sum, end)))
