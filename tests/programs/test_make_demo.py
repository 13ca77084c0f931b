"""`make demo` before anything is installed: what it shows, what it would do, what it says first."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lets_kernels.demo import cli

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def clone(tmp_path):
    """As much of a checkout as make looks at, without .venv."""
    for name in (
        "Makefile",
        "requirements-demo.txt",
        "requirements-dev.txt",
        "requirements-docs.txt",
        "pyproject.toml",
        "docs/demo-options.txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def make(clone, *arguments):
    command = ["make", "-C", str(clone), "--no-print-directory", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_installs_nothing(clone, option):
    assert make(clone, "demo", f"ARGS={option}") == (ROOT / "docs" / "demo-options.txt").read_text()
    assert not (clone / ".venv").exists()


def test_the_options_shown_are_the_demo_s_own(monkeypatch, capsys):
    """But for the number of processes, which is that of this machine's cores."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["lets-kernels"])
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    shown = (ROOT / "docs" / "demo-options.txt").read_text()
    texts = [
        re.sub(r"side by side \(default: \d+\)", "", " ".join(t.split())) for t in (capsys.readouterr().out, shown)
    ]
    assert texts[0] == texts[1], "write what `COLUMNS=80 lets-kernels demo --help` prints into docs/demo-options.txt"


def test_the_demo_says_first_what_it_installs_and_installs_no_more(clone):
    planned = make(clone, "-n", "demo")
    said, _, done = planned.partition("-m venv .venv")
    assert "make demo installs" in said and "pip install" not in said
    installed = re.findall(r"-r (\S+)", done)
    assert installed == ["requirements-demo.txt"]
    packages = {line.split("==")[0] for line in (clone / installed[0]).read_text().splitlines() if "==" in line}
    # Some are for older Pythons only, and two numbers of one package are one.
    older = {"six"}
    assert f"the {len(packages - older)} packages" in said


def test_where_everything_is_installed_the_demo_adds_nothing(clone):
    (clone / ".venv").mkdir()
    (clone / ".venv" / ".ready").touch()
    assert "pip install" not in make(clone, "-n", "demo")
