"""Draws docs/lets.png: one step of LETS on two weights, all of it computed. Run it after a change; no arguments."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor

from lets_kernels import SAM

LR, RHO, RADII = 0.12, 0.35, torch.linspace(0.0, 1.0, 81, dtype=torch.float64)
START = torch.tensor([-0.9, 1.25], dtype=torch.float64)
BLUE, ORANGE, GREY = "#2166ac", "#d6604d", "#555555"
PAPER = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 2}
BESIDE: dict[str, Any] = {"textcoords": "offset points", "fontsize": 10}


def training_loss(theta: Tensor) -> Tensor:
    """A bent valley."""
    x, y = theta[..., 0], theta[..., 1]
    return 1.5 * (y - 0.5 * x**2) ** 2 + 0.15 * (x - 1) ** 2


def validation_loss(theta: Tensor) -> Tensor:
    """The same valley for other data: beside it."""
    return training_loss(theta - torch.tensor([0.3, -0.25], dtype=theta.dtype))


def stepped(rho: float) -> tuple[Tensor, Tensor]:
    """θ + ε and θ' of one step of SAM from START."""
    theta = START.clone().requires_grad_()
    optimizer = SAM([theta], torch.optim.SGD, rho=rho, lr=LR)
    training_loss(theta).backward()
    with optimizer.perturbed():
        optimizer.zero_grad()
        training_loss(theta).backward()
        above = theta.detach().clone()
    optimizer.step()
    return above, theta.detach()


def gap(theta: Tensor) -> Tensor:
    """F."""
    return 0.5 * (validation_loss(theta) - training_loss(theta)) ** 2


def gradient(loss: object, theta: Tensor) -> Tensor:
    """Of a loss at θ."""
    theta = theta.clone().requires_grad_()
    return torch.autograd.grad(loss(theta), theta)[0]  # type: ignore[operator]


def slope() -> float:
    """∂F/∂ρ at RHO by the secant: −η w (ḡ_vl − ḡ_tr)·(ĝ − g)/ρ."""
    above, after = stepped(RHO)
    between = gradient(validation_loss, after) - gradient(training_loss, after)
    change = (gradient(training_loss, above) - gradient(training_loss, START)) / RHO
    weight = validation_loss(after) - training_loss(after)
    return float(-LR * weight * between.dot(change))


def draw_plane(axes: Axes) -> None:
    """θ, θ + ε and θ' for many ρ, over both losses."""
    x, y = torch.meshgrid(
        torch.linspace(-1.6, 0.3, 160, dtype=torch.float64),
        torch.linspace(0.2, 2.2, 160, dtype=torch.float64),
        indexing="xy",
    )
    grid, levels = torch.stack([x, y], -1), [0.1, 0.3, 0.6, 1.0, 1.5, 2.2, 3.2, 4.5]
    axes.contourf(x, y, training_loss(grid), levels=[0, *levels], cmap="Blues", extend="max", alpha=0.45)
    axes.contour(x, y, validation_loss(grid), levels=levels, colors=ORANGE, linewidths=0.8, linestyles="dashed")
    above, after = (torch.stack(points) for points in zip(*(stepped(float(rho)) for rho in RADII), strict=True))
    axes.plot(*above.T, color=GREY, lw=1)
    axes.plot(*after.T, color="black", lw=2.5)
    chosen = int((RADII - RHO).abs().argmin())
    for point, label, offset in (
        (START, "θ", (-20, 2)),
        (above[chosen], "1  θ + ε: up along g,\n    at distance ρ", (22, -20)),
        (after[chosen], "2  θ′(ρ): where the step along −ĝ\n    ends; on the line for other ρ", (22, -14)),
    ):
        axes.plot(*point, "o", color="black", ms=6)
        axes.annotate(label, point.tolist(), offset, **BESIDE, bbox=PAPER)
    axes.annotate("", after[chosen].tolist(), START.tolist(), arrowprops={"arrowstyle": "->", "lw": 1.5})
    axes.set_title("Training loss (blue), validation loss (dashed)", fontsize=11)
    axes.set_xlabel("one weight")
    axes.set_ylabel("another weight")


def draw_objective(axes: Axes) -> None:
    """F over ρ, and the slope that LETS sees."""
    objective = torch.stack([gap(stepped(float(rho))[1]) for rho in RADII])
    here, tangent = float(gap(stepped(RHO)[1])), slope()
    axes.plot(RADII, objective, color="black", lw=2)
    near = RADII[(RADII - RHO).abs() < 0.22]
    axes.plot(near, here + tangent * (near - RHO), color=ORANGE, lw=2)
    axes.plot(RHO, here, "o", color="black", ms=6)
    axes.annotate(
        "3  ∂F/∂ρ, from gradients that\n    the step has made", (RHO, here), (34, -32), **BESIDE, color=ORANGE
    )
    forward = -0.13 if tangent > 0 else 0.13
    low = float(objective.min())
    axes.annotate("", (RHO + forward, low), (RHO, low), arrowprops={"arrowstyle": "-|>", "color": BLUE, "lw": 2})
    axes.annotate("4  so ρ moves this way", (RHO, low), (8, -4), **BESIDE, color=BLUE)
    axes.set_title("F(ρ) = ½ (validation loss − training loss)² at θ′(ρ)", fontsize=11)
    axes.set_xlabel("ρ")


def main(path: Path) -> None:
    """Both panels, into a PNG file."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    draw_plane(left)
    draw_objective(right)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main(Path(__file__).with_name("lets.png"))
