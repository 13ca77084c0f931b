"""process_group=: replicas agree on the step to the bit, two processes over gloo on this machine."""

import pickle

import pytest
import torch
import torch.distributed as dist

import lets_kernels
from lets_kernels.space.distributed import Replicas


def batch(rank, step):
    generator = torch.Generator().manual_seed(100 * rank + step)
    return torch.randn(8, 6, generator=generator), torch.randn(8, 2, generator=generator)


def net():
    torch.manual_seed(5)
    return torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.Tanh(), torch.nn.Linear(7, 2))


def train(model, forward, batches, group, infinite_at=None):
    """Five LETS-SAM steps; returns the weights, the radius and the number of skipped steps."""
    radius = lets_kernels.LearnedRadius(0.1, curvature="secant", lr=0.1)
    opt = lets_kernels.LETSSAM(model.parameters(), torch.optim.SGD, radius, lr=0.1, momentum=0.9, process_group=group)
    for step in range(5):

        def closure(which=step, spoil=step == infinite_at):
            opt.zero_grad()
            x, y = batches(which)
            loss = (forward(x) - y).square().mean()
            loss.backward()
            if spoil:
                next(model.parameters()).grad[0, 0] = torch.inf
            return loss

        opt.step(closure, lambda which=step: closure(which + 50, False))
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    return flat, float(opt.rho), int(opt.metrics()["skipped_steps"])


def worker(rank, spoil):
    model = net()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    spoiled = 2 if spoil and rank == 1 else None
    return train(model, parallel, lambda s: batch(rank, s), dist.group.WORLD, spoiled)


@pytest.mark.parametrize("spoil", [False, True], ids=["finite", "inf-on-one-rank"])
def test_two_ranks_take_the_same_step_as_one_process_on_the_joined_batch(ranks, spoil):
    """Weights, radius and skipped steps: equal to the bit between ranks, and to 1e-5 those of a single process."""
    (first, rho, skipped), (second, other_rho, other_skipped) = ranks.run(worker, spoil)
    assert torch.equal(first, second)
    assert (rho, skipped) == (other_rho, other_skipped)
    assert skipped == int(spoil)

    def joined(step):
        (x, y), (u, v) = batch(0, step), batch(1, step)
        return torch.cat([x, u]), torch.cat([y, v])

    model = net()
    weights, alone, _ = train(model, model, joined, None, 2 if spoil else None)
    # Averages of halves against one average, in float32: a few ulp a step, five steps.
    torch.testing.assert_close(first, weights, rtol=1e-5, atol=1e-6)
    assert rho == pytest.approx(alone, rel=1e-5)
    assert rho != pytest.approx(0.1, rel=1e-3)


def test_without_a_group_nothing_is_sent_and_it_pickles():
    alone = Replicas(None)
    value = torch.tensor(3.0, dtype=torch.float64)
    assert alone.mean(value) is value
    assert pickle.loads(pickle.dumps(alone)).groups == []


def test_an_optimizer_with_a_group_says_what_to_save_instead():
    with pytest.raises(TypeError, match=r"state_dict\(\)"):
        pickle.dumps(Replicas(object()))
