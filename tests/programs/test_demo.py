"""The demo: its files, its table, its options, and the promise that its numbers follow from the seed."""

import importlib.util
import io
import json
import math
import multiprocessing
import re

import matplotlib.image
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import lets_kernels
from lets_kernels import SAM, AutoRadius, LearnedRadius, __version__, backends
from lets_kernels.demo import cli, processes, report
from lets_kernels.demo.data import TEST_SIZE, TRAIN_SIZE, batches, load, noisy_targets
from lets_kernels.demo.methods import ALL, METHODS, OTHERS, RADII, STARTS, Method, Settings
from lets_kernels.demo.model import small_cnn
from lets_kernels.demo.train import train
from lets_kernels.methods import catalogue
from lets_kernels.record import write_json
from support.inside import progress

TIMES = {"step_ms", "optimizer_ms"}


@pytest.fixture(autouse=True)
def one_thread():
    """As in the demo's own processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One short demo: (exit code, folder, results.json, what it printed)."""
    folder = tmp_path_factory.mktemp("demo") / "made" / "by the demo"
    options = ["--epochs", "1", "--seeds", "1", "--methods", "lets-sam", "sgd", "--rho", "0.5", "0.05"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", printed := io.StringIO())
        patch.setenv("COLUMNS", "80")
        code = cli.main([*options, "--backend", "reference", "--jobs", "2", "--output", str(folder)])
    return code, folder, json.loads((folder / "results.json").read_text()), printed.getvalue()


def test_writes_its_files_and_nothing_else(demo):
    code, folder, _, printed = demo
    assert code == 0
    assert {path.name for path in folder.iterdir()} == {"results.json", "radius.png"}
    image = matplotlib.image.imread(folder / "radius.png")
    assert 500 <= image.shape[0] <= 1500
    assert 800 <= image.shape[1] <= 2500
    for half in np.array_split(image[..., :3], 2, axis=1):
        assert half.std() > 0.05, "a panel is blank"
    assert all(name in "".join(printed.split()) for name in ("results.json", "radius.png"))


def test_json_says_what_was_run_and_on_what(demo):
    result = demo[2]
    assert (result["config"]["noise"], result["config"]["radii"]) == (0.4, [0.05, 0.5])
    assert (result["config"]["epochs"], result["config"]["seeds"], result["config"]["jobs"]) == (1, 1, 2)
    assert result["versions"]["lets_kernels"] == __version__
    assert result["versions"]["torch"] == torch.__version__
    assert "commit" in result["versions"]
    assert result["hardware"]["cpu"]
    assert result["backends"] == backends()
    assert result["date"].startswith("20")
    assert [(run["method"], run["rho"], run["seed"], run["backend"]) for run in result["runs"]] == [
        ("sgd", None, 0, None),
        ("lets-sam", 0.05, 0, "reference"),
        ("lets-sam", 0.5, 0, "reference"),
    ]


def test_json_has_a_record_for_each_epoch(demo):
    for run in demo[2]["runs"]:
        assert [record["epoch"] for record in run["epochs"]] == [0, 1]
        assert all(set(report.DEFINITIONS) <= set(record) for record in run["epochs"])
        last = run["epochs"][-1]
        assert last["gap"] == pytest.approx(last["noisy_test_loss"] - last["train_loss"])
        assert 0 < last["optimizer_ms"] < last["step_ms"]
        assert last["skipped_steps"] == 0
        assert [record["gradients"] for record in run["epochs"]] == [0, 20 if run["method"] == "sgd" else 80]
        first, last = (record["rho"] for record in run["epochs"])
        if run["method"] == "sgd":
            assert first is None and last is None
        else:
            assert first == pytest.approx(run["rho"])
            assert last != first


def test_same_numbers_from_the_same_seed_in_another_process(demo):
    for run in demo[2]["runs"]:
        again = train(run["method"], run["rho"], 0, Settings(epochs=1, backend="reference"))
        for record, epoch in zip(run["epochs"], again.epochs, strict=True):
            assert {k: v for k, v in record.items() if k not in TIMES} == {
                k: v for k, v in vars(epoch).items() if k not in TIMES
            }


def test_table(capsys):
    settings = Settings(epochs=1)
    planned = [("sam-auto", 0.005, 1), ("sam", 0.5, 1), ("sam", 0.05, 1), ("sgd", None, 0), ("sgd", None, 1)]
    runs = [train(*task, settings) for task in planned]
    rows = report.summarise(runs, settings)
    assert [(row.method, row.rho_start) for row in rows] == [
        ("sgd", None),
        ("sam", 0.05),
        ("sam", 0.5),
        ("sam-auto", 0.005),
    ]
    accuracies = [run.epochs[-1].test_accuracy for run in runs[3:]]
    assert rows[0].test_accuracy == pytest.approx(np.mean(accuracies))
    assert rows[0].test_accuracy_sd == pytest.approx(np.std(accuracies, ddof=1))
    assert rows[1].test_accuracy_sd is None
    assert [(row.seeds, row.gradients_per_step, row.gradients) for row in rows] == [(2, 1, 20)] + [(1, 2, 40)] * 3
    assert rows[3].rho_end == runs[0].epochs[-1].rho != 0.005

    from rich.console import Console

    Console(width=80).print(report.table(rows, settings, jobs=2))
    printed = capsys.readouterr().out
    lines = [re.split(r"  +", line.strip()) for line in printed.splitlines() if " / " in line][1:]
    for row, line in zip(rows, lines, strict=True):
        spread = "" if row.test_accuracy_sd is None else f" ± {100 * row.test_accuracy_sd:4.1f}"
        assert (
            " ".join(line).split()
            == (
                f"{row.label} {_radius(row.rho_start)} {_radius(row.rho_end)} {100 * row.test_accuracy:.1f}{spread} "
                f"{row.gradients_per_step:g} / {row.gradients:.0f} {row.step_ms:.2f} ({row.optimizer_ms:.2f})"
            ).split()
        )
    assert "…" not in printed, "a cell was cut off"


def _radius(rho):
    return "-" if rho is None else f"{rho:.3f}"


def _row(method, rho, accuracy, gradients):
    return report.Summary(
        method=method,
        label=ALL[method].label,
        seeds=1,
        gradients=100 * gradients,
        gradients_per_step=gradients,
        test_accuracy=accuracy,
        test_accuracy_sd=None,
        rho_start=rho,
        rho_end=rho,
        step_ms=1.0,
        optimizer_ms=None,
    )


def test_what_was_seen_is_said_of_each_method_that_ran_from_several_radii(demo):
    rows = [
        _row("sgd", None, 0.5, 1),
        _row("sam", 0.05, 0.81, 2),
        _row("sam", 0.1, 0.9, 2),
        _row("sam", 1.0, 0.104, 2),
        _row("lets-sam", 0.1, 0.7, 4),
        _row("lets-sam", 0.5, 0.7, 4),
        _row("rst", 0.05, 0.6, 1.5),
    ]
    assert report.findings(rows) == (
        "SAM ends between 10.4 % (from radius 1) and 90.0 % (from 0.1), at 2 gradients a step. "
        "LETS-SAM ends between 70.0 % (from radius 0.1) and 70.0 % (from 0.5), at 4 gradients a step. "
        "docs/radius.md says how each radius works, and which is for whom."
    )
    _, _, result, printed = demo
    rows = [report.Summary(**row) for row in result["summary"]]
    assert report.findings(rows).startswith("LETS-SAM ends between ")
    assert report.findings(rows) in " ".join(printed.split())


def test_ctrl_c_keeps_the_runs_that_ended_and_leaves_no_process(tmp_path, monkeypatch, capsys):
    (tmp_path / "results.json").write_text("an earlier result")
    wait, others = processes.wait, set(multiprocessing.active_children())

    def press_ctrl_c_after_the_first_run(pending, **kwargs):
        if len(pending) < 3:
            raise KeyboardInterrupt
        return wait(pending, **kwargs)

    monkeypatch.setattr(processes, "wait", press_ctrl_c_after_the_first_run)
    options = ["--epochs", "2", "--seeds", "3", "--methods", "sgd", "--jobs", "1", "--output", str(tmp_path)]
    assert cli.main(options) == 130
    assert str(tmp_path / "interrupted.json") in capsys.readouterr().err
    kept = json.loads((tmp_path / "interrupted.json").read_text())
    assert [run["method"] for run in kept["runs"]] == ["sgd"] * len(kept["runs"])
    assert 1 <= len(kept["runs"]) < 3
    assert (tmp_path / "results.json").read_text() == "an earlier result"
    assert set(multiprocessing.active_children()) <= others


@pytest.mark.parametrize("noise", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("seed", [0, 3])
def test_exactly_the_share_asked_for_is_wrong_and_only_in_training(noise, seed):
    images, labels = load_digits(return_X_y=True)
    truth = {(image / 16).astype(np.float32).tobytes(): label for image, label in zip(images, labels, strict=True)}
    data = load(seed, noise)

    def wrong(images, labels):
        return sum(truth[image.numpy().tobytes()] != int(label) for image, label in zip(images, labels, strict=True))

    assert (len(data.train_labels), len(data.test_labels)) == (TRAIN_SIZE, TEST_SIZE)
    assert wrong(data.train_images, data.train_labels) == round(noise * TRAIN_SIZE)
    assert wrong(data.test_images, data.test_labels) == 0
    assert data.train_labels.min() == 0
    assert data.train_labels.max() == 9


def test_wrong_labels_are_uniform_among_the_other_classes():
    counts = torch.zeros(10)
    for seed in range(5):
        clean, noisy = load(seed, 0.0), load(seed, 0.5)
        assert torch.equal(clean.train_images, noisy.train_images)
        counts += torch.bincount((noisy.train_labels - clean.train_labels) % 10, minlength=10)
    shifts = counts[1:]
    assert counts[0] == shifts.sum()  # half of them
    deviation = math.sqrt(float(shifts.sum()) / 9 * 8 / 9)
    assert (shifts - shifts.mean()).abs().max() < 4 * deviation


def test_noisy_targets_are_the_distribution_of_a_training_label():
    targets = noisy_targets(torch.tensor([3]), 0.45)[0]
    assert targets[3] == pytest.approx(0.55)
    assert targets[[0, 1, 2, 4, 5, 6, 7, 8, 9]].tolist() == pytest.approx([0.05] * 9)


def test_batches_go_through_the_data_in_an_order_of_the_seed():
    def one_round(seed):
        source = batches(torch.arange(10).view(10, 1), torch.arange(10), 4, seed)
        return [next(source)[1].tolist() for _ in range(3)]

    first = one_round(1)
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert sorted(label for batch in first for label in batch) == list(range(10))
    assert first == one_round(1) != one_round(2)


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("sgd", "bsam")])  # which is no SGD inside
def test_methods_differ_in_nothing_but_what_they_are_called(name):
    """What a learned radius, its optimizer and T are is the package's own default, but for the secant."""
    settings = Settings()
    optimizer = ALL[name].build(small_cnn().parameters(), settings, 0.07)
    assert {key: optimizer.param_groups[0][key] for key in settings.sgd} == settings.sgd
    assert isinstance(optimizer.base_optimizer, torch.optim.SGD)
    assert float(optimizer.rho) == pytest.approx(0.07)
    assert optimizer.param_groups[0]["adaptive"] == ("asam" in name)
    assert isinstance(optimizer.radius, LearnedRadius) == ("lets" in name)
    assert isinstance(optimizer.radius, AutoRadius) == ("auto" in name)
    if "lets" in name:
        preset = lets_kernels.LETSASAM if "asam" in name else lets_kernels.LETSSAM
        default = preset(small_cnn().parameters(), torch.optim.SGD, rho=0.07, lr=0.1)
        assert type(optimizer) is preset
        assert optimizer.radius.curvature == ("secant" if "secant" in name else default.radius.curvature)
        for part in ("metric", "direction", "validation", "interval", "reuse_train_gradient", "per_group"):
            assert getattr(optimizer.radius, part) == getattr(default.radius, part)
        assert type(optimizer.radius.optimizer) is type(default.radius.optimizer)
        assert optimizer.radius.optimizer.defaults == default.radius.optimizer.defaults
        assert getattr(optimizer.direction, "filterwise", None) == getattr(default.direction, "filterwise", None)
    if "auto" in name:
        assert optimizer.radius.constants == AutoRadius().constants and not optimizer.radius.per_group


