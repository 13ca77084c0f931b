"""``lets-kernels experiment``: the options, checked before anything is trained."""

import argparse
import importlib.util
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from lets_kernels.experiment import campaign
from lets_kernels.experiment.data import KINDS
from lets_kernels.experiment.methods import method
from lets_kernels.experiment.recipes import RECIPES
from lets_kernels.experiment.task import MissingData
from lets_kernels.experiment.train import Options, Stopped


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 1 where data or a package is missing, 130 after Ctrl-C."""
    options = _parse(argv)
    recipes = [RECIPES[name] for name in options.recipes]
    try:
        planned = campaign.runs(recipes, options.methods, options.seeds)
        how = Options(
            device=options.device,
            amp=options.amp,
            workers=options.workers,
            go_on=_until(options.stop_after),
            tensorboard=options.tensorboard,
        )
        load: campaign.Load = lambda recipe, seed: KINDS[recipe.data.kind].load(recipe, options.data, seed)  # noqa: E731
        for found in campaign.campaign(planned, load, options.output, how):
            print(f"{found['label']}: {found['measure']} {found['score']}")
    except Stopped:
        print("stopped; the same command goes on", file=sys.stderr)
    except MissingData as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


def _until(epochs: int | None) -> Callable[[], bool]:
    """True so many times, then False; None: always True."""
    left = itertools.count() if epochs is None else iter(range(epochs))
    return lambda: next(left, None) is not None


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lets-kernels experiment", description="The papers' experiments.")
    parser.add_argument("recipes", nargs="+", choices=RECIPES, metavar="NAME", help="of a recipe")
    parser.add_argument("--data", type=Path, required=True, metavar="PATH", help="where the data is")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="such as sgd, sam@0.1, auto, lets-sam@0.05")
    parser.add_argument("--seeds", type=int, metavar="N", help="runs of each, with seeds 0, 1, ...")
    parser.add_argument("--output", type=Path, default=Path("runs/experiment"), metavar="FOLDER", help="of the results")
    parser.add_argument("--device", type=torch.device, default=None, help="default: the first GPU, or the CPU")
    parser.add_argument("--amp", action="store_true", help="passes under autocast to bfloat16")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that prepare batches")
    parser.add_argument("--stop-after", type=int, metavar="EPOCHS", help="end after so many; the same command goes on")
    parser.add_argument("--tensorboard", action="store_true", help="write TensorBoard's files beside the results")
    options = parser.parse_args(argv)
    if options.device is None:
        options.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in options.methods or ():
        try:
            method(name)
        except ValueError as error:
            parser.error(f"argument --methods: {error}")
    if options.tensorboard and importlib.util.find_spec("tensorboard") is None:
        parser.error("--tensorboard needs a package that is not here: pip install tensorboard")
    return options
