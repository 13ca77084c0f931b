"""``python -m lets_kernels bench``: who is timed, what is refused, what it prints and writes, and how long it takes."""

import dataclasses
import io
import json
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from lets_kernels import __main__ as program
from lets_kernels.bench import cli, eager, growth, multiples, networks, own, report, run
from lets_kernels.bench import compare as comparing
from lets_kernels.bench.clock import LEAST_ROUNDS, Budget, in_turn, timings
from lets_kernels.bench.compare import TOLERANCES, compare, error
from lets_kernels.bench.contenders import ADAMW, COMPILED, CONTENDERS, DEFAULT, LOOP, SGD, Contender, installed
from lets_kernels.bench.oracle import Oracle
from lets_kernels.bench.run import Findings, Settings, expected, measure
from lets_kernels.bench.shapes import normal, numel, resnet18, resnet50, vit_b16

SHAPES = [(8, 5), (5,), (), (3, 4, 2)]
GROUPED = dataclasses.replace(SGD, groups=3)
MINE = """
import torch

def make():
    return torch.nn.Linear(4, 3), torch.ones(2, 4)

def shapes_only():
    return torch.nn.Linear(4, 3)

def frozen():
    return torch.nn.Linear(4, 3).requires_grad_(False)

def no_module():
    return 3

def broken():
    raise OSError("no weights here")

def other_batch():
    return torch.nn.Linear(4, 3), torch.ones(2, 5)

number = 3
"""


