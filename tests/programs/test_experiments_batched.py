"""The batched runs are those of the package's own optimizer, one by one; their table is what one works out by hand."""

import dataclasses
import itertools
import json
import math

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn.functional import cross_entropy

import lets_kernels as lk
from benchmarks.experiments.batched import __main__ as command
from benchmarks.experiments.batched import nets, rules, table, tasks

DIGITS = tasks.Task("digits", 0.4, 30, 32, (12, 8), "sgd", 0.1)
TASKS = {
    "sgd": DIGITS,
    "adamw": tasks.Task("digits", 0.4, 30, 32, (12, 8), "adamw", 0.003),
    "no momentum": tasks.Task("digits", 0.4, 30, 32, (12,), "sgd", 0.5, momentum=0.0),
}
RULES = {
    "auto": (rules.Auto, lambda steps: lk.AutoRadius()),
    "auto from 1": (lambda: rules.Auto(1.0), lambda steps: lk.AutoRadius(1.0)),
    "a constant": (lambda: rules.Auto(slope=40.0), lambda steps: lk.AutoRadius(constants=lk.AutoConstants(slope=40.0))),
    "fixed": (lambda: rules.Fixed(0.2), lambda steps: 0.2),
    "ramp": (
        lambda: rules.Fixed(0.2, 0.2),
        lambda steps: lk.ScheduledRadius(lambda step: 0.2 * min(1.0, (step + 1) / (0.2 * steps))),
    ),
}
SEEDS = (3, 4)


def one_by_one(task, seed, rho, adaptive):
    """A plain training loop with the package's SAM or ASAM: weights, accuracy, radius."""
    data, sizes = tasks.load(task, seed), (64, *task.hidden, 10)
    drawn = [p[0] for p in nets.initial(sizes, [seed], torch.float64)]
    layers = [nn.Linear(a, b, dtype=torch.float64) for a, b in itertools.pairwise(sizes)]
    for p, own in zip((p for layer in layers for p in layer.parameters()), drawn, strict=True):
        p.data = own.mT.reshape(p.shape).clone()  # [in, out] and [1, out] there
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))[:-1]
    if task.base == "adamw":
        base = torch.optim.AdamW(model.parameters(), lr=task.lr, weight_decay=0.01)
    else:
        base = torch.optim.SGD(model.parameters(), lr=task.lr, momentum=task.momentum, weight_decay=5e-4)
    opt = (lk.ASAM if adaptive else lk.SAM)(model.parameters(), base, rho=rho, model=model)
    inputs, labels = data.train_inputs, data.train_targets
    batches = nets.batches(len(inputs), task.batch_size, seed)
    for step in range(task.steps):
        opt.param_groups[0]["lr"] = task.lr * (1 + math.cos(math.pi * step / task.steps)) / 2
        batch = torch.from_numpy(next(batches))

        def closure(batch=batch):
            opt.zero_grad()
            loss = cross_entropy(model(inputs[batch]), labels[batch])
            loss.backward()
            return loss

        opt.step(closure)
    with torch.no_grad():
        right = model(data.test_inputs).argmax(1) == data.test_targets
    found = [p.detach().reshape(own.mT.shape).mT for p, own in zip(model.parameters(), drawn, strict=True)]
    return found, 100 * float(right.double().mean()), float(opt.rho)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("name", TASKS)
def test_runs_at_once_are_the_packages_own_one_by_one(name, adaptive):
    """Weights, accuracy and radius, after thirty steps in float64: the sums go in another order, no more."""
    task = TASKS[name]
    own = [make() for make, _ in RULES.values()]
    found, accuracies = nets.train(task, SEEDS, own, adaptive, dtype=torch.float64)
    for row, seed in enumerate(SEEDS):
        for column, (_, rho) in enumerate(RULES.values()):
            parameters, accuracy, radius = one_by_one(task, seed, rho(task.steps), adaptive)
            at = row * len(RULES) + column
            for p, q in zip(found, parameters, strict=True):
                torch.testing.assert_close(p[at], q, rtol=1e-8, atol=1e-9)
            assert accuracies[row, column] == pytest.approx(accuracy)
            assert own[column].rho(task.steps - 1)[row].item() == pytest.approx(radius, rel=1e-8)


