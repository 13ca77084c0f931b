"""``make demo``, that is ``python -m lets_kernels demo``: the options, checked before anything is trained."""

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import lets_kernels
from lets_kernels.demo.methods import ALL, METHODS, Settings, tasks
from lets_kernels.demo.model import small_cnn

REQUIRED = {"matplotlib": "matplotlib", "rich": "rich", "sklearn": "scikit-learn"}  # module: package
DEFAULT = Settings()


def main(argv: list[str] | None = None) -> int:
    """Runs the demo with these options, by default the command line's. Returns the exit code: 130 after Ctrl-C."""
    options = _parse(argv)
    missing = [package for module, package in REQUIRED.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(f"the demo needs {', '.join(missing)}: pip install 'lets_kernels[demo]'", file=sys.stderr)
        return 1
    settings = Settings(
        epochs=options.epochs,
        seeds=options.seeds,
        noise=options.noise,
        radii=tuple(sorted(set(getattr(options, "rho", ())))),
        backend=options.backend,
    )
    chosen = getattr(options, "methods", METHODS)
    planned = tasks([name for name in ALL if name in chosen], settings)
    try:
        from lets_kernels.demo.run import run_demo  # imports the packages that were just looked for

        run_demo(planned, settings, min(options.jobs, len(planned)), options.output)
    except KeyboardInterrupt:
        return 130
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="lets-kernels demo",
        description="Trains a small CNN on 8x8 digits with wrong labels: SGD, and SAM with radii that are fixed, find "
        "themselves or are learned (LETS). Prints a table, and writes a JSON file and a plot.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    positive = _number(float, "more than 0", lambda value: 0 < value < float("inf"))
    count = _number(int, "a whole number from 1", lambda value: value >= 1)
    share = _number(float, "from 0 to 1", lambda value: 0 <= value <= 1)
    parser.add_argument("--epochs", type=count, default=DEFAULT.epochs, help="passes over the training set")
    parser.add_argument("--seeds", type=count, default=DEFAULT.seeds, help="trainings of each, with seeds 0, 1, ...")
    parser.add_argument("--noise", type=share, default=DEFAULT.noise, help="share of the training labels made wrong")
    names = f"any of {', '.join(ALL)} (default: the first {len(METHODS)})"
    parser.add_argument("--methods", nargs="+", choices=ALL, default=argparse.SUPPRESS, metavar="NAME", help=names)
    radii = "train every method from each of these radii (default: its own)"
    parser.add_argument("--rho", nargs="+", type=positive, default=argparse.SUPPRESS, metavar="RHO", help=radii)
    parser.add_argument("--backend", choices=("auto", *lets_kernels.backends()), default="auto", help="kernels to use")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder for the JSON file and the plot")
    parser.add_argument("--jobs", type=count, default=torch.get_num_threads(), help="processes side by side")
    options = parser.parse_args(argv)
    try:  # a backend that cannot run here says why
        METHODS["sam"].build(small_cnn().parameters(), Settings(backend=options.backend), 0.05)
    except (RuntimeError, ValueError) as error:
        parser.error(f"argument --backend: {error}")
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --output: {options.output} cannot be made a folder: {error.strerror}")
    return options


def _number(kind: type, allowed: str, check: Callable[[float], bool]) -> Callable[[str], float]:
    """An argparse type: a number of this kind for which ``check`` holds, or an error that says what is ``allowed``."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not check(value):
            raise argparse.ArgumentTypeError(f"must be {allowed}, not {text!r}")
        return value

    return parse
