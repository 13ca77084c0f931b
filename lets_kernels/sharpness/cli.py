"""``lets-kernels sharpness``: the options, checked before anything is measured, and the way through it."""

import argparse
import importlib.util
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from lets_kernels.bench.own import ModelError, called
from lets_kernels.record import environment, write_json
from lets_kernels.sharpness.hessian import spectrum
from lets_kernels.sharpness.landscape import line, plane
from lets_kernels.sharpness.objective import Objective
from lets_kernels.sharpness.report import Settings, document, measure, text

DEFAULT = Settings()


def main(argv: list[str] | None = None) -> int:
    """Runs it. Returns 0; 1 if a package is missing; 130 after Ctrl-C."""
    options = _parse(argv)
    missing = [name for name in ("matplotlib",) if options.png and importlib.util.find_spec(name) is None]
    if missing:
        print("--png needs matplotlib: pip install 'lets_kernels[sharpness]'", file=sys.stderr)
        return 1
    if options.at is None and importlib.util.find_spec("sklearn") is None:
        print("the demo's networks need scikit-learn: pip install 'lets_kernels[demo]'", file=sys.stderr)
        return 1
    settings = replace(
        DEFAULT,
        rho=options.rho,
        adaptive_rho=options.adaptive_rho,
        steps=options.steps,
        starts=options.starts,
        seed=options.seed,
    )
    try:
        return _demo(options, settings) if options.at is None else _own(options, settings)
    except KeyboardInterrupt:
        return 130


def _own(options: argparse.Namespace, settings: Settings) -> int:
    at: Objective = options.at
    about, start = environment(), time.perf_counter()
    found = measure(at, settings)
    print(f"{options.model}: {at.numel:,} weights, {len(list(at.each()))} batches, {time.perf_counter() - start:.0f} s")
    print(f"rho = {settings.rho:g}; adaptive_rho = {settings.adaptive_rho:g}\n")
    print(text(found))
    if options.png:
        from lets_kernels.sharpness.plots import draw_all

        name = Path(options.model.rpartition(":")[0]).stem
        draw_all({name: line(at)}, {name: plane(at)}, {name: spectrum(at)}, options.png)
    config = {**asdict(settings), "model": options.model, "weights": at.numel, "cost": dict(at.cost)}
    _write(options, document("lets_kernels sharpness", config, about, {"found": found}))
    return 0


def _demo(options: argparse.Namespace, settings: Settings) -> int:
    from lets_kernels.demo.methods import Settings as Demo
    from lets_kernels.sharpness import flatter

    demo = Demo(epochs=options.epochs, seeds=options.seeds)
    about, start = environment(), time.perf_counter()
    records, pictures = flatter.compare(demo, settings, bool(options.png), lambda said: print(said, file=sys.stderr))
    print(
        f"The demo's networks after {demo.epochs} epochs, {demo.noise:.0%} of the training labels wrong: mean ± sd "
        f"over {demo.seeds} seeds, {time.perf_counter() - start:.0f} s.\n"
        f"Sharpness on the training set, in evaluation mode: rho = {settings.rho:g}, in ASAM's ball "
        f"{settings.adaptive_rho:g}. Gap: test − train loss, labels as noisy.\n"
    )
    print(flatter.table(records))
    if options.png:
        from lets_kernels.sharpness.plots import draw_all

        draw_all(
            {name: one.line for name, one in pictures.items()},
            {name: one.plane for name, one in pictures.items()},
            {name: one.spectrum for name, one in pictures.items()},
            options.png,
        )
    found = {"table": flatter.table(records, markdown=True).splitlines(), "runs": records}
    config = {**asdict(settings), "demo": asdict(demo)}
    _write(options, document("lets_kernels sharpness: does a learned radius end flatter?", config, about, found))
    return 0


def _write(options: argparse.Namespace, found: dict[str, Any]) -> None:
    if options.json:
        write_json(options.json, found)
    for file in (options.json, options.png):
        if file:
            print(f"\nwritten: {file}")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="lets-kernels sharpness",
        description="How sharp a minimum is: how far the loss rises in the balls of SAM and ASAM, m-sharpness, the "
        "Hessian's largest eigenvalue and trace. Without --model the demo's networks are trained and compared.",
    )
    what = "a function in a file that returns (model, loss, loader), where loss(model, batch) is the mean of a batch"
    parser.add_argument("--model", metavar="FILE.py:FUNCTION", help=what)
    positive, count, natural = _number(float, 0.0, False), _number(int, 1), _number(int, 0)
    defaults = "(default: %(default)s)"
    parser.add_argument("--rho", type=positive, default=DEFAULT.rho, help=f"radius of SAM's ball {defaults}")
    rho = f"radius of ASAM's ball {defaults}"
    parser.add_argument("--adaptive-rho", type=positive, default=DEFAULT.adaptive_rho, help=rho)
    parser.add_argument("--steps", type=count, default=DEFAULT.steps, help=f"steps of each ascent {defaults}")
    starts = f"ascents from random points, beside the one from the weights {defaults}"
    parser.add_argument("--starts", type=natural, default=DEFAULT.starts, help=starts)
    parser.add_argument("--seed", type=natural, default=DEFAULT.seed, help=f"of the random points {defaults}")
    parser.add_argument("--batches", type=count, metavar="N", help="with --model: only so many batches of the loader")
    parser.add_argument("--train", action="store_true", help="with --model: in training mode, not in evaluation mode")
    parser.add_argument("--epochs", type=count, default=30, help=f"without --model: of each training {defaults}")
    parser.add_argument("--seeds", type=count, default=3, help=f"without --model: trainings of each {defaults}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured there")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw loss and spectrum there; needs matplotlib")
    options = parser.parse_args(argv)
    for file in (options.json, options.png):
        if file is not None and not file.absolute().parent.is_dir():
            parser.error(f"there is no folder {str(file.absolute().parent)!r} to write {file.name!r} into")
    options.at = None
    if options.model:
        try:
            options.at = _load(options.model, options.batches, options.train)
        except ModelError as error:
            parser.error(f"argument --model: {error}")
    return options


def _load(where: str, batches: int | None, train: bool) -> Objective:
    """The objective of what ``make()`` in a file returns.

    Raises:
        ModelError: no such file or function, it fails, it returns something else, or its loss cannot be measured.
    """
    made = called(where)
    if not (isinstance(made, tuple) and len(made) == 3 and isinstance(made[0], nn.Module) and callable(made[1])):
        raise ModelError(f"{where} must return (model, loss, loader), with loss(model, batch) the mean loss of a batch")
    model, loss, data = made
    if not isinstance(data, Iterable):
        raise ModelError(f"the third of what {where} returns is no loader or list of batches: {type(data).__name__}")
    try:
        at = Objective(model, loss, data, batches=batches, train=train)
        next(at.each())[0].gradient()
    except Exception as error:
        raise ModelError(f"what {where} returns cannot be measured: {type(error).__name__}: {error}") from error
    return at


def _number(kind: type, least: float, itself: bool = True) -> Any:
    """An argparse type: a finite number from ``least``, or above it."""

    def parse(said: str) -> Any:
        try:
            value = kind(said)
        except ValueError:
            value = float("nan")
        if not (least <= value < float("inf")) or (value == least and not itself):
            raise argparse.ArgumentTypeError(f"must be {'from' if itself else 'more than'} {least:g}, not {said!r}")
        return value

    return parse
