"""docs/trust.md names tests that exist, and figures that are in tests/results; its recipes run as they stand."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import lets_kernels as lk
from support.given_gradients import weights
from support.guard_bands import same_bits
from support.inside import progress
from support.spawned_ranks import outcomes, result, spawn

TESTS = Path(__file__).resolve().parents[1]
PAGE = (TESTS.parent / "docs" / "trust.md").read_text()
ROWS = re.findall(r"^\| (\d+) \|(.*)$", PAGE, flags=re.MULTILINE)
SURROUNDINGS, *RECIPES = re.findall(
    r"^```python\n(.*?)^```", PAGE.split("\n## Recipes\n")[1].split("\n## ")[0], flags=re.MULTILINE | re.DOTALL
)
NAMED = sorted(set(re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", PAGE)))


def test_there_is_a_row_for_each_requirement_and_a_test_in_each():
    assert [int(number) for number, _ in ROWS] == list(range(1, 17))
    assert all("`test_" in row for _, row in ROWS)


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_what_is_named_exists(file, name):
    (found,) = TESTS.glob(f"*/{file}")
    assert f"def {name or 'test_'}" in found.read_text()


def test_figures_are_those_of_the_results():
    sanitize = json.loads((TESTS / "results" / "sanitize.json").read_text())
    mutants = json.loads((TESTS / "results" / "mutants.json").read_text())
    ops = sum(kind["ops"] for kind in sanitize["walk"].values())
    assert f"{ops:,} ops on random layouts, {sanitize['fuzz']['inputs']:,} fuzzed tables" in PAGE
    assert f"{mutants['killed']} of {mutants['total']} mutations" in PAGE
    ran = json.loads((TESTS / "results" / "long.json").read_text())["files"]
    rows, calls = (ran[file]["examples"] for file in ("test_sequences.py", "test_random_calls.py"))
    assert f"{rows:,} random sequences of 40 moves for each of 14 methods, {calls:,} calls of every op" in PAGE


# ---- the recipes: their surroundings are from here, and the blocks from the page -------------------------------------

WORLD = 2


class Net(nn.Module):
    """Blocks, and a last layer that belongs to none of them."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.blocks = nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 8)])
            self.out = nn.Linear(8, 3)
        self.double()

    def forward(self, x):
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.out(x)


def batch(*numbers):
    """Eight samples for each number, side by side."""
    pairs = []
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        pairs.append((x, torch.randint(3, (8,), generator=generator)))
    return [torch.cat(each) for each in zip(*pairs, strict=True)]


def loss_of(net, x, y):
    return cross_entropy(net(x), y)


def closure(net, *numbers):
    x, y = batch(*numbers)

    def run():
        net.zero_grad()
        loss = loss_of(net, x, y)
        loss.backward()
        return loss

    return run


def test_the_recipes_with_code_are_those_that_are_run_here():
    assert len(RECIPES) == 3 and "class Net" in SURROUNDINGS
    for recipe, name in zip(RECIPES, ("unscale_first", "DistributedDataParallel", "fully_shard"), strict=True):
        assert name in recipe


def scaled(recipe, scale=1024.0, factor=1.0):
    """The net before and after a recipe with a scaler, its optimizer, and the scale after it."""
    net, (x, y) = Net(), batch(0)
    before = weights(net)
    optimizer = lk.SAM(net.parameters(), torch.optim.SGD, rho=0.5, lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    exec(recipe, {"optimizer": optimizer, "scaler": scaler, "loss_fn": lambda: loss_of(net, x, y) * factor})
    return before, weights(net), optimizer, scaler.get_scale()


def test_the_recipe_with_a_scaler_takes_the_step_that_is_taken_without_one():
    """To the bit, since the scale is a power of two; and an overflow skips it."""
    before, after, optimizer, scale = scaled(RECIPES[0])
    plain = Net()
    lk.SAM(plain.parameters(), torch.optim.SGD, rho=0.5, lr=0.1, momentum=0.9).step(closure(plain, 0))
    unperturbed = Net()
    torch.optim.SGD(unperturbed.parameters(), lr=0.1, momentum=0.9).step(closure(unperturbed, 0))
    assert same_bits(after, weights(plain)) and scale == 1024.0
    assert not same_bits(after, before) and not same_bits(after, weights(unperturbed))
    assert progress(optimizer).step == 1 and int(optimizer.metrics()["skipped_steps"]) == 0
    optimizer.state_dict()  # refused while weights are perturbed

    before, after, optimizer, scale = scaled(RECIPES[0], factor=torch.inf)
    assert same_bits(before, after) and scale == 512.0
    assert int(optimizer.metrics()["skipped_steps"]) == 1


def test_the_one_line_more_is_needed():
    line = "optimizer.unscale_first(scaler)"
    assert line in RECIPES[0]
    with pytest.raises(RuntimeError, match="unscale_first"):
        scaled(re.sub(rf".*{re.escape(line)}.*\n", "", RECIPES[0]))


def taken(rank, number, joined):
    """One step of the optimizer that a recipe for several ranks builds, or that it describes for one process."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    numbers, val = range(WORLD) if joined else [rank], range(10, 10 + WORLD) if joined else [10 + rank]
    names = {**vars(lk), "torch": torch, "Net": Net}
    names |= {"DistributedDataParallel": DistributedDataParallel, "fully_shard": fully_shard}
    if joined:
        names |= {"DistributedDataParallel": lambda module: module, "fully_shard": lambda module: module}
    exec(RECIPES[number], names)
    net, optimizer = names["net"], names["optimizer"]
    model = names.get("model", net)
    rho = optimizer.rho
    if optimizer.radius.learns:
        optimizer.step(closure(model, *numbers), closure(model, *val))
    else:
        optimizer.step(closure(model, *numbers))
    optimizer.state_dict()  # refused while weights are perturbed
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in net.parameters()]
    return {
        "weights": [p.detach().clone() for p in whole],
        "steps": progress(optimizer).step,
        "skipped": int(optimizer.metrics()["skipped_steps"]),
        "rho": (rho, optimizer.rho),
        "kinds": {type(p.data).__name__ for p in net.parameters()},
    }


def every_recipe(rank):
    return outcomes({str(number): lambda n=number: taken(rank, n, joined=False) for number in (1, 2)})


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory):
    return spawn(every_recipe, WORLD, tmp_path_factory.mktemp("recipes"))


@pytest.mark.parametrize("number", [1, 2], ids=["DistributedDataParallel", "fully_shard"])
def test_a_recipe_for_several_ranks_takes_the_step_of_one_process(on_ranks, number):
    first, second = (result(found, str(number)) for found in on_ranks)
    alone, start = taken(0, number, joined=True), weights(Net())
    assert same_bits(first["weights"], second["weights"]) and same_bits([*first["rho"]], [*second["rho"]])
    for found in (first, second):
        assert found["steps"] == 1 and found["skipped"] == 0
        assert found["kinds"] == {"DTensor" if number == 2 else "Tensor"}
        for p, q, r in zip(found["weights"], alone["weights"], start, strict=True):
            assert torch.allclose(p, q, rtol=0, atol=1e-10) and not torch.allclose(p, r, rtol=0, atol=1e-6)
        torch.testing.assert_close(found["rho"], alone["rho"], rtol=1e-9, atol=0)
    assert (first["rho"][0] != first["rho"][1]) == (number == 1)
