"""The demo: its files, its table, its options, and the promise that its numbers follow from the seed."""

import importlib.util
import json
import math
import multiprocessing
import re

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

import matplotlib.image
import numpy as np
from sklearn.datasets import load_digits

import lets_kernels
from lets_kernels import SAM, LearnedRadius, __version__, backends
from lets_kernels.demo import cli, processes, report
from lets_kernels.demo.data import TEST_SIZE, TRAIN_SIZE, batches, load, noisy_targets
from lets_kernels.demo.methods import ALL, METHODS, OTHERS, Settings
from lets_kernels.demo.model import small_cnn
from lets_kernels.demo.train import train

PLOTS = ("radius.png", "accuracy.png", "gap.png")
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
    """One short demo: (exit code, folder, results.json)."""
    folder = tmp_path_factory.mktemp("demo") / "made" / "by the demo"
    options = ["--epochs", "1", "--seeds", "1", "--methods", "lets-asam-secant", "sgd", "--backend", "reference"]
    code = cli.main([*options, "--jobs", "2", "--output", str(folder)])
    return code, folder, json.loads((folder / "results.json").read_text())


def test_writes_its_files_and_nothing_else(demo):
    code, folder, _ = demo
    assert code == 0
    assert {path.name for path in folder.iterdir()} == {"results.json", *PLOTS}
    for name in PLOTS:
        height, width, _ = matplotlib.image.imread(folder / name).shape
        assert 500 <= height <= 1500
        assert 800 <= width <= 2500
        assert matplotlib.image.imread(folder / name)[..., :3].std() > 0.05, f"{name} is blank"


def test_json_says_what_was_run_and_on_what(demo):
    _, _, result = demo
    assert result["config"]["noise"] == 0.4
    assert (result["config"]["epochs"], result["config"]["seeds"], result["config"]["jobs"]) == (1, 1, 2)
    assert result["versions"]["lets_kernels"] == __version__
    assert result["versions"]["torch"] == torch.__version__
    assert "commit" in result["versions"]
    assert result["hardware"]["cpu"]
    assert result["backends"] == backends()
    assert result["date"].startswith("20")
    assert {run["method"]: run["backend"] for run in result["runs"]} == {"sgd": None, "lets-asam-secant": "reference"}


def test_json_has_a_record_for_each_epoch(demo):
    _, _, result = demo
    for run in result["runs"]:
        assert [record["epoch"] for record in run["epochs"]] == [0, 1]
        assert all(set(report.DEFINITIONS) <= set(record) for record in run["epochs"])
        last = run["epochs"][-1]
        assert last["gap"] == pytest.approx(last["noisy_test_loss"] - last["train_loss"])
        assert 0 < last["optimizer_ms"] < last["step_ms"]
        assert last["skipped_steps"] == 0
    learned = next(run for run in result["runs"] if run["method"] == "lets-asam-secant")
    assert learned["epochs"][0]["rho"] == pytest.approx(0.5)
    assert learned["epochs"][1]["rho"] != learned["epochs"][0]["rho"]


def test_same_numbers_from_the_same_seed_in_another_process(demo):
    _, _, result = demo
    for run in result["runs"]:
        again = train(run["method"], 0, Settings(epochs=1, backend="reference"))
        for record, epoch in zip(run["epochs"], again.epochs, strict=True):
            assert {k: v for k, v in record.items() if k not in TIMES} == {
                k: v for k, v in vars(epoch).items() if k not in TIMES
            }


def test_table(demo, capsys):
    runs = [train(name, seed, Settings(epochs=1)) for name, seed in (("sam", 1), ("sgd", 0), ("sgd", 1))]
    rows = report.summarise(runs)
    assert [row.method for row in rows] == ["sgd", "sam"]
    accuracies = [run.epochs[-1].test_accuracy for run in runs[1:]]
    assert rows[0].test_accuracy == pytest.approx(np.mean(accuracies))
    assert rows[0].test_accuracy_sd == pytest.approx(np.std(accuracies, ddof=1))
    assert rows[1].test_accuracy_sd is None

    from rich.console import Console

    Console(width=80).print(report.table(rows, Settings(epochs=1), jobs=2))
    printed = capsys.readouterr().out
    assert f"{100 * rows[0].test_accuracy:.1f} ± " in printed
    assert "0.050" in printed
    assert "…" not in printed, "a cell was cut off"


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


@pytest.mark.parametrize("name", METHODS)
def test_methods_differ_in_nothing_but_what_they_are_called(name):
    settings = Settings(rho=0.07, asam_rho=0.3)
    optimizer = METHODS[name].build(small_cnn().parameters(), settings)
    assert {key: optimizer.param_groups[0][key] for key in settings.sgd} == settings.sgd
    assert METHODS[name].gradients == (1 if name == "sgd" else 4 if "lets" in name else 2)
    if isinstance(optimizer, SAM):
        assert float(optimizer.rho) == pytest.approx(0.3 if "asam" in name else 0.07)
        assert optimizer.param_groups[0]["adaptive"] == ("asam" in name)
        assert isinstance(optimizer.base_optimizer, torch.optim.SGD)
        assert not getattr(optimizer.direction, "filterwise", False)  # or 0.5 would mean two things
        assert isinstance(optimizer.radius, LearnedRadius) == ("lets" in name)
    if isinstance(getattr(optimizer, "radius", None), LearnedRadius):
        assert optimizer.radius.curvature == name.rpartition("-")[2]


