"""The examples run as they stand, and learn."""

import os
import re
import runpy
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported, which reads it

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LINES = {
    "accelerate_loop": r"loss (?P<loss>\S+), test accuracy (?P<accuracy>\S+)",
    "federated": r"FedSAM: test loss (?P<loss>\S+), test accuracy (?P<accuracy>\S+); "
    r"MoFedSAM: test loss \S+, test accuracy (?P<average>\S+)",
    "lightning_automatic": r"loss (?P<loss>\S+), test accuracy (?P<accuracy>\S+)",
    "lightning_lets": r"rho: 0\.05 -> (?P<rho>\S+), loss (?P<loss>\S+), test accuracy (?P<accuracy>\S+)",
    "plain_loop": r"loss (?P<loss>\S+), test accuracy (?P<accuracy>\S+), of the averaged weights (?P<average>\S+)",
    "trainer": r"test loss (?P<loss>\S+), test accuracy (?P<accuracy>\S+)",
}
#: These have tests of their own, test_federated_flower.py in another environment.
APART = {"federated_flower", "sampa_two_devices", "train_cifar"}


@pytest.fixture(autouse=True)
def alone():
    """Accelerate's state is one for the process."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def test_every_example_is_here_and_in_their_readme():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == set(LINES) | APART
    assert set(re.findall(r"^\| `(\w+)\.py` \|", (EXAMPLES / "README.md").read_text(), re.MULTILINE)) == names


@pytest.mark.parametrize("name", LINES)
def test_an_example_runs(name, capsys, monkeypatch, tmp_path):
    """A network that has learnt nothing is right on one digit in ten. What is written stays in the folder `runs`."""
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    last = capsys.readouterr().out.strip().splitlines()[-1]
    found = re.fullmatch(LINES[name], last)
    assert found, last
    values = {key: float(value) for key, value in found.groupdict().items()}
    assert values["accuracy"] > 0.85 and 0 < values["loss"] < 1
    assert values.get("average", 1) > 0.85 and values.get("rho") != 0.05
    assert {path.name for path in tmp_path.iterdir()} <= {"runs"}
    assert torch.is_grad_enabled()
