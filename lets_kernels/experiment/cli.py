"""``lets-kernels experiment``: the options, checked before anything is trained."""

import argparse
import importlib.util
import itertools
import sys
import tempfile
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lets_kernels.experiment import campaign, hours
from lets_kernels.experiment.data import KINDS, Source, needs, toy
from lets_kernels.experiment.methods import method
from lets_kernels.experiment.recipes import RECIPES, TABLES, Recipe
from lets_kernels.experiment.report import document, table
from lets_kernels.experiment.task import MissingData, Task
from lets_kernels.experiment.train import Options, Stopped
from lets_kernels.sharpness.report import aligned

Found = dict[tuple[str, str], list[dict[str, Any]]]


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 1 where data or a package is missing, 130 after Ctrl-C."""
    options = _parse(argv)
    if not options.names:
        print(_list())
        return 0
    recipes = [RECIPES[name] for name in options.recipes]
    if options.epochs is not None:
        recipes = [replace(recipe, epochs=options.epochs) for recipe in recipes]
    sources = {recipe.name: Source(options.data, options.checkpoint) for recipe in recipes if options.data}
    if options.toy:
        options.output /= "toy"  # never among real results
        pairs = [toy(recipe, options.output / "data") for recipe in recipes]
        recipes = [recipe for recipe, _ in pairs]
        sources = {recipe.name: source for recipe, source in pairs}
    planned = campaign.runs(recipes, options.methods, options.seeds)
    try:
        if options.plan:
            print(_plan(recipes, planned, options))
            return 0
        _run(recipes, planned, sources, options)
    except MissingData as error:
        print(error, file=sys.stderr)
        return 1
    except (KeyboardInterrupt, Stopped) as stopped:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130 if isinstance(stopped, KeyboardInterrupt) else 0
    return 0


def _run(
    recipes: Sequence[Recipe],
    planned: Sequence[campaign.Run],
    sources: Mapping[str, Source],
    options: argparse.Namespace,
) -> None:
    """Train what is left, then print the table, and write it and the figures."""

    def load(recipe: Recipe, seed: int) -> Task:
        return KINDS[recipe.data.kind].load(recipe, sources[recipe.name], seed)

    how = Options(
        device=options.device,
        amp=options.amp,
        start=options.checkpoint and options.checkpoint.resolve().name,
        workers=options.workers,
        evaluate=options.evaluate,
        go_on=_until(options.stop_after),
        tensorboard=options.tensorboard,
    )
    if not options.report:
        for _ in campaign.campaign(planned, load, options.output, how):
            pass
    found: Found = {}
    for run in planned:
        result = campaign.finished(run, options.output, how)
        if result is not None:
            found.setdefault((run.recipe.name, run.method), []).append(result)
    if not found:
        raise MissingData(
            f"no run of {', '.join(options.names)} with these settings has ended in {options.output}: give the --amp, "
            "--epochs, --seeds and --methods that it was trained with, and its --output"
        )
    measures = ", ".join(dict.fromkeys(run["measure"] for runs in found.values() for run in runs))
    print(f"\n{table(found, recipes)}\n\n{measures}; mean ± standard deviation over seeds; *: the best mean")
    if options.toy:
        print("A toy, to see that everything runs: these numbers say nothing about the methods.")
    print()
    _write(found, recipes, planned, load, options)


def _write(
    found: Found,
    recipes: Sequence[Recipe],
    planned: Sequence[campaign.Run],
    load: campaign.Load,
    options: argparse.Namespace,
) -> None:
    from lets_kernels.experiment import figures  # matplotlib

    page = options.output / f"{'-'.join(options.names)}.md"
    page.write_text(document(found, recipes), encoding="utf-8")
    written = [page]
    for recipe in recipes:
        if not any(name == recipe.name for name, _ in found):
            continue
        folder = options.output / recipe.name
        figures.draw_training(found, recipe, folder / "training.png")
        written.append(folder / "training.png")
        if figures.draw_starts(found, recipe, folder / "radii.png"):
            written.append(folder / "radii.png")
        first = [run for run in planned if run.recipe is recipe and run.seed == 0]
        if options.networks and figures.draw_networks(
            first, load(recipe, 0), options.output, options.device, folder / "networks.png"
        ):
            written.append(folder / "networks.png")
    print("\n".join(f"written: {path}" for path in written))


def _until(epochs: int | None) -> Callable[[], bool]:
    """True so many times, then False; None: always True."""
    left = itertools.count() if epochs is None else iter(range(epochs))
    return lambda: next(left, None) is not None


def _list() -> str:
    rows = [("recipe", "network", "data", "epochs", "runs", "in the paper")]
    for recipe in RECIPES.values():
        runs = str(len(recipe.methods) * recipe.seeds)
        rows.append((recipe.name, recipe.network, recipe.data.kind, str(recipe.epochs), runs, recipe.shows))
    tables = [
        textwrap.fill(
            " ".join(recipes),
            100,
            initial_indent=f"  {name:<18}",
            subsequent_indent=" " * 20,
            break_on_hyphens=False,
        )
        for name, recipes in TABLES.items()
    ]
    kinds = [f"  {kind:<13}{of.expects}" for kind, of in KINDS.items()]
    return "\n\n".join(
        [
            aligned(rows) + "\n(runs: methods times seeds)",
            "\n".join(["One name for all recipes of a paper's table:", *tables]),
            "\n".join(["What --data names:", *kinds]),
            "To begin:\n"
            "  lets-kernels experiment cifar10-small --toy                       two steps, no data, seconds\n"
            "  lets-kernels experiment cifar10-small --data cifar-10-batches-py  the smallest real one\n"
            "  lets-kernels experiment NAME --plan                               how long another would take",
        ]
    )


def _plan(recipes: Sequence[Recipe], planned: Sequence[campaign.Run], options: argparse.Namespace) -> str:
    """A command for each recipe, with the hours that it would take at the assumed speed."""
    lines, whole = [], 0.0
    asked = ["--data PATH"]
    if options.epochs is not None:
        asked.append(f"--epochs {options.epochs}")
    if options.seeds is not None:
        asked.append(f"--seeds {options.seeds}")
    if options.methods is not None:
        asked.append(f"--methods {' '.join(options.methods)}")
    with tempfile.TemporaryDirectory() as folder:
        for recipe in recipes:
            small, source = toy(recipe, Path(folder))
            per_gradient = hours.gradient(KINDS[recipe.data.kind].load(small, source, 0), recipe.data.tokens)
            own = hours.hours(recipe, planned, per_gradient, options.tflops)
            whole += own
            runs = sum(run.recipe is recipe for run in planned)
            pretrained = ["--checkpoint FOLDER"] if recipe.data.kind == "glue" else []
            lines.append(
                f"lets-kernels experiment {' '.join([recipe.name, *pretrained, *asked])} --amp --workers 8\n"
                f"    {runs} run{'s' * (runs != 1)}, {per_gradient / 1e9:.3g} GFLOP for a sample's gradient: "
                f"{_time(own)}"
            )
    lines += [
        f"\n{_time(whole)} in all on one GPU, one run after another, without testing. The arithmetic is counted;",
        f"the speed, {options.tflops:g} TFLOP/s, is assumed (--tflops), and nothing has been run on a GPU.",
        "PATH is " + "; or ".join(dict.fromkeys(KINDS[recipe.data.kind].expects for recipe in recipes)) + ".",
    ]
    return "\n".join(lines)


def _time(taken: float) -> str:
    """Hours, or minutes where they are less than one."""
    return f"{taken:.3g} hours" if taken >= 1 else f"{60 * taken:.2g} minutes"


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="lets-kernels experiment",
        description="Trains what the papers train, with their settings, on your data, and prints their tables. Without "
        "a name: the recipes. Each run has a folder of its own; stop it at any time, and the same command goes on.",
    )
    count, positive = _number(int, 1), _number(float, 1e-9)
    parser.add_argument("names", nargs="*", metavar="NAME", help="recipes, or tables of them")
    parser.add_argument(
        "--data", type=Path, metavar="PATH", help="where the data is; the list of recipes says what each expects"
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FOLDER", help="a pretrained network; GLUE's recipes need it"
    )
    parser.add_argument(
        "--methods", nargs="+", metavar="NAME", help="with a radius or without: base, auto, sam@0.1, lets-sam@0.05"
    )
    parser.add_argument("--seeds", type=count, metavar="N", help="runs of each, with the seeds 0, 1, ...")
    parser.add_argument("--epochs", type=count, metavar="N", help="in place of the recipe's")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/experiment"), metavar="FOLDER", help="default: %(default)s"
    )
    parser.add_argument("--device", type=_device, metavar="NAME", help="default: the first GPU, or else the CPU")
    parser.add_argument("--amp", action="store_true", help="passes under autocast to bfloat16")
    parser.add_argument(
        "--workers", type=_number(int, 0), default=0, metavar="N", help="processes that prepare batches (default: 0)"
    )
    parser.add_argument("--evaluate", type=count, default=1, metavar="N", help="test every so many epochs (default: 1)")
    parser.add_argument("--stop-after", type=count, metavar="N", help="end after so many epochs of this call")
    parser.add_argument("--tensorboard", action="store_true", help="write TensorBoard's files beside the results")
    parser.add_argument("--networks", action="store_true", help="draw the loss around the networks, and their spectra")
    parser.add_argument("--plan", action="store_true", help="do not train: the commands, and how long a GPU would take")
    parser.add_argument(
        "--tflops",
        type=positive,
        default=hours.SPEED,
        metavar="N",
        help="speed of the GPU, for --plan (default: %(default)g)",
    )
    parser.add_argument(
        "--report", action="store_true", help="do not train: tables and figures of the runs that have ended"
    )
    parser.add_argument("--toy", action="store_true", help="two steps of the real network on a few generated samples")
    options = parser.parse_args(argv)
    _check(parser, options)
    return options


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    for name in options.names:
        if name not in RECIPES and name not in TABLES:
            parser.error(f"no recipe or table {name!r}; lets-kernels experiment lists them")
    options.recipes = list(dict.fromkeys(one for name in options.names for one in TABLES.get(name, (name,))))
    for name in options.methods or ():
        try:
            method(name)
        except ValueError as error:
            parser.error(f"argument --methods: {error}")
    reads = not (options.plan or options.toy or (options.report and not options.networks))
    if options.names and options.data is None and reads:
        kinds = dict.fromkeys(RECIPES[name].data.kind for name in options.recipes)
        parser.error("--data PATH is missing: " + "; ".join(KINDS[kind].expects for kind in kinds))
    pretrained = [name for name in options.recipes if RECIPES[name].data.kind == "glue"]
    if pretrained and options.checkpoint is None and reads:
        parser.error(f"--checkpoint FOLDER is missing: {pretrained[0]} goes on from a pretrained network")
    if len({RECIPES[name].data.kind for name in options.recipes}) > 1 and options.data:
        parser.error("these recipes read different data: run them one by one")
    modules = {module for name in options.recipes for module in needs(RECIPES[name], options.data)}
    missing = sorted(module for module in modules if importlib.util.find_spec(module) is None)
    if missing:
        parser.error(f"this needs {', '.join(missing)}: pip install 'lets_kernels[experiment]'")
    if options.tensorboard and importlib.util.find_spec("tensorboard") is None:
        parser.error("--tensorboard needs a package that is not here: pip install tensorboard")
    if options.device is None:
        options.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _device(said: str) -> torch.device:
    """An argparse type: a device that is here."""
    try:
        return torch.empty(0, device=said).device
    except (RuntimeError, AssertionError) as error:  # no such name; torch was built without it
        raise argparse.ArgumentTypeError(f"no device {said!r} here: {str(error).splitlines()[0]}") from error


def _number(kind: type, least: float) -> Callable[[str], Any]:
    """An argparse type: a finite number from ``least``."""

    def parse(said: str) -> Any:
        try:
            value = kind(said)
        except ValueError:
            value = float("nan")
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be a number from {least:g}, not {said!r}")
        return value

    return parse
