"""What a new user does in the first hour, as far as it takes seconds; `make first-hour` does all of it."""

import pytest

from lets_kernels import __main__ as program
from support import own_script

#: What an error has to name: the way out.
WAYS_OUT = {
    "misspelt": "did you mean rho?",
    "no_rate": "build it on the same ones, or give its class",
    "second_first": "call first_step() after the first backward",
    "first_twice": "call second_step() after the second backward first, or restore()",
    "perturbed_state": "call second_step() after the second backward first, or restore()",
    "other_method": "Build the optimizer with the arguments of the one that was saved",
    "negative": "must be a finite number >= 0, not -1.0",
}


def test_an_own_script_trains_through_a_checkpoint():
    losses, rho = own_script.trained()
    assert len(losses) == 60 and sum(losses[-5:]) < 0.6 * sum(losses[:5]) and 0 < rho < 1


@pytest.mark.parametrize("mistake", own_script.MISTAKES, ids=lambda f: f.__name__)
def test_a_mistake_ends_in_the_way_out(mistake):
    assert WAYS_OUT[mistake.__name__] in own_script.said(mistake)


@pytest.mark.parametrize("command", ["", "info", "methods", "demo", "bench", "experiment", "sharpness"])
def test_every_command_says_what_it_does(command, monkeypatch, capsys):
    """Within the width of a terminal."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        program.main([*filter(None, [command]), "--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and said.startswith(f"usage: lets-kernels {command}".rstrip())
    assert all(len(line) <= 80 for line in said.splitlines())
