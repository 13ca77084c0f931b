"""``lets-kernels experiment``: the options, checked before anything is trained."""

import argparse
import importlib.util
import itertools
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lets_kernels.experiment import campaign, hours
from lets_kernels.experiment.data import KINDS, Source, toy
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
        pairs = [toy(recipe, options.output / "toy-data") for recipe in recipes]
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
        result = campaign.finished(run, options.output, options.amp)
        if result is not None:
            found.setdefault((run.recipe.name, run.method), []).append(result)
    if not found:
        raise MissingData(f"no run of {', '.join(options.names)} has ended in {options.output}")
    print(f"\n{table(found, recipes)}\n")
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
    tables = [f"{name}: {' '.join(recipes)}" for name, recipes in TABLES.items()]
    kinds = [f"--data for {kind}: {of.expects}" for kind, of in KINDS.items()]
    how = "lets-kernels experiment NAME --data PATH runs a recipe, or all of a table; with --plan it says how long."
    return "\n\n".join([aligned(rows), *(["\n".join(tables)] if tables else []), "\n".join(kinds), how])


def _plan(recipes: Sequence[Recipe], planned: Sequence[campaign.Run], options: argparse.Namespace) -> str:
    """A command for each recipe, with the hours that it would take at the assumed speed."""
    lines, whole = [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        for recipe in recipes:
            small, source = toy(recipe, Path(folder))
            per_gradient = hours.gradient(KINDS[recipe.data.kind].load(small, source, 0), recipe.data.tokens)
            own = hours.hours(recipe, planned, per_gradient, options.tflops)
            whole += own
            runs = sum(run.recipe is recipe for run in planned)
            lines.append(
                f"lets-kernels experiment {recipe.name} --data PATH --amp --workers 8\n"
                f"    {runs} runs, {per_gradient / 1e9:.3g} GFLOP for a sample's gradient: {own:.3g} hours"
            )
    lines += [
        f"\n{whole:.3g} hours in all on one GPU. The arithmetic is counted; the speed, {options.tflops:g} TFLOP/s, is",
        "assumed (--tflops), and nothing has been run on a GPU. PATH is",
        *dict.fromkeys(KINDS[recipe.data.kind].expects for recipe in recipes),
    ]
    return "\n".join(lines)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="lets-kernels experiment",
        description="Trains what the papers train, with their settings, on your data, and prints their tables. Without "
        "a name: the recipes. Each run has a folder of its own; stop it at any time, and the same command goes on.",
    )
    count, positive = _number(int, 1), _number(float, 1e-9)
    parser.add_argument("names", nargs="*", metavar="NAME", help="recipes, or tables of them")
    parser.add_argument(
        "--data", type=Path, metavar="PATH", help="where the data is; without a name: what each expects"
    )
    parser.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="a pretrained network, for GLUE")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="such as base, sam@0.1, auto, lets-sam@0.05")
    parser.add_argument("--seeds", type=count, metavar="N", help="runs of each, with the seeds 0, 1, ...")
    parser.add_argument("--epochs", type=count, metavar="N", help="in place of the recipe's")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/experiment"), metavar="FOLDER", help="default: %(default)s"
    )
    parser.add_argument("--device", type=torch.device, metavar="NAME", help="default: the first GPU, or else the CPU")
    parser.add_argument("--amp", action="store_true", help="passes under autocast to bfloat16")
    parser.add_argument(
        "--workers", type=_number(int, 0), default=0, metavar="N", help="processes that prepare batches (default: 0)"
    )
    parser.add_argument("--evaluate", type=count, default=1, metavar="N", help="every so many epochs (default: 1)")
    parser.add_argument("--stop-after", type=count, metavar="N", help="end after so many epochs of this call")
    parser.add_argument("--tensorboard", action="store_true", help="write TensorBoard's files beside the results")
    parser.add_argument("--networks", action="store_true", help="draw the loss around the networks, and their spectra")
    parser.add_argument("--plan", action="store_true", help="do not train: print commands, and hours on a GPU")
    parser.add_argument("--tflops", type=positive, default=hours.SPEED, metavar="N", help="for --plan (%(default)s)")
    parser.add_argument("--report", action="store_true", help="do not train: tables and figures of what there is")
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
    if options.names and options.data is None and not (options.plan or options.toy):
        kinds = dict.fromkeys(RECIPES[name].data.kind for name in options.recipes)
        parser.error("--data PATH is missing: " + "; ".join(KINDS[kind].expects for kind in kinds))
    if len({RECIPES[name].data.kind for name in options.recipes}) > 1 and options.data:
        parser.error("these recipes read different data: run them one by one")
    needed = {"matplotlib": "matplotlib", **({"tensorboard": "tensorboard"} if options.tensorboard else {})}
    missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
    if options.names and missing:
        parser.error(f"this needs packages that are not here: pip install {' '.join(missing)}")
    if options.device is None:
        options.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
