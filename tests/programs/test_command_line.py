"""The command line itself; test_demo.py and test_bench.py have the commands that do something."""

import subprocess
import sys
from importlib.metadata import distributions

import pytest

import lets_kernels
from lets_kernels import __main__ as program


def test_the_console_script_is_the_module():
    # A build beside the sources leaves another description of the same distribution, perhaps an older one.
    found = {e.name: e for d in distributions(name="lets_kernels") for e in d.entry_points}
    assert found["lets-kernels"].load() is program.run


@pytest.mark.parametrize("arguments", [[], ["info"]], ids=["nothing", "info"])
def test_it_says_what_runs(arguments, capsys):
    assert program.main(arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"lets_kernels {lets_kernels.__version__}, torch ")
    assert all(f"  {name}" in out for name in lets_kernels.backends())


def test_version_and_help(capsys):
    for option, expected in (("--version", f"lets_kernels {lets_kernels.__version__}\n"), ("--help", "demo")):
        with pytest.raises(SystemExit) as ended:
            program.main([option])
        assert ended.value.code == 0 and expected in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["nonsense"], ["methods", "--all"], ["info", "more"]])
def test_what_it_does_not_know(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        program.main(arguments)
    assert ended.value.code == 2
    assert arguments[-1] in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error():
    """`lets-kernels methods | head -1`: the other end of the pipe is closed before the text is written."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lets_kernels", "methods"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 1 and errors == ""