def test_the_demo_runs_its_seven_methods_unless_told_otherwise(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("lets_kernels.demo.run.run_demo", lambda methods, *_: asked.append(methods))
    assert cli.main(["--output", str(tmp_path)]) == 0
    assert cli.main(["--output", str(tmp_path), "--methods", "vasso", "looksam", "sgd", "gsam"]) == 0
    usual = ["sgd", "sam", "lets-sam-diagonal", "lets-sam-secant", "asam", "lets-asam-diagonal", "lets-asam-secant"]
    assert asked == [usual, ["sgd", "looksam", "gsam", "vasso"]]
    assert list(METHODS) == usual and not set(METHODS) & set(OTHERS) and list(ALL) == [*METHODS, *OTHERS]


def test_every_method_of_the_package_can_be_named(capsys, monkeypatch):
    kinds = {type(method.build(small_cnn().parameters(), Settings())) for method in ALL.values()}
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
    """What one epoch of the two usual methods ends with."""
    return [train(name, 0, SHORT).epochs[-1].train_loss for name in ("sgd", "sam")]


SHORT = Settings(epochs=1, noise=0.0)
DRAW = ("rst", "r-sam", "r-gsam", "random-sam", "esam", "bsam")


@pytest.mark.parametrize("name", OTHERS)
def test_a_method_of_the_others_trains(name, usual):
    """It has learnt (chance is 10 %), is neither SGD nor SAM, and its random numbers follow from the seed."""
    last = train(name, 0, SHORT).epochs[-1]
    assert last.skipped_steps == 0 and last.test_accuracy > 0.3
    assert last.train_loss not in usual
    assert (last.optimizer_ms is None) == (name in ("esam", "delta-sam")) and last.step_ms > 0
    if name in DRAW:
        assert last.train_loss == train(name, 0, SHORT).epochs[-1].train_loss


@pytest.mark.parametrize("name", OTHERS)
def test_gradients_a_step_are_those_of_the_table(name):
    optimizer = OTHERS[name].build((model := small_cnn()).parameters(), Settings(epochs=1))
    images, labels = torch.rand(8, 1, 8, 8), torch.arange(8)
    calls = []

    def closure(subset=None):
        chosen = slice(None) if subset is None else subset
        optimizer.zero_grad()
        outputs = model(images[chosen])
        losses = torch.nn.functional.cross_entropy(outputs, labels[chosen], reduction="none")
        calls.append(len(losses) / 8 if torch.is_grad_enabled() else 0)
        if optimizer.samples.per_sample:
            return losses, outputs
        losses.mean().backward()
        return losses.mean()

    for _ in range(20):
        optimizer.step(closure)
    expected = 20 * OTHERS[name].gradients
    if name in ("rst", "ae-sam", "ae-looksam"):  # left to chance, or to the gradient
        assert 20 < sum(calls) < 40
    else:
        assert sum(calls) == expected


def test_others_are_drawn_and_told(tmp_path, capsys):
    from rich.console import Console

    from lets_kernels.demo.plots import write_plots

    runs = [train(name, 0, SHORT) for name in ("random-sam", "esam", "sam", "looksam")]
    result = report.document(runs, SHORT, seeds=1, jobs=1, seconds=1.0)
    assert [run["method"] for run in result["runs"]] == ["sam", "looksam", "random-sam", "esam"]
    assert [row["gradients_per_step"] for row in result["summary"]] == [2, 1.2, 1, 1.5]
    assert [row["optimizer_ms"] is None for row in result["summary"]] == [False, False, False, True]
    Console(width=80).print(report.table(report.summarise(runs), SHORT, jobs=1))
    assert "2 for SAM, 1.2 for LookSAM, 1 for Random SAM, 1.5 for ESAM." in " ".join(capsys.readouterr().out.split())
    write_plots(runs, SHORT, tmp_path)
    both = matplotlib.image.imread(tmp_path / "radius.png")
    write_plots(runs[2:3], SHORT, tmp_path)
    assert (both - matplotlib.image.imread(tmp_path / "radius.png")).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "0"], "argument --epochs: must be a whole number from 1, not '0'"),
        (["--seeds", "two"], "argument --seeds: must be a whole number from 1, not 'two'"),
        (["--jobs", "-1"], "argument --jobs: must be a whole number from 1, not '-1'"),
        (["--noise", "1.2"], "argument --noise: must be from 0 to 1, not '1.2'"),
        (["--noise", "nan"], "argument --noise: must be from 0 to 1, not 'nan'"),
        (["--rho", "0"], "argument --rho: must be more than 0, not '0'"),
        (["--asam-rho", "inf"], "argument --asam-rho: must be more than 0, not 'inf'"),
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
    report.write_json(tmp_path / "x.json", {"losses": [1.5, math.nan], "deep": {"rho": math.inf}})
    assert json.loads((tmp_path / "x.json").read_text()) == {"losses": [1.5, None], "deep": {"rho": None}}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
