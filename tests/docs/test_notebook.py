"""The notebook's code runs from top to bottom, and it is stored with what it shows."""

import json
import re
from pathlib import Path

import matplotlib
import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "first_steps.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


@pytest.fixture
def agg():
    """Plots without a screen."""
    from matplotlib import pyplot

    before = matplotlib.get_backend()
    pyplot.switch_backend("agg")
    yield pyplot
    pyplot.close("all")
    pyplot.switch_backend(before)


def test_its_cells_run_in_order(agg, capsys):
    sources = ["".join(cell["source"]) for cell in CODE]
    assert sum("epochs=40" in source for source in sources) == 1
    names = {"__name__": "notebook"}
    for number, source in enumerate(sources):
        exec(compile(source.replace("epochs=40", "epochs=3"), f"<cell {number}>", "exec"), names)
    found = re.findall(r"^(\S.*?) +(\d) gradients a step, +\S+ s, test accuracy (\S+)$", capsys.readouterr().out, re.M)
    assert [(name, int(gradients)) for name, gradients, _ in found] == [
        ("SGD", 1),
        ("SAM, rho=0.1", 2),
        ("SAM, rho='auto'", 2),
        ("LETS-SAM", 4),
    ]
    assert min(float(accuracy) for *_, accuracy in found) > 0.5  # guessing has 0.1
    assert names["runs"]["LETS-SAM"]["rho"][-1] != 0.05
    assert all(axes.lines for axes in agg.gcf().axes)


def test_it_shows_what_it_printed_and_plotted():
    shown = [output for cell in CODE for output in cell["outputs"]]
    assert [output["output_type"] for output in shown] == ["execute_result", "stream", "display_data"]
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    assert NOTEBOOK.stat().st_size < 100_000
    assert str(NOTEBOOK.parents[2]) not in NOTEBOOK.read_text()
