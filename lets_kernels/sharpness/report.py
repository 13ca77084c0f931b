"""The numbers of a model, as the command prints them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lets_kernels.sharpness.ball import along_gradient, in_ball, m_sharpness
from lets_kernels.sharpness.hessian import eigenvalues, trace
from lets_kernels.sharpness.objective import Objective


@dataclass(frozen=True)
class Settings:
    """What is measured, and how thoroughly.

    Attributes:
        rho: ρ of SAM's sharpness.
        adaptive_rho: ρ of ASAM's, in the space that T = |θ| + 0.01 scales.
        steps: steps of each ascent.
        starts: ascents from random points, beside the one from θ.
        products: at most so many products H v for the largest eigenvalue.
        samples: products H v for the trace.
        seed: of all random starts.
    """

    rho: float = 0.05
    adaptive_rho: float = 0.5
    steps: int = 10
    starts: int = 1
    products: int = 100
    samples: int = 30
    seed: int = 0


DEFINITIONS = {
    "loss": "mean loss on the data, at the weights",
    "along_gradient": "L(θ + ε) − L(θ) at SAM's perturbation, ε = ρ g/‖g‖",
    "in_ball": "max L(θ + ε) − L(θ) in ‖ε‖₂ ≤ ρ, by projected ascent: a lower bound",
    "m_sharpness": "the mean over the batches of each batch's own in_ball",
    "adaptive": "max L(θ + ε) − L(θ) in ASAM's ball ‖ε/(|θ| + 0.01)‖₂ ≤ adaptive_rho",
    "in_box": "max L(θ + ε) − L(θ) in ‖ε‖∞ ≤ ρ/√n for n weights: the largest box within SAM's ball",
    "lambda_max": "the largest eigenvalue of the Hessian",
    "lambda_max_error": "there is an eigenvalue within this distance of lambda_max",
    "trace": "the trace of the Hessian, estimated",
    "trace_error": "its standard error",
}


def measure(at: Objective, settings: Settings, batches: Objective | None = None) -> dict[str, float]:
    """Everything in :data:`DEFINITIONS`, by name; m-sharpness over other batches if they are given."""
    s = settings
    ascent: dict[str, Any] = {"steps": s.steps, "starts": s.starts, "seed": s.seed}
    along = along_gradient(at, s.rho)
    top = eigenvalues(at, steps=s.products, seed=s.seed)
    whole = trace(at, samples=s.samples, seed=s.seed)
    return {
        "loss": along.loss,
        "along_gradient": along.value,
        "in_ball": in_ball(at, s.rho, **ascent).value,
        "m_sharpness": m_sharpness(batches or at, s.rho, **ascent),
        "adaptive": in_ball(at, s.adaptive_rho, adaptive=True, **ascent).value,
        "in_box": in_ball(at, s.rho / math.sqrt(at.numel), p=math.inf, **ascent).value,
        "lambda_max": float(top.values[0]),
        "lambda_max_error": float(top.errors[0]),
        "trace": whole.value,
        "trace_error": whole.error,
    }


def text(found: Mapping[str, float]) -> str:
    """A line for each number, with what it is."""
    shown = []
    for name, what in DEFINITIONS.items():
        if not name.endswith("_error"):
            error = f" ± {found[f'{name}_error']:.2g}" if f"{name}_error" in found else ""
            shown.append((name, f"{found[name]:.4g}{error}", what))
    return aligned(shown)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of text: the first and the last to the left, those between to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        middle = [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *middle, row[-1]]).rstrip())
    return "\n".join(lines)


def document(
    what: str, config: Mapping[str, Any], about: Mapping[str, Any], found: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that was measured, ready for JSON."""
    return {"what": what, "config": dict(config), "environment": dict(about), "definitions": DEFINITIONS, **found}