@pytest.fixture(autouse=True)
def few_rounds_on_one_thread(monkeypatch):
    monkeypatch.setattr(comparing, "SHORT", 0.0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    file = tmp_path_factory.mktemp("mine") / "mine.py"
    file.write_text(MINE)
    return file


class Time:
    """A clock that goes on when somebody works."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def settings(seconds=60.0, **options):
    module = own.Own(nn.Linear(2, 1), torch.ones(1, 2))  # or the stand-in network would train
    return Settings("tiny", SHAPES, torch.float32, 1, seconds, own=module, **options)


def contender(name, kind, **options):
    return Contender(name, lambda params, base, rho: kind(params, base, rho, **options), "for a test", 8)


# ---- validation


@pytest.mark.parametrize("base", [SGD, ADAMW, GROUPED], ids=lambda base: f"{base.name}-{base.groups}")
def test_the_oracle_steps_as_torch_does_in_float64(base):
    """Torch's own loops in float64, at θ + ε by the formula: the same but for the order of a handful of operations."""
    start, grads = normal(SHAPES, 0.02, 0), normal(SHAPES, 0.01, 1)
    oracle = Oracle(start, base, rho=0.3)
    theirs = [p.double().requires_grad_() for p in start]
    optimizer = base.kind(base.split(theirs), **base.options, foreach=False)
    for _ in range(3):
        total = sum(float(g.double().square().sum()) for g in grads) ** 0.5
        moved = [p.detach() + 0.3 * g.double() / total for p, g in zip(theirs, grads, strict=True)]
        assert error(oracle.perturbed(grads), moved) < 1e-13
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.double()
        optimizer.step()
        oracle.step(grads)
        assert error(oracle.theta, theirs) < 1e-13
    assert error(start, normal(SHAPES, 0.02, 0)) == 0.0


def test_every_group_has_its_own_learning_rate_and_weight_decay():
    params = normal([(2,)] * 7, 1.0, 0)
    groups, places = GROUPED.split(params), {id(p): i for i, p in enumerate(params)}
    assert [[places[id(p)] for p in group["params"]] for group in groups] == [[0, 3, 6], [1, 4], [2, 5]]
    assert [group["lr"] for group in groups] == pytest.approx([0.1, 0.1 * 5 / 6, 0.1 * 4 / 6])
    assert [group["weight_decay"] for group in groups] == pytest.approx([1e-4, 4e-4 / 3, 5e-4 / 3])
    assert len(GROUPED.split(params[:2])) == 2  # none is empty


def test_who_steps_all_groups_alike_is_not_timed():
    everyone = [c for c in CONTENDERS if c.name in growth.RACING]
    alike = Contender("alike", lambda params, base, rho: eager.Foreach(params, SGD, rho), "for a test", 8)
    found = compare([*everyone, alike], GROUPED, SHAPES, torch.float32, Budget(60), [], most=1)
    assert sorted(found.order) == sorted(growth.RACING)
    assert "steps elsewhere" in found.results["alike"].refused


@pytest.mark.parametrize("dtype", TOLERANCES, ids=report.name_of)
@pytest.mark.parametrize("base", [SGD, ADAMW], ids=lambda base: base.name)
@pytest.mark.filterwarnings("ignore::lets_kernels.PrecisionWarning")
def test_all_that_are_listed_step_as_the_oracle(base, dtype, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)  # what is compiled, without the minutes
    everyone = [*CONTENDERS, COMPILED]
    found = compare(everyone, base, SHAPES, dtype, Budget(60), [], most=1)
    present = [c.name for c in everyone if base.name in c.bases]
    assert list(found.results) == present
    assert {name: result.refused for name, result in found.results.items() if result.refused} == {}
    assert sorted(found.order) == sorted(present)
    assert all(result.error <= TOLERANCES[dtype] for result in found.results.values())


class SmallRadius(eager.Foreach):
    """Perturbs one per cent too little; the step after it is right."""

    def __init__(self, params, base, rho):
        super().__init__(params, base, 0.99 * rho)


class NotRestored(eager.Foreach):
    """Steps from θ + ε."""

    def second_step(self):
        self.base.step()


class NoMomentum(eager.Foreach):
    def second_step(self):
        super().second_step()
        self.base.state.clear()


class Late(eager.Foreach):
    """Right in the first two steps."""

    steps = 0

    def second_step(self):
        self.steps += 1
        super().second_step()
        if self.steps == 3:
            with torch.no_grad():
                self.params[1][2] *= 1.001


class NaN(eager.Foreach):
    def second_step(self):
        super().second_step()
        with torch.no_grad():
            self.params[0][0, 0] = float("nan")


def test_a_long_tensor_may_lose_what_a_float32_sum_loses():
    """n/16 roundings of 2⁻²⁴ in a sum of squares, half of it in its root, times 0.3 for ε."""

    def tolerance(shapes, dtype=torch.float32):
        return comparing.Comparison(SGD, shapes, dtype).tolerance

    assert tolerance([(512, 512, 3, 3), (7,)]) == 1e-5  # ResNet-50's longest
    assert tolerance([(25_600_000,), (7,)]) == pytest.approx(0.3 * 25.6e6 / 16 * 2**-24 / 2)
    assert tolerance([(25_600_000,)], torch.float64) == TOLERANCES[torch.float64]


@pytest.mark.parametrize("kind", [SmallRadius, NotRestored, NoMomentum, Late, NaN])
def test_who_steps_elsewhere_is_shown_as_wrong_and_not_timed(kind):
    contenders = [contender("right", eager.Foreach), contender("wrong", kind)]
    found = compare(contenders, SGD, SHAPES, torch.float32, Budget(60), [], most=1)
    assert found.order == ["right"]
    assert "wrong" not in found.seconds
    assert found.results["wrong"].error > TOLERANCES[torch.float32] >= found.results["right"].error
    (line,) = [line for line in report.comparison_text(found).splitlines() if line.startswith("wrong")]
    assert "steps elsewhere" in line and "not timed" in line


def test_who_does_not_run_says_why():
    def make(params, base, rho):
        raise TypeError("no such argument")

    contenders = [Contender("package", make, "for a test", None), contender("right", eager.Foreach)]
    found = compare(contenders, SGD, SHAPES, torch.float32, Budget(60), [], most=1)
    assert found.order == ["right"]
    assert "package: does not run here: TypeError: no such argument" in report.comparison_text(found)


def test_the_program_fails_if_this_package_is_wrong(mine, monkeypatch, capsys):
    wrong = [contender(DEFAULT, NotRestored), contender("right", eager.Foreach)]
    monkeypatch.setattr(cli, "installed", lambda full: (wrong, []))
    assert cli.main(["--model", f"{mine}:make", "--seconds", "3"]) == 1
    assert f"{DEFAULT} was not timed: steps elsewhere" in capsys.readouterr().out


def test_an_installed_package_takes_part(tmp_path, monkeypatch):
    everyone, missing = installed(full=False)
    assert LOOP in [c.name for c in everyone] and any("--full" in line for line in missing)
    (tmp_path / "pytorch_optimizer.py").write_text(
        "from lets_kernels.bench.eager import Foreach\n"
        "def SAM(params, base_optimizer, rho, **options):\n"
        "    return Foreach(params, lambda params: base_optimizer(params, **options), rho)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pytorch_optimizer", raising=False)
    everyone, missing = installed(full=True)
    assert missing == []
    package = next(c for c in everyone if c.name == "pytorch_optimizer")
    try:
        found = compare([package], ADAMW, SHAPES, torch.float32, Budget(60), [], most=1)
    finally:
        sys.modules.pop("pytorch_optimizer")
    assert found.order == ["pytorch_optimizer"]
    assert found.moved("pytorch_optimizer") is None
    assert "?" in report.comparison_text(found)


# ---- what a number is


def test_rounds_go_in_turn_and_only_whole_ones_count():
    time, calls = Time(), []

    def work(name, seconds):
        def run():
            calls.append(name)
            time.now += seconds
            if len(calls) == 6:
                raise KeyboardInterrupt

        return run

    seconds = {"a": [], "b": []}
    with pytest.raises(KeyboardInterrupt):
        in_turn({"a": work("a", 1.0), "b": work("b", 2.0)}, seconds, 10, clock=time)
    assert calls == ["a", "b", "a", "b", "a", "b"]
    found = timings(seconds, others=0.0)
    assert found["a"].seconds == (1.0, 1.0) and found["b"].seconds == (2.0, 2.0)
    assert found["b"].over(found["a"]) == 2.0
    assert timings({"a": [1.0], "b": []}, others=0.0) == {}


def test_bytes_are_those_of_the_lists_that_are_read_and_written():
    """Buffers: ‖g‖ 1, θ + ε 4 with the saved copy, ĝ's check 1, SGD 5 and AdamW 7."""
    found = compare(CONTENDERS, SGD, SHAPES, torch.float32, Budget(60), [], most=1)
    assert [found.buffers(c.name) for c in CONTENDERS] == [11, 17, 13, 9, 11, 10]
    assert found.moved(DEFAULT) == 11 * 4 * numel(SHAPES)
    found = compare(CONTENDERS, ADAMW, SHAPES, torch.float64, Budget(60), [], most=1)
    assert [found.buffers(c.name) for c in CONTENDERS] == [13, 19, 15, 11, 13, 12]
    assert found.moved(LOOP) == 19 * 8 * numel(SHAPES)


def test_the_models_are_those_of_their_papers():
    assert (len(resnet18()), numel(resnet18())) == (62, 11_689_512)
    assert (len(resnet50()), numel(resnet50())) == (161, 25_557_032)
    assert (len(vit_b16()), numel(vit_b16())) == (152, 86_567_656)


def timed(medians, others=0.0):
    """A comparison of the listed contenders in which each took so many seconds."""
    found = compare(CONTENDERS, SGD, SHAPES, torch.float32, Budget(60), [], most=1)
    found.seconds = {name: [medians.get(name, 1.0)] * LEAST_ROUNDS for name in found.seconds}
    found.others, found.threads = others, 10_000
    return found


def test_the_report_says_plainly_where_ours_is_not_the_fastest():
    copies = {"torch's copy_": 0.2, "a streamed copy": 0.1}  # 2 N in 0.1 s: 11 N at that rate take 0.55 s
    slow = timed({DEFAULT: 0.6, "foreach, swapped": 0.5, **copies})
    lines = " ".join(report.verdicts(slow))
    assert (
        "MISSED. lets_kernels takes 1.20 times as long as foreach, swapped. It moves 11 N, that moves 9 N, which"
        in lines
    )
    assert "would be 1.22 times" in lines and "The rest" not in lines
    assert "85% of a copy's bandwidth: met, 92%" in lines
    slower = " ".join(report.verdicts(timed({DEFAULT: 0.8, "foreach, swapped": 0.5, **copies})))
    assert "takes 1.60 times" in slower and "The rest: it reaches 69% of a copy's bandwidth, that 90%." in slower
    fast = timed({DEFAULT: 0.8, **copies})
    lines = " ".join(report.verdicts(fast))
    assert "best other code: met." in lines and "1.25 times as long as lets_kernels" in lines
    assert "MISSED, 69%" in lines
    host = " ".join(report.verdicts(timed({DEFAULT: 6.0, **copies})))
    assert "it is the host's work" in host and "MISSED, 9%" in host


def test_no_verdict_while_others_are_busy():
    found = timed({DEFAULT: 0.6}, others=0.5)
    assert found.disturbed
    lines = " ".join(report.verdicts(found))
    assert "met" not in lines and "MISSED" not in lines and lines.count("not judged") == 2
    assert "kept 0.5 cores busy. Too many for a verdict" in report.comparison_text(found)


# ---- the time


def test_the_budget_cuts_rounds():
    time = Time()
    budget = Budget(100.0, time)
    assert budget.rounds(1.0, share=0.5, most=30) == 30
    assert budget.rounds(1.0, share=0.5, most=1000) == 50
    time.now = 80.0
    assert budget.left() == 20.0 and budget.used() == 80.0
    assert budget.rounds(1.0, share=0.5, most=30) == 10
    assert budget.rounds(5.0, share=0.5, most=30) == LEAST_ROUNDS  # more than its share, but there is time
    assert budget.rounds(7.0, share=0.5, most=30) == 0
    time.now = 200.0
    assert budget.left() == 0.0 and budget.rounds(1e-3, 1.0, 30) == 0


def working(time, seconds):
    """A contender whose step takes so long on this clock."""

    class Working(eager.Foreach):
        def first_step(self):
            time.now += seconds
            super().first_step()

    return Working


@pytest.mark.parametrize("seconds", [1e-3, 0.1, 0.5, 1.5, 4.0, 12.0])
def test_two_minutes_are_kept_however_slow_a_step_is(seconds):
    """Three steps of validation and three rounds are the least for each of four; where they do not fit, it says so."""
    time, found = Time(), Findings()
    contenders = [contender(name, working(time, seconds)) for name in (DEFAULT, LOOP, "foreach", "other")]
    measure(settings(120.0), contenders, found, Budget(108.0, time))
    assert time.now <= 120.0
    first = found.comparisons[0]
    assert first.order[0] and all(len(first.seconds[name]) >= LEAST_ROUNDS for name in first.order)
    said = report.text(found, settings(120.0))
    if seconds <= 0.5:
        assert [len(one.order) for one in found.comparisons] == [4, 4]
        assert found.training[0].rows() and "left out" not in said
    else:
        assert "left out" in said
        everyone = [c.name for c in contenders]
        assert all(name in first.order or f"{name}: left out: it did not fit" in said for name in everyone)


def test_it_says_first_how_long_it_will_take():
    resnet = Settings("resnet50", resnet50(), torch.float32, 2, 120.0)
    quick, slow = (expected(resnet, 7, copy_rate=rate, draw=1e-8) for rate in (50e9, 10e9))
    assert 10.0 < quick < slow < 120.0
    assert expected(resnet, 7, copy_rate=1e8, draw=1e-8) == 120.0


# ---- the program


@pytest.fixture(scope="module")
def ran(mine, tmp_path_factory):
    """One whole run on four tensors: exit code, folder, what it printed."""
    folder = tmp_path_factory.mktemp("bench")
    options = ["--model", f"{mine}:make", "--seconds", "4", "--threads", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "ROUNDS", 5)
        patch.setattr(comparing, "SHORT", 0.0)
        patch.setattr("sys.stdout", printed := io.StringIO())
        code = program.main(["bench", *options, "--json", str(folder / "b.json"), "--png", str(folder / "b.png")])
    return code, folder, printed.getvalue()


def test_it_prints_what_it_did(ran):
    code, _, printed = ran
    assert code == 0
    said = " ".join(printed.split())
    for part in (
        "2 tensors, 15 weights, float32",
        "1 thread on ",
        "a stand-in, written here",
        "at most about 4 s",
        "SAM + SGD",
        "SAM + AdamW",
        "read the ratios",
        "torch's copy_ of as many elements",
        "on your module (15 weights)",
        "other processes kept",
    ):
        assert part in said, part
    assert all(name in said for name in (c.name for c in CONTENDERS))


def test_the_json_has_every_number_with_what_it_means(ran):
    found = json.loads((ran[1] / "b.json").read_text())
    assert found["what"] == "lets_kernels bench" and found["interrupted"] is False
    assert found["config"]["dtype"] == "float32" and found["config"]["threads"] == 1
    assert {"cpu", "torch", "commit", "date", "threads", "load_average"} <= set(found["environment"])
    assert [one["step"] for one in found["comparisons"]] == ["SAM + SGD", "SAM + AdamW"]
    for one in found["comparisons"]:
        assert {row["contender"] for row in one["contenders"]} == {c.name for c in installed(full=False)[0]}
        assert 1.0 in [row["times_fastest"] for row in one["contenders"]]  # over itself; another may be less, by rounds
        assert one["tolerance"] == 1e-5 and one["elements"] == 15 and one["tensors"] == 2
        for row in one["contenders"]:
            assert 0 <= row["error"] <= one["tolerance"] and row["refused"] is None
            assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] and row["rounds"] >= LEAST_ROUNDS
            if row["contender"] in {c.name for c in CONTENDERS}:
                assert row["bytes"] == 4 * 15 * row["buffers"] and row["share_of_copy"] > 0
    assert 0 < found["training"][0]["contenders"][0]["share_outside"] < 1
    named = {name for key in found["definitions"] for name in key.split(", ")}
    assert {"median_ms", "times_fastest", "share_of_copy", "extra_bytes", "error", "share_outside"} <= named


