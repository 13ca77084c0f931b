"""Does a learned radius end flatter? The demo's networks, trained by SGD, SAM, rho="auto" and LETS, and measured."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lets_kernels.demo.data import Digits
from lets_kernels.demo.methods import ALL
from lets_kernels.demo.methods import Settings as Demo
from lets_kernels.demo.train import train
from lets_kernels.sharpness.hessian import Spectrum, spectrum
from lets_kernels.sharpness.landscape import Line, Plane, line, plane
from lets_kernels.sharpness.objective import Objective
from lets_kernels.sharpness.report import Settings, aligned, measure

#: By the demo's names, with their first radius. SAM has that of its paper, its double, and one that is too large here.
RUNS: tuple[tuple[str, float | None], ...] = (
    ("sgd", None),
    ("sam", 0.05),
    ("sam", 0.1),
    ("sam", 0.2),
    ("sam-auto", 0.005),
    ("lets-sam", 0.05),
    ("lets-sam-secant", 0.05),
)

#: Batches to compute in; m-sharpness has those of the training.
BATCH = 256

#: What the table shows of the training, and of the sharpness; heading: (entry, how to show it).
COLUMNS: dict[str, tuple[str, str]] = {
    "radius": ("rho_end", ".3f"),
    "accuracy, %": ("accuracy", ".1f"),
    "gap": ("gap", ".2f"),
    "train loss": ("loss", ".3f"),
    "along g": ("along_gradient", ".3f"),
    "in ball": ("in_ball", ".3f"),
    "m-sharp.": ("m_sharpness", ".3f"),
    "ASAM ball": ("adaptive", ".3f"),
    "in box": ("in_box", ".3f"),
    "λ_max": ("lambda_max", ".1f"),
    "trace": ("trace", ".0f"),
}


@dataclass(frozen=True)
class Pictures:
    """What is drawn of one network."""

    line: Line
    plane: Plane
    spectrum: Spectrum


def label(name: str, rho: float | None) -> str:
    """How a run is called in tables and pictures."""
    return ALL[name].label if rho is None else f"{ALL[name].label}, from {rho:g}"


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy of images and labels."""
    images, labels = batch
    return cross_entropy(model(images), labels)


def objective(model: nn.Module, data: Digits, size: int) -> Objective:
    """The training set, with its wrong labels, in batches of this size."""
    return Objective(model, loss, zip(data.train_images.split(size), data.train_labels.split(size), strict=True))


def compare(
    demo: Demo,
    settings: Settings,
    draw: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[list[dict[str, Any]], dict[str, Pictures]]:
    """Trains and measures each of :data:`RUNS` with each seed, on its training set, in evaluation mode.

    Returns:
        A record for each training, and with ``draw`` what the pictures of the first seed's networks need, by label.
    """
    records: list[dict[str, Any]] = []
    pictures: dict[str, Pictures] = {}
    for seed in range(demo.seeds):
        for name, rho in RUNS:
            called = label(name, rho)
            say(f"training {len(records) + 1} of {demo.seeds * len(RUNS)}: {called}, seed {seed}")
            record, drawn = _one(name, rho, seed, demo, settings, draw and seed == 0)
            records.append(record)
            pictures.update({called: drawn} if drawn else {})
    return records, pictures


def _one(
    name: str, rho: float | None, seed: int, demo: Demo, settings: Settings, draw: bool
) -> tuple[dict[str, Any], Pictures | None]:
    found: dict[str, float] = {}
    drawn: list[Pictures] = []

    def after(model: nn.Module, data: Digits) -> None:
        at = objective(model, data, BATCH)
        found.update(measure(at, settings, objective(model, data, demo.batch_size)))
        if draw:
            drawn.append(Pictures(line(at), plane(at), spectrum(at, runs=2, steps=50)))

    last = train(name, rho, seed, demo, trained=after).epochs[-1]
    of_training = {"accuracy": 100 * last.test_accuracy, "gap": last.gap, "rho_end": last.rho}
    return {"method": name, "rho": rho, "seed": seed, **of_training, **found}, drawn[0] if drawn else None


def table(records: Sequence[dict[str, Any]], markdown: bool = False) -> str:
    """A row for each method and first radius: mean ± sample deviation over the seeds."""
    rows = [["", *COLUMNS]]
    for name, rho in dict.fromkeys((record["method"], record["rho"]) for record in records):
        same = [record for record in records if (record["method"], record["rho"]) == (name, rho)]
        rows.append([label(name, rho), *(_cell([one[entry] for one in same], how) for entry, how in COLUMNS.values())])
    if not markdown:
        return aligned([[*row, ""] for row in rows])
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(values: list[float | None], how: str) -> str:
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "–"
    return f"{fmean(numbers):{how}}" + (f" ± {stdev(numbers):{how}}" if len(numbers) > 1 else "")