def test_the_learning_rate_of_a_learned_radius_is_the_default_until_the_end(monkeypatch):
    rates = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    def build(params, settings, rho):
        return SAM(params, torch.optim.SGD, rho=LearnedRadius(rho, optimizer=Watched), **settings.sgd)

    monkeypatch.setitem(ALL, "watched", Method("watched", build))
    train("watched", 0.05, 0, Settings(epochs=2))
    assert rates == [1e-2] * 40


def test_the_demo_runs_its_radii_unless_told_otherwise(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("lets_kernels.demo.run.run_demo", lambda planned, *_: asked.append(planned))
    assert cli.main(["--output", str(tmp_path)]) == 0
    usual = [("sgd", None), *(("sam", rho) for rho in RADII)]
    usual += [(name, rho) for name in ("sam-auto", "lets-sam") for rho in STARTS]
    assert sorted(asked[0], key=str) == sorted(((*task, seed) for task in usual for seed in (0, 1)), key=str)
    assert [seed for *_, seed in asked[0]] == [0] * 14 + [1] * 14
    assert asked[0][0][0] == "lets-sam" and asked[0][-1][0] == "sgd"  # the longest first
    assert 0.2 in RADII and min(RADII) == 0.01 and max(RADII) == 1 and STARTS[0] == AutoRadius().rho

    options = ["--output", str(tmp_path), "--seeds", "1"]
    assert cli.main([*options, "--methods", "vasso", "asam-auto", "sgd", "gsam"]) == 0
    assert asked[1] == [("vasso", 0.05, 0), ("gsam", 0.05, 0), ("asam-auto", 0.5, 0), ("sgd", None, 0)]
    assert cli.main([*options, "--methods", "sgd", "asam", "--rho", "0.3", "0.1", "0.3"]) == 0
    assert asked[2] == [("asam", 0.1, 0), ("asam", 0.3, 0), ("sgd", None, 0)]
    assert not set(METHODS) & set(OTHERS) and list(ALL) == [*METHODS, *OTHERS]


def test_every_method_of_the_package_can_be_named(capsys, monkeypatch):
    kinds = {type(method.build(small_cnn().parameters(), Settings(), 0.05)) for method in ALL.values()}
    assert kinds == {torch.optim.SGD, *(x for x in vars(lets_kernels).values() if isinstance(x, type) and _is_sam(x))}
    monkeypatch.setenv("COLUMNS", "1000")  # or names are broken at their hyphens
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert all(re.search(rf"(?<![\w-]){name}[,\s]", text) for name in ALL)


def _is_sam(kind):
    return issubclass(kind, SAM)


@pytest.fixture(scope="module")
def usual():
    """What one epoch of the two usual methods ends with, and of ASAM."""
    usual = (("sgd", None), ("sam", 0.05), ("asam", 0.5))
    return {name: train(name, rho, 0, SHORT).epochs[-1].train_loss for name, rho in usual}


SHORT = Settings(epochs=1, noise=0.0)


@pytest.mark.parametrize("name", OTHERS)
def test_a_method_of_the_others_trains(name, usual):
    """It has learnt (chance is 10 %), is no SGD, SAM or ASAM, and its random numbers follow from the seed."""
    (rho,) = OTHERS[name].radii
    last = train(name, rho, 0, SHORT).epochs[-1]
    assert last.skipped_steps == 0 and last.test_accuracy > 0.3
    assert last.train_loss not in [loss for other, loss in usual.items() if other != name]
    opt = OTHERS[name].build(small_cnn().parameters(), SHORT, rho)
    assert (last.optimizer_ms is None) == opt.samples.per_sample and last.step_ms > 0
    if progress(opt).random.used:
        assert last.train_loss == train(name, rho, 0, SHORT).epochs[-1].train_loss


#: Gradients a step, as the pages of the methods have them; LookSAM's k is 5. The others are left to chance, or to the
#: gradient.
USUAL = {"1": 1, "1 + k": 3, "2": 2, "4": 4, "1 + 1/k": 1.2, "1 + f": 1.1, "1 + γ, and a forward pass": 2}
WORDS = {"sgd": "1", "asam-auto": "2", "sam-auto": "2", "lets-sam-secant": "4", "lets-asam-secant": "4"}
WORDS |= {method.key: method.rows[0].gradients for method in catalogue.methods()}


@pytest.mark.parametrize("name", ALL)
def test_gradients_in_the_table_are_calls_of_backward(name, monkeypatch):
    """Counted in torch; that of a part of the batch is one, too."""
    calls = []
    backward = torch.autograd.backward
    monkeypatch.setattr(
        torch.autograd, "backward", lambda *args, **kwargs: (calls.append(1), backward(*args, **kwargs))
    )
    (row,) = report.summarise([train(name, None if name == "sgd" else 0.05, 0, SHORT)], SHORT)
    assert row.gradients == len(calls) == 20 * row.gradients_per_step
    if WORDS[name] in ("1 + p", "1 to 2"):
        assert 20 < len(calls) < 40
    else:
        assert row.gradients_per_step == USUAL[WORDS[name]]


def test_others_are_told(capsys):
    from rich.console import Console

    planned = (("random-sam", 0.05), ("esam", 0.05), ("sam", 0.05), ("asam-auto", 0.5), ("looksam", 0.05))
    runs = [train(*task, 0, SHORT) for task in planned]
    result = report.document(runs, SHORT, jobs=1, seconds=1.0)
    assert [run["method"] for run in result["runs"]] == ["sam", "asam-auto", "esam", "looksam", "random-sam"]
    assert [row["gradients_per_step"] for row in result["summary"]] == [2, 2, 2, 1.2, 1]
    assert [row["optimizer_ms"] is None for row in result["summary"]] == [False, False, True, False, False]
    Console(width=80).print(report.table(report.summarise(runs, SHORT), SHORT, jobs=1))
    printed = capsys.readouterr().out
    assert re.search(r"LookSAM +0.050 +0.050 .* 1.2 / 24 ", printed)
    assert re.search(r"ESAM .*\(-\)", printed)
    assert "…" not in printed, "a cell was cut off"


def test_the_plot_shows_the_accuracies_and_the_radii_that_move(tmp_path, monkeypatch):
    from lets_kernels.demo import plots

    settings = Settings(epochs=2)
    planned = [("sam-auto", 0.005), ("sam-auto", 0.5), ("sam", 0.05), ("sam", 0.5), ("gsam", 0.05), ("sgd", None)]
    runs = [train(*task, seed, settings) for task in planned for seed in (0, 1)]
    figures = []
    monkeypatch.setattr(plots.plt, "close", figures.append)
    plots.write_plot(runs, settings, tmp_path / "x.png")
    left, right = figures[0].axes
    monkeypatch.undo()
    plots.plt.close(figures[0])

    def accuracies(name):
        """[radii, seeds] in per cent."""
        return [
            [100 * run.epochs[-1].test_accuracy for run in runs if (run.method, run.rho) == task]
            for task in planned
            if task[0] == name
        ]

    assert left.get_xscale() == right.get_yscale() == "log"
    line = next(line for line in left.lines if line.get_label() == "SGD")
    assert list(line.get_ydata()) == pytest.approx([np.mean(accuracies("sgd"))] * 2)
    drawn = {container.get_label(): container for container in left.containers}
    for name, rhos in (("sam", [0.05, 0.5]), ("sam-auto", [0.005, 0.5]), ("gsam", [0.05])):
        points, _, (bars,) = drawn.pop(ALL[name].label)
        assert list(points.get_xdata()) == rhos
        assert list(points.get_ydata()) == pytest.approx(np.mean(accuracies(name), 1))
        assert points.get_linestyle() == ("None" if name == "sam-auto" else "-")
        ends = [[low, high] for (_, low), (_, high) in bars.get_segments()]
        assert ends == [pytest.approx([min(seeds), max(seeds)]) for seeds in accuracies(name)]
    assert not drawn
    for line, rho in zip(right.lines, (0.005, 0.5), strict=True):
        radii = [[epoch.rho for epoch in run.epochs] for run in runs if (run.method, run.rho) == ("sam-auto", rho)]
        assert list(line.get_xdata()) == [0, 1, 2]
        assert list(line.get_ydata()) == pytest.approx(np.mean(radii, 0))
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["SGD", "SAM", 'SAM rho="auto"', "GSAM"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "0"], "argument --epochs: must be a whole number from 1, not '0'"),
        (["--seeds", "two"], "argument --seeds: must be a whole number from 1, not 'two'"),
        (["--jobs", "-1"], "argument --jobs: must be a whole number from 1, not '-1'"),
        (["--noise", "1.2"], "argument --noise: must be from 0 to 1, not '1.2'"),
        (["--noise", "nan"], "argument --noise: must be from 0 to 1, not 'nan'"),
        (["--rho", "0"], "argument --rho: must be more than 0, not '0'"),
        (["--rho", "0.1", "inf"], "argument --rho: must be more than 0, not 'inf'"),
        (["--methods", "adam"], "lets-asam-secant"),
        (["--methods", "sgd", "saf"], "looksam"),
        (["--backend", "tpu"], "reference"),
        (["--backend", "cuda"], "argument --backend: backend='cuda' does not run here"),
        (["--output", __file__], "argument --output"),
    ],
)
def test_bad_options_are_one_clear_line(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        cli.main(options)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not any(tmp_path.iterdir())


def test_missing_packages_are_named_with_the_way_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else object())
    assert cli.main(["--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "the demo needs scikit-learn: pip install 'lets_kernels[demo]'\n"


def test_json_has_null_where_a_number_is_not_finite(tmp_path):
    write_json(tmp_path / "x.json", {"losses": [1.5, math.nan], "deep": {"rho": math.inf}})
    assert json.loads((tmp_path / "x.json").read_text()) == {"losses": [1.5, None], "deep": {"rho": None}}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