def test_the_picture_is_there(ran):
    image = pytest.importorskip("matplotlib.image").imread(ran[1] / "b.png")
    assert image.shape[0] >= 300 and image.shape[1] >= 1000
    assert image.std() > 0.05  # not blank


@pytest.fixture
def small(monkeypatch):
    """Growth over a handful of elements."""
    values = {"SIZES": (200, 400), "ELEMENTS": 64, "COUNTS": (1, 8), "TENSORS": 4}
    for name, value in {**values, "GROUPS": (1, 3), "GROUPED": 6, "EACH": 5}.items():
        monkeypatch.setattr(growth, name, value)


def test_full_draws_multiples_the_roofline_and_growth(small, tmp_path):
    pytest.importorskip("matplotlib")
    from lets_kernels.bench.plots import write_plot

    found, asked = Findings(), settings(full=True)
    measure(asked, [c for c in CONTENDERS if c.name in growth.RACING], found, Budget(600))
    assert [one.numel for one in found.growth.sizes] == [200, 400]
    assert [len(one.shapes) for one in found.growth.counts] == [1, 8]
    assert [(one.base.groups, len(one.shapes), one.numel) for one in found.growth.groups] == [(1, 6, 30), (3, 6, 30)]
    assert all(sorted(one.order) == sorted(growth.RACING) for one in found.growth.all)
    assert write_plot(found, asked, tmp_path / "full.png")
    assert (tmp_path / "full.png").stat().st_size > 10_000
    said = report.text(found, asked)
    for by in ("elements, in 4 tensors", "tensors, 6.4e-05 M elements", "param groups, over 6 tensors of 5 elements"):
        assert f"by {by}" in said
    assert "On your module (3 weights):" in said and "of two gradients" in said
    content = report.document(found, asked, {})
    assert {by: len(part) for by, part in content["growth"].items()} == {"elements": 2, "tensors": 2, "groups": 2}
    assert [one["groups"] for one in content["growth"]["groups"]] == [1, 3]
    (one,) = content["multiples"]
    assert one["refused"] == {} and one["note"] is None
    counted = {row["method"]: row["gradients"] for row in one["methods"]}
    assert counted == {
        "two gradients": 2,
        "SGD": 1,
        "SAM": 2,
        'SAM, rho="auto"': 2,
        "LETS-SAM": 4,
        "LETS-SAM, every tenth step": 2.2,
        'LETS-SAM, validation="next"': 2,
        "SAM, per-tensor loop": 2,
    }
    for row in one["methods"]:
        assert row["rounds"] >= LEAST_ROUNDS and row["times_two_gradients"] > 0
        assert row["times_sam"] == 1.0 or row["method"] != "SAM"
    assert not write_plot(Findings(), asked, tmp_path / "none.png")


