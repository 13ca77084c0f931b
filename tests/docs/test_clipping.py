"""What examples/README.md says of clipping: figures are those of the results, and its base optimizer does it."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import lets_kernels as lk
from support.docs_blocks import blocks

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "examples" / "README.md"
(NAMED,) = re.findall(r"`(benchmarks/results/clipping\S+\.json)`", PAGE.read_text())
((_, RECIPE),) = blocks(PAGE, "python")


def test_figures_are_those_of_the_results():
    rows = json.loads((ROOT / NAMED).read_text())["results"]
    mean = {
        (row["radius"], row["clipped"], key): sum(seed[key] for seed in row["seeds"]) / len(row["seeds"])
        for row in rows
        for key in ("flips", "rho", "active")
    }
    table = re.findall(
        r"^\| (?:learned, |`rho=\")(\w+)[^|]*\| (\S+) \| (\S+) \| (\S+) \|$", PAGE.read_text(), re.MULTILINE
    )
    assert [name for name, *_ in table] == ["diagonal", "secant", "auto"]
    for name, *figures in table:
        key, digits = ("rho", 1) if name == "auto" else ("flips", 3)
        for where, figure in zip(("closures", "second", "base"), figures, strict=True):
            measured = mean[name, where, key]
            assert float(figure.strip("*")) == (float(f"{measured:.{digits}g}") if name == "auto" else round(measured))
    assert f"without clipping {mean['auto', 'nowhere', 'rho']:.1g}" in PAGE.read_text()
    assert f"active in {mean['secant', 'second', 'active']:.0f} of 200" in PAGE.read_text()


def trained(base, rho, clip, steps):
    """The radius of a net that learns from clipped gradients; most of them are longer than 0.1."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 3))
    optimizer = lk.SAM(net.parameters(), base, rho=rho, lr=0.05)
    for _ in range(steps):
        inputs = torch.randn(32, 8)
        targets = (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long()
        optimizer.zero_grad()
        cross_entropy(net(inputs), targets).backward()
        with optimizer.perturbed():
            optimizer.zero_grad()
            cross_entropy(net(inputs), targets).backward()
        clip(net)
        optimizer.step()
    return float(optimizer.rho)


def clipping_base():
    exec(RECIPE.replace("(1.0 /", "(0.1 /"), names := {})
    return names["ClippedSGD"]


def test_auto_falls_to_nothing_where_only_the_second_gradient_is_clipped_and_not_with_the_recipe():
    after = trained(torch.optim.SGD, "auto", lambda net: nn.utils.clip_grad_norm_(net.parameters(), 0.1), 60)
    within = trained(clipping_base(), "auto", lambda net: None, 60)
    assert after < 1e-4 < 1e-2 < within


@pytest.mark.parametrize("most", [0.1, 1e9])
def test_the_recipe_takes_the_clipped_step(most):
    """With a number for ρ, the one that `clip_grad_norm_` before the step leads to; also where it cuts nothing."""
    nets = []
    exec(RECIPE.replace("(1.0 /", f"({most} /"), names := {})
    for base, clip in ((names["ClippedSGD"], False), (torch.optim.SGD, True)):
        torch.manual_seed(0)
        net = nn.Linear(8, 3).double()
        optimizer = lk.SAM(net.parameters(), base, rho=0.1, lr=0.1)
        inputs, targets = torch.randn(16, 8, dtype=torch.float64), torch.randint(3, (16,))
        cross_entropy(net(inputs), targets).backward()
        optimizer.first_step(zero_grad=True)
        cross_entropy(net(inputs), targets).backward()
        if clip:
            nn.utils.clip_grad_norm_(net.parameters(), most)
        optimizer.second_step()
        nets.append(net)
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)  # float64, a dozen roundings
