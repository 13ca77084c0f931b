"""``python -m benchmarks.experiments``: the options, checked before anything is trained."""

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console

from benchmarks.experiments import campaign, data
from benchmarks.experiments.contenders import FAMILIES, chosen
from benchmarks.experiments.tasks import TASKS


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 1 where a run failed or its data is missing, 130 after Ctrl-C."""
    options = _parse(argv)
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        if options.command in ("run", "all"):
            failed = _run(options, console)
            if failed:
                print(f"{len(failed)} runs failed; the others are kept, and the same command goes on", file=sys.stderr)
                return 1
        if options.command in ("report", "all"):
            from benchmarks.experiments.report import write  # matplotlib, which a campaign does not need

            write(options.results, options.output, console)
    except data.MissingData as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


def _run(options: argparse.Namespace, console: Console) -> list[str]:
    if options.cifar:
        os.environ[data.CIFAR_VARIABLE] = str(options.cifar)  # for the workers too
    for name in options.tasks:
        TASKS[name].check()
    planned = campaign.runs(options.tasks, options.contenders, options.seeds)
    return campaign.campaign(planned, options.results, options.workers, console)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiments", description=(__doc__ or "").split(":")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for command, text in (
        ("run", "train whatever is not finished"),
        ("report", "tables and plots of the files that there are"),
        ("all", "both"),
    ):
        sub = commands.add_parser(command, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.add_argument("--results", type=Path, default=campaign.RESULTS, help="folder of the files, one a run")
        if command != "run":
            sub.add_argument(
                "--output", type=Path, default=None, help="folder of the report; default: that of the runs"
            )
        if command == "report":
            continue
        sub.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="NAME", help="of the tasks")
        names = f"families ({', '.join(FAMILIES)}) or members, such as sam@0.1"
        sub.add_argument("--contenders", nargs="+", default=list(FAMILIES), metavar="NAME", help=names)
        sub.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], metavar="N", help="one run each")
        sub.add_argument("--workers", type=int, default=1, metavar="N", help="processes, of one thread each")
        sub.add_argument("--cifar", type=Path, default=None, help=f"cifar10_jpeg.npz; also {data.CIFAR_VARIABLE}")
    options = parser.parse_args(argv)
    if options.command != "report":
        try:
            options.contenders = chosen(options.contenders)
        except ValueError as error:
            parser.error(str(error))
        if options.workers < 1:
            parser.error("--workers must be at least 1")
    if options.command != "run" and options.output is None:
        options.output = options.results
    return options
