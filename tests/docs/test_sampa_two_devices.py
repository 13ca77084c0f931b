"""examples/sampa_two_devices.py: two ranks with a pass each take the steps that one process takes with both."""

import itertools
import json
import re
import runpy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lets_kernels import SAM, SAMPa
from support.guard_bands import same_bits
from support.spawned_ranks import outcomes, result, spawn

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "sampa_two_devices.py"
STEPS = 5


def trained(rank, groups):
    """The weights after some steps; rank None is one process. In float64, with a parameter that gets no gradient."""
    example = SimpleNamespace(**runpy.run_path(str(EXAMPLE)))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    params = [*net.parameters(), unused]
    if groups:
        params = [{"params": params[:2], "lr": 0.2, "rho": 0.5}, {"params": params[2:], "weight_decay": 0.1}]
    optimizer = SAMPa(params, torch.optim.SGD, rho=0.3, lam=0.2, lr=0.1, momentum=0.9)
    random = torch.Generator().manual_seed(1)
    data = [torch.randn(6, 4, generator=random, dtype=torch.float64) for _ in range(STEPS + 1)]
    step = example.step_of_one if rank is None else example.step_of_two
    for old, new in itertools.pairwise(data):
        step(optimizer, lambda x: (net(x) - x[:, :2]).square().mean(), new, old)
    return [p.detach() for p in (*net.parameters(), unused)]


def asynchronous(rank):
    """The weights after some steps of asynchronous SAM; rank None works out by hand what they are to be."""
    example = SimpleNamespace(**runpy.run_path(str(EXAMPLE)))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    params = list(net.parameters())
    rho, lr = 0.3, 0.1
    random = torch.Generator().manual_seed(1)
    data = [torch.randn(6, 4, generator=random, dtype=torch.float64) for _ in range(STEPS)]

    def loss(x):
        return (net(x) - x[:, :2]).square().mean()

    if rank is not None:
        optimizer, older = SAM(params, torch.optim.SGD, rho=rho, lr=lr), None
        for new in data:
            older = example.asynchronous_step(optimizer, loss, new, new[:3], older)
        return [p.detach() for p in params]
    older = None
    for new in data:
        made = torch.autograd.grad(loss(new[:3]), params)
        before = [p.detach().clone() for p in params]
        if older is not None:
            norm = sum(g.square().sum() for g in older).sqrt()
            move(params, [rho * g / norm for g in older])
        gradient = torch.autograd.grad(loss(new), params)
        move(params, [x - lr * g - p.detach() for p, x, g in zip(params, before, gradient, strict=True)])
        older = made
    return [p.detach() for p in params]


@torch.no_grad()
def move(params, by):
    for p, d in zip(params, by, strict=True):
        p.add_(d)


CASES = {"plain": partial(trained, groups=False), "groups": partial(trained, groups=True), "asynchronous": asynchronous}


def all_cases(rank):
    return outcomes({name: partial(case, rank) for name, case in CASES.items()})


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return spawn(all_cases, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("groups", [False, True])
def test_two_ranks_take_the_steps_of_one_process(ranks, groups):
    one, two = (result(found, "groups" if groups else "plain") for found in ranks)
    assert same_bits(one, two)
    expected = trained(None, groups)
    for found, wanted in zip(one, expected, strict=True):
        # The perturbation is added by torch there and by a kernel here: roundings of float64 over five steps.
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)
    begin = torch.manual_seed(0) and nn.Linear(4, 8).weight.double()
    assert not torch.allclose(expected[0], begin, atol=1e-2)  # they have moved


def test_asynchronous_sam_perturbs_along_the_gradient_of_the_step_before(ranks):
    one, two = (result(found, "asynchronous") for found in ranks)
    assert same_bits(one, two)
    for found, wanted in zip(one, asynchronous(None), strict=True):
        # Another order of the same float64 operations, over five steps.
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)


def test_one_process_trains_as_the_page_says(capsys):
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    said = capsys.readouterr().out
    assert said.startswith("1 process: ") and float(said.rpartition(" ")[2]) > 0.9


def test_figures_are_those_of_the_results():
    text = (EXAMPLE.parent / "README.md").read_text()
    (named,) = re.findall(r"`(benchmarks/results/sampa\S+\.json)`", text)
    rows = json.loads((EXAMPLE.parents[1] / named).read_text())["ms"]
    for row in rows:
        cells = (f"{row[name]:.1f}" for name in ("gradient", "one", "two"))
        assert f"| {row['batch']} | {' | '.join(cells)} |" in text
    gradient, one, two = (rows[-1][name] for name in ("gradient", "one", "two"))
    assert f"takes the time of {two / gradient:.1f} gradients, where one process takes {one / gradient:.1f}." in text
