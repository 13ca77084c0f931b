"""`lets-kernels sharpness`: a user's file, the demo's networks, its table, files and refusals; and the pictures."""

import importlib.util
import json

import matplotlib.image
import pytest
import torch

from lets_kernels import __main__ as program
from lets_kernels.sharpness import Line, Plane, Spectrum, cli, eigenvalues, flatter, in_ball, plots
from lets_kernels.sharpness.report import DEFINITIONS, Settings, measure, text
from support.known_minima import small

FILE = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    loader = [(torch.randn(8, 3), torch.randn(8, 1)) for _ in range(2)]
    return model, lambda model, batch: (model(batch[0]) - batch[1]).square().mean(), loader

def two():
    return make()[:2]

def broken():
    model, loss, loader = make()
    return model, lambda model, batch: model(batch), loader

def number():
    return (*make()[:2], 3)
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def test_a_users_file(file, tmp_path, capsys):
    where = tmp_path / "found.json"
    picture = tmp_path / "found.png"
    arguments = ["sharpness", "--model", f"{file}:make", "--steps", "3", "--starts", "0", "--batches", "1"]
    assert program.main([*arguments, "--json", str(where), "--png", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "4 weights, 1 batches" in printed and all(name in printed for name in ("in_ball", "lambda_max", "trace"))
    written = json.loads(where.read_text())
    assert set(written["found"]) == set(DEFINITIONS) == set(written["definitions"])
    assert written["config"]["steps"] == 3 and written["environment"]["torch"] == torch.__version__
    at = cli._load(f"{file}:make", 1, False)
    assert written["found"]["in_ball"] == in_ball(at, 0.05, steps=3, starts=0).value
    assert written["found"]["lambda_max"] == pytest.approx(float(eigenvalues(at).values[0]))
    assert matplotlib.image.imread(picture)[..., :3].std() > 0.05


@pytest.mark.parametrize(
    "model, said",
    [
        ("nowhere.py:make", "no file"),
        ("{}:nothing", "no function"),
        ("{}:two", "(model, loss, loader)"),
        ("{}:number", "no loader"),
        ("{}:broken", "cannot be measured"),
    ],
)
def test_files_that_do_not_do(file, model, said, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--model", model.format(file)])
    assert ended.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--rho", "0"], "more than 0"),
        (["--steps", "none"], "from 1"),
        (["--starts", "-1"], "from 0"),
        (["--json", "/nowhere/x.json"], "no folder"),
    ],
)
def test_options_that_do_not_do(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("package, extra", [("matplotlib", "sharpness"), ("sklearn", "demo")])
def test_a_package_that_is_missing_is_named(package, extra, monkeypatch, tmp_path, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    assert cli.main(["--png", str(tmp_path / "x.png")]) == 1
    assert f"lets_kernels[{extra}]" in capsys.readouterr().err


def test_the_demos_networks(tmp_path, monkeypatch, capsys):
    """Two seeds of two short trainings; the table is their means."""
    quick = Settings(steps=1, starts=0, products=2, samples=2)
    monkeypatch.setattr(cli, "DEFAULT", quick)  # what there is no option for
    monkeypatch.setattr(flatter, "RUNS", flatter.RUNS[:2])
    where = tmp_path / "found.json"
    options = ["--epochs", "1", "--seeds", "2", "--steps", "1", "--starts", "0", "--json", str(where)]
    assert cli.main(options) == 0
    printed = capsys.readouterr().out
    written = json.loads(where.read_text())
    runs = written["runs"]
    assert [(r["method"], r["rho"], r["seed"]) for r in runs] == [
        ("sgd", None, 0), ("sam", 0.05, 0), ("sgd", None, 1), ("sam", 0.05, 1),
    ]  # fmt: skip
    mean = (runs[0]["in_ball"] + runs[2]["in_ball"]) / 2
    assert "SAM, from 0.05" in printed and f"{mean:.3f} ±" in printed
    assert written["table"][2].startswith("| SGD | – |") and f"| {mean:.3f} ±" in written["table"][2]


def test_pictures(tmp_path):
    """Each is drawn, not blank, and leaves the backend alone; a loss that is infinite leaves a hole."""
    places = [-1.0, 0.0, 1.0]
    planes = {"a": Plane(places, [[2.0, 1, 2], [1, 0.5, 1], [2, 1, float("inf")]]), "b": Plane(places, [[1.0] * 3] * 3)}
    lines = {"a": Line(places, [2.0, 0.5, 2.0]), "b": Line(places, [1.0, 1.0, 1.0])}
    nodes = torch.tensor([-1.0, 0.0, 9.0], dtype=torch.float64)
    spectra = {"a": Spectrum(nodes, torch.tensor([0.1, 0.8, 0.1], dtype=torch.float64), 3)}
    spectra["b"] = Spectrum(torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64), 1)
    records = [{"step": 0, "sharpness": 1.0, "gap": 0.1, "seconds": 1.0}, {"step": 5, "sharpness": 2.0, "gap": 0.3}]
    before = matplotlib.rcParams["backend"]
    for name, draw in {
        "lines": lambda path: plots.draw_lines(lines, path),
        "planes": lambda path: plots.draw_planes(planes, path),
        "surface": lambda path: plots.draw_surface(planes["a"], path),
        "spectra": lambda path: plots.draw_spectra(spectra, path),
        "records": lambda path: plots.draw_records({"a": records, "b": records[:1]}, path),
    }.items():
        figure = draw(tmp_path / f"{name}.png")
        assert figure.axes and matplotlib.image.imread(tmp_path / f"{name}.png")[..., :3].std() > 0.03, name
    assert matplotlib.rcParams["backend"] == before
    for nothing in (lambda: plots.draw_records({"a": []}), lambda: plots.draw_planes({})):
        with pytest.raises(ValueError, match="draw"):
            nothing()


def test_a_measurement_of_the_command_is_the_modules():
    _, at = small()
    found = measure(at, Settings(steps=2, starts=0, samples=2))
    assert found["loss"] == at.loss() and "±" in text(found)
