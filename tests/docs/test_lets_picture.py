"""docs/draw_lets.py draws, and the slope that it shows is that of the curve, as far as a secant can tell."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import torch

draw = SimpleNamespace(**runpy.run_path(str(Path(__file__).resolve().parents[2] / "docs" / "draw_lets.py")))


def test_the_slope_is_that_of_the_secant():
    """−η w (ḡ_vl − ḡ_tr)·(ĝ − g)/ρ, with ĝ read off the step, and w = L_vl − L_tr."""
    g, after = draw.gradient(draw.training_loss, draw.START), draw.stepped(draw.RHO)[1]
    change = (draw.START - after) / draw.LR - g
    between = draw.gradient(draw.validation_loss, after) - draw.gradient(draw.training_loss, after)
    expected = -draw.LR * (2 * draw.gap(after)).sqrt() * between.dot(change) / draw.RHO
    gap = draw.validation_loss(after) - draw.training_loss(after)
    # float64 throughout, but for ρ/|g|; differences of numbers near 1 lose three digits or so.
    assert torch.isclose(torch.tensor(draw.slope()).double(), expected * gap.sign(), rtol=1e-9)


def test_it_points_where_the_objective_does():
    low, high = (float(draw.gap(draw.stepped(draw.RHO + d)[1])) for d in (-1e-4, 1e-4))
    measured = (high - low) / 2e-4
    assert measured > 0 and 0.5 < draw.slope() / measured < 2


def test_it_is_drawn(tmp_path):
    draw.main(tmp_path / "lets.png")
    assert (tmp_path / "lets.png").read_bytes().startswith(b"\x89PNG")
