"""``python -m benchmarks.experiments.compare``: runs what is missing and writes the table; goes on where it was."""

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console

from benchmarks.common import ROOT
from benchmarks.experiments import data
from benchmarks.experiments.compare import report
from benchmarks.experiments.compare.rows import rows
from benchmarks.experiments.compare.runs import Results, campaign
from benchmarks.experiments.compare.tasks import TASKS
from benchmarks.experiments.compare.timing import times

FILE = Path(__file__).resolve().parent.parent / "results_compare.json"
PAGE = ROOT / "docs" / "comparison.md"


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 1 where a run failed or data is missing, 130 after Ctrl-C."""
    options, everyone = _parse(argv), rows()
    console = Console(width=None if sys.stdout.isatty() else 160)
    if options.cifar:
        os.environ[data.CIFAR_VARIABLE] = str(options.cifar)
    results, chosen = Results(options.results), [everyone[name] for name in options.rows]
    try:
        if not options.report:
            for name in options.tasks:
                TASKS[name].check()
            results.forget(TASKS.values(), everyone.values())
            if options.time or everyone.keys() - results.times.get("ratio", {}).keys():
                results.times = times(everyone)
                results.write()
            failed = campaign(results, [TASKS[name] for name in options.tasks], chosen, options.seeds, console)
            if failed:
                print(*failed, "the other runs are kept, and the same command goes on", sep="\n", file=sys.stderr)
                return 1
    except data.MissingData as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    new = report.section(results)
    options.page.write_text(report.replaced(options.page.read_text(), new))
    report.picture(results, options.page.with_suffix(".png"))
    console.print(f"written: {options.results}, {options.page}, {options.page.with_suffix('.png')}")
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.experiments.compare",
        description="Every method of the catalogue on the same tasks: gradients, time, accuracy.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    names = list(rows())
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="NAME", help="of the tasks")
    parser.add_argument("--rows", nargs="+", choices=names, default=names, metavar="NAME", help="as in docs/methods.md")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], metavar="N", help="one run each")
    parser.add_argument("--results", type=Path, default=FILE, help="the runs")
    parser.add_argument("--page", type=Path, default=PAGE, help="the document with the table; the picture lies beside")
    parser.add_argument("--cifar", type=Path, default=None, help=f"cifar10_jpeg.npz; also {data.CIFAR_VARIABLE}")
    parser.add_argument("--time", action="store_true", help="time all rows again")
    parser.add_argument("--report", action="store_true", help="write the table from the file, and run nothing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