def test_growth_says_what_has_no_room_and_what_no_time(small, monkeypatch):
    """Three contenders need 68 bytes a float32 element, four 80, one 44: by hand, what lies there at the peak."""
    monkeypatch.setattr(growth, "SIZES", (100, 200, 300, 1000))
    monkeypatch.setattr(growth, "free_bytes", lambda: 80 * 300 + 1000)
    found, left_out, time = growth.Growth(), [], Time()
    monkeypatch.setattr(growth, "COUNTS", ())
    growth.growth(torch.float32, Budget(60), found, left_out)
    assert [[r.refused for r in one.results.values()] for one in found.sizes] == [
        [""] * 4,
        [""] * 4,
        ["", "", "", growth.NO_ROOM],  # four need no more than what is free, but more than 0.9 of it
    ]
    assert "300 elements: foreach: left out: it did not fit into the free memory" in report.growth_text(
        "elements", found.sizes
    )
    (said,) = left_out
    assert said.startswith("Growth, 0.001 M elements in 4 tensors: left out: it needs 0.0 GiB")
    assert growth.that_fit(CONTENDERS[:4], 10**9, torch.float32, None) == (CONTENDERS[:4], 80 * 10**9)
    assert growth.that_fit(CONTENDERS[:4], 10**9, torch.float32, 10**9) == ([], 44 * 10**9)

    budget, late = Budget(10.0, time), []
    time.now = 10.0
    growth.growth(torch.float32, budget, growth.Growth(), late)
    assert late[-1].startswith("Growth, left out, as it did not fit into the time that was left: ")
    assert "30" not in late[-1] and "0.0003 M elements in 4 tensors" in late[-1]


