"""From options to results: trains, prints the table, writes the files."""

import sys
from contextlib import closing
from pathlib import Path
from time import perf_counter

from rich.console import Console

from lets_kernels.demo.methods import Settings
from lets_kernels.demo.plots import write_plots
from lets_kernels.demo.processes import train_all
from lets_kernels.demo.report import document, summarise, table, write_json
from lets_kernels.demo.train import Run

RESULT = "results.json"
INTERRUPTED = "interrupted.json"  # the runs that had ended; complete results stay as they are


def run_demo(methods: list[str], seeds: int, settings: Settings, jobs: int, output: Path) -> None:
    """Writes ``results.json`` and three plots into ``output``, over those of an earlier demo; prints the table.

    Cut short by Ctrl-C or a failure, it writes the runs that had ended to ``interrupted.json``; the exception goes on.
    """
    console = Console()
    started = perf_counter()
    runs: list[Run] = []
    try:
        with closing(train_all(methods, seeds, settings, jobs, console)) as ended:
            runs.extend(ended)
    except BaseException:
        where = "no run had ended, so nothing was written"
        if runs:
            write_json(output / INTERRUPTED, document(runs, settings, seeds, jobs, perf_counter() - started))
            where = f"the {len(runs)} runs that had ended are in {output / INTERRUPTED}"
        print(f"stopped: {where}", file=sys.stderr)
        raise
    write_json(output / RESULT, document(runs, settings, seeds, jobs, perf_counter() - started))
    (output / INTERRUPTED).unlink(missing_ok=True)
    plots = write_plots(runs, settings, output)
    console.print(table(summarise(runs), settings, jobs))
    kernels = {run.backend for run in runs} - {None}
    console.print(f"{perf_counter() - started:.0f} s, kernels: {', '.join(map(str, kernels)) or 'none'}. Written:")
    console.print(*(f"  {path}" for path in (output / RESULT, *plots)), sep="\n")