def test_the_radii_of_these_runs_have_moved():
    """So that the test above is one of the rule."""
    rule = rules.Auto()
    nets.train(DIGITS, SEEDS, [rule], dtype=torch.float64)
    assert (rule.radius.memory[:, 1] == DIGITS.steps).all() and (rule.radius.memory[:, 4] > 0).all()
    assert (rule.rho(0) != 0.005).all() and rule.rho(0)[0] != rule.rho(0)[1]


def test_the_scale_of_the_loss_does_not_matter():
    """Nor does it reach the base optimizer. To rounding, as the rule has no unit."""
    found = [nets.train(DIGITS, SEEDS, [rules.Auto()], scale=s, dtype=torch.float64)[0] for s in (1.0, 10.0)]
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-9)


def test_variants_change_one_constant_each():
    default = dataclasses.asdict(lk.AutoConstants())
    changed = {}
    for name, make in rules.VARIANTS.items():
        own = make()
        own.begin(1, 1)
        differing = {k: v for k, v in dataclasses.asdict(own.radius.constants).items() if v != default[k]}
        assert len(differing) == (name not in ("without the learning rate", "first radius 0.05")), name
        if name.split()[0] in default:
            changed.setdefault(name.split()[0], []).extend(differing.values())
    assert changed.keys() == default.keys()
    for name, (half, double, *_) in changed.items():
        size = (lambda value: 1 - value) if name.endswith("decay") else float
        assert (size(half), size(double)) == pytest.approx((size(default[name]) / 2, size(default[name]) * 2)), name


def test_tasks_are_those_that_the_docs_speak_of():
    assert len(tasks.TASKS) == 65 and len(tasks.FIRST) == 16 and len(tasks.DRAWN) == 39 and len(tasks.HARD) == 22
    assert {*tasks.HARD, *tasks.EIGHT, *tasks.FOUR} <= tasks.TASKS.keys()
    data = tasks.load(DIGITS, 0)
    right = tasks.load(tasks.Task("digits", 0.0, 1, 1, (), "sgd", 0.1), 0).train_targets
    assert (data.train_targets != right).sum() == round(0.4 * len(right))


def test_the_table_by_hand():
    accuracies = {
        "a": {"the rule": 90.0, "fixed 1": 91.0, "fixed 2": 80.0},
        "b": {"the rule": 70.0, "fixed 1": 60.0, "fixed 2": 69.5},
        "c": {"the rule": 50.0, "fixed 1": 54.0, "fixed 2": 55.0},
    }
    ours, first, second = table.rows(accuracies, ["fixed 1", "fixed 2"])
    assert ours == table.Row("the rule", 3, pytest.approx(-5.5 / 3), -1.0, -5.0, "c", 1)
    assert first == table.Row("fixed 1", 3, pytest.approx(-10.5 / 3), -1.0, -9.5, "b", 1)
    assert second == table.Row("fixed 2", 3, pytest.approx(-11.0 / 3), 0.0, -11.0, "a", 1)
    assert str(ours) == "| the rule | 3 | -1.83 | -1.00 | -5.0 | c | 1 |"
    accuracies["c"]["more"] = 50.0
    assert len(table.rows(accuracies, ["fixed 1", "fixed 2"])) == 3, "a rule that two tasks lack"


def test_what_is_finished_is_not_run_again_unless_its_settings_have_changed(tmp_path, monkeypatch):
    some = {"the rule": rules.Auto, **rules.REFERENCES}
    cases = [command.Case("p", name, DIGITS, some) for name in ("x", "y")]
    monkeypatch.setattr(command, "CASES", cases)
    monkeypatch.setattr(command, "SEEDS", SEEDS)
    path, quiet, ran = tmp_path / "r.json", Console(quiet=True), []
    real = command.Case.run
    monkeypatch.setattr(command.Case, "run", lambda self: ran.append(self.name) or real(self))
    command.run(cases[:1], path, quiet)
    found = command.run(cases, path, quiet)
    assert ran == ["x", "y"] and [entry["task"] for entry in found["cases"]] == ["x", "y"]
    assert found["cases"][0]["accuracy"] == found["cases"][1]["accuracy"] and found["cases"][0]["commit"]
    changed = [command.Case("p", "x", DIGITS, some, scale=10.0), cases[1]]
    command.run(changed, path, quiet)
    assert ran == ["x", "y", "x"]
    assert command.run(changed, path, quiet) == json.loads(path.read_text()) and len(ran) == 3
    text = table.markdown(json.loads(path.read_text()), [("one", "p", ("x",)), ("none", "q", ("x",))])
    assert "## one" in text and "none" not in text and text.count("| x |") == len(some)