def test_a_line_that_ends_early_says_where():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    from lets_kernels.bench import plots

    racing = [c for c in CONTENDERS if c.name in growth.RACING]
    part = [
        compare(who, SGD, growth.even(n, 2), torch.float32, Budget(60), [], most=1)
        for who, n in ((racing, 2000), (racing[:1], 4000))
    ]
    axes = pyplot.figure().subplots()
    plots._growth(axes, "elements", part)
    labels = axes.get_legend_handles_labels()[1]
    pyplot.close(axes.figure)
    assert sorted(labels) == sorted([DEFAULT, *(f"{c.name} (up to 2,000)" for c in racing[1:])])


# ---- multiples of two gradients


def network():
    """Its loss has a curvature, so that ε changes the step."""
    x, y = torch.ones(3, 2), torch.full((3, 2), 0.5)
    torch.manual_seed(0)
    return networks.Network(
        "tiny",
        nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 1)),
        lambda net: net(x).square().mean(),
        lambda net: net(y).square().mean(),
    )


def test_a_step_is_a_tenth_of_a_round_of_ten():
    found = multiples.Multiples("n", steps={"two gradients": 1, "SAM": 1, "tenth": 10})
    found.seconds = {"two gradients": [1.0, 2.0, 8.0], "SAM": [2.0, 2.0, 9.0], "tenth": [30.0, 20.0]}
    assert found.rounds == 2
    assert found.timings["tenth"].seconds == (3.0, 2.0)
    assert found.over("tenth", "two gradients") == 2.0 and found.over("tenth", "SAM") == 1.25
    assert found.over("SAM", "nobody") is None


