"""DistributedDataParallel: random decisions are the same on all ranks, by the first one's seed."""

import pytest
import torch

import lets_kernels as lk
from support.ddp_training import batch, net, optimizer, replica, train
from support.family import FAMILY, assert_same, held
from support.given_gradients import weights
from support.guard_bands import same_bits
from support.inside import progress


def without_ranks(rank, method):
    """What a step says where nothing tells which ranks train together: without a seed, with one, and alone."""
    found = []
    for options in ({}, {"seed": 3}, {"process_group": "alone"}):
        layers = net()
        opt = optimizer(layers, method, model=None, **options)
        try:
            train(opt, layers, lambda step: batch(0, step), 1)
            found.append(None)
        except ValueError as error:
            found.append((str(error), same_bits(weights(layers), weights(net()))))
    return found


@pytest.mark.parametrize("method", FAMILY)
def test_random_decisions_need_ranks_or_a_seed(ranks, method):
    """And decisions by a norm need ranks, whose sums may differ in the last bit."""
    draws = progress(optimizer(net(), method)).random.used
    by_norm = FAMILY[method].cls in (lk.AESAM, lk.AELookSAM)
    for nothing, seeded, alone in ranks.run(without_ranks, method):
        assert alone is None
        assert (nothing is None) is not (draws or by_norm)
        assert (seeded is None) is not by_norm
        for message, untouched in filter(None, (nothing, seeded)):
            assert "pass model=" in message and untouched


def seeds(rank):
    """The seed before and after the first steps, of optimizers that ranks look at, save and load one by one."""
    torch.manual_seed(rank)
    model = replica()
    opt = optimizer(model, "esam")
    drawn = progress(opt).random.seed
    if rank == 1:  # no rank waits for another one here
        assert opt.backend == "cpu"
    state = opt.state_dict()
    train(opt, model, lambda step: batch(rank, step), 2)
    other = replica()
    resumed = optimizer(other, "esam")
    resumed.load_state_dict(state)
    train(resumed, other, lambda step: batch(rank, step), 2)
    return drawn, held(opt), held(resumed)


def test_the_first_ranks_seed_is_taken(ranks):
    (first, end, resumed), (second, other_end, other_resumed) = ranks.run(seeds)
    assert first != second
    assert end["random.seed"] == first
    for each in (resumed, other_end, other_resumed):
        assert_same(each, end)
