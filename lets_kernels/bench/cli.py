"""``python -m lets_kernels bench``: the options, checked before anything is measured, and the way through it."""

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lets_kernels.bench import own, report
from lets_kernels.bench.clock import Budget, threads
from lets_kernels.bench.compare import TOLERANCES
from lets_kernels.bench.contenders import DEFAULT, installed
from lets_kernels.bench.memory import free_bytes
from lets_kernels.bench.run import Findings, Settings, expected, measure, needed_bytes, probe
from lets_kernels.bench.shapes import Shape, resnet18, resnet50, vit_b16
from lets_kernels.record import environment, write_json

MODELS: dict[str, Callable[[], list[Shape]]] = {"resnet18": resnet18, "resnet50": resnet50, "vit_b_16": vit_b16}
DTYPES = {report.name_of(dtype): dtype for dtype in TOLERANCES}
SECONDS, FULL_SECONDS = 120.0, 900.0
SPARE = 0.1  # of the time, for the start of Python and the last round


def main(argv: list[str] | None = None) -> int:
    """Runs it. Returns 0; 1 if this package itself stepped elsewhere than the oracle; 130 after Ctrl-C."""
    options, settings = _parse(argv)
    contenders, missing = installed(settings.full)
    try:
        _check_memory(settings, len(contenders))
    except MemoryError as error:
        print(error, file=sys.stderr)
        return 1
    found, budget = Findings(), Budget((1 - SPARE) * settings.seconds)
    with threads(settings.threads), _Line(settings.seconds) as line:
        about = environment()
        print(report.heading(settings, about))
        print(report.legend(contenders, missing))
        seconds = expected(settings, len(contenders), *probe())
        print(
            f"This takes about {seconds:.0f} s if nothing else runs, at most about {settings.seconds:.0f} s.\n",
            flush=True,
        )
        measure(settings, contenders, found, budget, line.say)
    print(report.text(found, settings))
    _write(options, settings, found, about)
    if found.interrupted:
        return 130
    return int(any(one.results[DEFAULT].refused != "" for one in found.comparisons if DEFAULT in one.results))


def _write(options: argparse.Namespace, settings: Settings, found: Findings, about: dict[str, object]) -> None:
    if options.json:
        write_json(options.json, report.document(found, settings, about))
        print(f"\nwritten: {options.json}")
    if options.png and importlib.util.find_spec("matplotlib") is None:
        print("\nno picture: --png needs matplotlib: pip install 'lets_kernels[bench]'", file=sys.stderr)
    elif options.png:
        from lets_kernels.bench.plots import write_plot

        if write_plot(found, settings, options.png):
            print(f"\nwritten: {options.png}")
        else:
            print(
                "\nno picture: nothing was timed. Give it more --seconds, a smaller --model or a quieter machine",
                file=sys.stderr,
            )


def _parse(argv: list[str] | None) -> tuple[argparse.Namespace, Settings]:
    parser = argparse.ArgumentParser(
        prog="lets-kernels bench",
        description="What a SAM step costs outside forward and backward: this package, the SAM that most code uses, "
        "the best of eager PyTorch, and installed packages. Each is validated first, then all are timed in turn. "
        "This is for CPUs; for GPUs there is 'make gpu-check' in the repository.",
    )
    models = f"whose parameters: {', '.join(MODELS)}, or FILE.py:FUNCTION, which returns a module or (module, batch)"
    parser.add_argument("--model", default="resnet50", metavar="NAME", help=f"{models} (default: resnet50)")
    parser.add_argument("--dtype", default="float32", metavar="DTYPE", help=f"{', '.join(DTYPES)} (default: float32)")
    count = torch.get_num_threads()
    parser.add_argument("--threads", type=int, default=count, help="default: torch's own, %(default)s")
    full = (
        "torch.compile'd code as well; how a step grows with elements, tensors and param groups; whole steps of SAM "
        "and LETS on three small networks (or yours, with a batch), as multiples of two gradients: a quarter of an hour"
    )
    parser.add_argument("--full", action="store_true", help=full)
    limit = f"at most about so long (default: {SECONDS:.0f}; with --full {FULL_SECONDS:.0f})"
    parser.add_argument("--seconds", type=float, help=limit)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured there")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw it there; needs matplotlib")
    options = parser.parse_args(argv)
    if options.dtype not in DTYPES:
        parser.error(f"argument --dtype: {options.dtype!r} is none of {', '.join(DTYPES)}")
    if options.threads < 1:
        parser.error(f"argument --threads: must be a whole number from 1, not {options.threads}")
    seconds = options.seconds if options.seconds is not None else FULL_SECONDS if options.full else SECONDS
    if not 0 < seconds < float("inf"):
        parser.error(f"argument --seconds: must be more than 0, not {seconds:g}")
    for file in (options.json, options.png):
        if file is not None and not file.absolute().parent.is_dir():
            parser.error(f"there is no folder {str(file.absolute().parent)!r} to write {file.name!r} into")
    users = None
    if options.model in MODELS:
        shapes = MODELS[options.model]()
    elif ":" in options.model:
        try:
            users = own.load(options.model)
        except own.ModelError as error:
            parser.error(f"argument --model: {error}")
        shapes = users.shapes
    else:
        parser.error(f"argument --model: {options.model!r} is none of {', '.join(MODELS)}, nor FILE.py:FUNCTION")
    return options, Settings(
        options.model, shapes, DTYPES[options.dtype], options.threads, seconds, options.full, users
    )


def _check_memory(settings: Settings, contenders: int) -> None:
    """Refuses what would make the machine swap, which is no measurement."""
    needed = needed_bytes(settings, contenders)
    free = free_bytes()
    if free is not None and needed > free:
        raise MemoryError(
            f"{settings.model} with {contenders} contenders side by side needs about {needed / 2**30:.1f} GiB of "
            f"memory, and {free / 2**30:.1f} GiB are free; take a smaller --model"
        )


class _Line:
    """What is going on, in one line that is written over; only where somebody sees it."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.start, self.shown = seconds, time.perf_counter(), sys.stderr.isatty()

    def __enter__(self) -> "_Line":
        return self

    def __exit__(self, *_: object) -> None:
        self._write("")

    def say(self, text: str) -> None:
        used = time.perf_counter() - self.start
        self._write(f"[{used:3.0f} s of {self.seconds:.0f}] {text}")

    def _write(self, text: str) -> None:
        if self.shown:
            width = os.get_terminal_size(sys.stderr.fileno()).columns
            print(f"\r\x1b[K{text[: width - 1]}", end="", file=sys.stderr, flush=True)