@pytest.mark.parametrize("rho", [0.0, 0.97 * multiples.RHO])
def test_whose_first_step_is_not_the_loops_is_not_timed(rho, monkeypatch):
    wrong = multiples.Method("wrong", multiples._sam(lambda: rho), first=True)
    broken = multiples.Method("broken", lambda params, closure, validation: lambda: 1 / 0)
    monkeypatch.setattr(multiples, "METHODS", (*multiples.METHODS, wrong, broken))
    found = []
    multiples.multiples([network], Budget(60), found, most=3)
    assert set(found[0].refused) == {"wrong", "broken"}
    assert set(found[0].timings) == {m.name for m in multiples.METHODS} - {"wrong", "broken"}
    said = report.multiples_text(found[0])
    assert "wrong: steps elsewhere" in said and "broken: does not run here: ZeroDivisionError" in said


def test_a_loss_without_curvature_refuses_nobody():
    found, x = [], torch.arange(600.0).sin().view(3, 200)

    def linear(net):
        return net(x).mean()

    torch.manual_seed(0)
    net = networks.Network("linear", nn.Linear(200, 1), linear, linear)
    multiples.multiples([lambda: net], Budget(60), found, most=3)
    assert found[0].refused == {} and len(found[0].timings) == len(multiples.METHODS)


def test_multiples_that_do_not_fit_are_left_out():
    time, found = Time(), []

    def slow():
        made = network()

        def loss(net):
            time.now += 1.0
            return made.loss(net)

        return dataclasses.replace(made, loss=loss, validation=loss)

    multiples.multiples([slow, network], Budget(100.0, time), found)
    # 19 first gradients in 8 steps; in a round 17 steps, of about 40 s; four of these do not fit into 40 s
    assert time.now == 19.0
    assert found[0].note.startswith("left out") and not found[0].timings and found[1].timings
    assert "left out" in report.multiples_text(found[0])


def test_the_stand_ins_are_what_they_are_called():
    made = [make() for make in networks.networks(None)]
    assert [one.name.split(" (")[0].removeprefix("a stand-in: ") for one in made] == [
        "ResNet-18 of width 16",
        "a ViT of 4 layers of width 96",
        "a language model of 4 layers of width 96",
    ]
    for one, classes in zip(made, (10, 10, networks.WORDS), strict=True):
        losses = [loss(one.module).item() for loss in (one.loss, one.validation)]
        assert losses[0] != losses[1]
        assert all(0.5 < value / math.log(classes) < 2.0 for value in losses)  # about that of a guess, before training
    model, copies = made[2].module, lambda words: 100.0 * nn.functional.one_hot(words, networks.WORDS)
    assert made[2].loss(copies) > 90  # the word that is asked for is not the one that is shown
    words = torch.zeros(1, networks.LENGTH, dtype=torch.int64)
    later = words.clone()
    later[:, 40:] = 7
    with torch.no_grad():
        before, after = model(words), model(later)
    torch.testing.assert_close(before[:, :40], after[:, :40])  # sees no later word
    assert (before[:, 40:] - after[:, 40:]).abs().amin((0, 2)).max() > 0


def test_without_matplotlib_it_says_what_to_install(mine, tmp_path, monkeypatch, capsys):
    find = cli.importlib.util.find_spec
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    monkeypatch.setattr(cli, "installed", lambda full: ([contender("right", eager.Foreach)], []))
    assert cli.main(["--model", f"{mine}:shapes_only", "--seconds", "1e-3", "--png", str(tmp_path / "b.png")]) == 0
    printed = capsys.readouterr()
    assert "pip install 'lets_kernels[bench]'" in printed.err and "SAM + SGD" in printed.out
    assert not (tmp_path / "b.png").exists()


def test_an_interrupt_ends_it_with_what_there_is(mine, tmp_path, monkeypatch, capsys):
    steps = []

    class Interrupted(eager.Foreach):
        def first_step(self):
            steps.append(self.base)
            if isinstance(self.base, torch.optim.AdamW) and len(steps) > 20:
                raise KeyboardInterrupt
            super().first_step()

    monkeypatch.setattr(run, "ROUNDS", 20)
    monkeypatch.setattr(cli, "installed", lambda full: ([contender(DEFAULT, Interrupted)], []))
    file = tmp_path / "b.json"
    assert cli.main(["--model", f"{mine}:make", "--json", str(file)]) == 130
    assert "Interrupted" in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert found["interrupted"] is True
    assert found["comparisons"][0]["contenders"][0]["rounds"] == 20
    assert "median_ms" not in found["comparisons"][1]["contenders"][0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "resnet51"], "'resnet51' is none of resnet18, resnet50, vit_b_16, nor FILE.py:FUNCTION"),
        (["--model", "nowhere.py:make"], "there is no file 'nowhere.py'"),
        (["--model", "MINE:makes"], "has no function 'makes'"),
        (["--model", "MINE:number"], "has no function 'number'"),
        (["--model", "MINE:no_module"], "returns int; return a module, or (module, batch)"),
        (["--model", "MINE:frozen"], "has no parameters that require gradients"),
        (["--model", "MINE:broken"], "failed: OSError: no weights here"),
        (["--model", "MINE:other_batch"], "does not take its batch: RuntimeError"),
        (["--dtype", "float16"], "'float16' is none of float32, float64, bfloat16"),
        (["--threads", "0"], "must be a whole number from 1, not 0"),
        (["--seconds", "-1"], "must be more than 0, not -1"),
        (["--json", "no/such/folder/b.json"], "there is no folder"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_words(options, said, mine, capsys):
    with pytest.raises(SystemExit) as refused:
        cli.main([option.replace("MINE", str(mine)) for option in options])
    assert refused.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_file_that_does_not_run_is_refused(tmp_path):
    (tmp_path / "bad.py").write_text("import nothing_of_this_name")
    with pytest.raises(own.ModelError, match="does not run: ModuleNotFoundError"):
        own.load(f"{tmp_path}/bad.py:make")


def test_a_machine_that_would_swap_is_refused(mine, monkeypatch, capsys):
    monkeypatch.setattr(cli, "needed_bytes", lambda settings, contenders: 2**60)
    monkeypatch.setattr(cli, "measure", None)
    if not cli.Path("/proc/meminfo").exists():
        pytest.skip("only Linux says how much memory is free")
    assert cli.main(["--model", f"{mine}:make"]) == 1
    assert "take a smaller --model" in capsys.readouterr().err


def test_a_batch_is_a_tensor_arguments_or_keywords():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.full((2,), 3.0))

        def forward(self, x, y=1.0, wrap=lambda x: x):
            return wrap(self.weight * x * y)

    class Output:
        def __init__(self, x):
            self.loss = x.sum()

    x, net = torch.ones(2), Net()
    for batch, loss in (
        (x, 9.0),  # the mean of 3²
        ((x, 2.0), 36.0),
        ({"x": x, "wrap": Output}, 6.0),
        ({"x": x, "wrap": lambda x: {"loss": 2 * x.sum()}}, 12.0),
        ({"x": x, "wrap": lambda x: (x, 5)}, 9.0),
    ):
        assert own.Own(net, batch).loss(net).item() == loss
    with pytest.raises(own.ModelError, match="no tensor to take a loss of"):
        own.Own(net, {"x": x, "wrap": lambda x: 3}).loss(net)


def test_help_names_it(capsys):
    with pytest.raises(SystemExit):
        program.main(["--help"])
    assert "bench" in capsys.readouterr().out


def test_nothing_of_it_is_imported_before_it_is_asked_for():
    """Nor do its tables need matplotlib."""
    code = (
        "import sys, lets_kernels.__main__; assert not [m for m in sys.modules if m.startswith('lets_kernels.bench')]\n"
        "import lets_kernels.bench.cli; assert not {'matplotlib', 'rich', 'sklearn'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
