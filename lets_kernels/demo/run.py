"""From options to results: trains, prints the table, writes the files."""

import sys
from contextlib import closing
from pathlib import Path
from time import perf_counter

from rich.console import Console

from lets_kernels.demo.methods import Settings, Task
from lets_kernels.demo.plots import write_plot
from lets_kernels.demo.processes import train_all
from lets_kernels.demo.report import document, findings, summarise, table, write_json
from lets_kernels.demo.train import Run

RESULT = "results.json"
PLOT = "radius.png"
INTERRUPTED = "interrupted.json"  # the runs that had ended; complete results stay as they are


def run_demo(planned: list[Task], settings: Settings, jobs: int, output: Path) -> None:
    """Writes ``results.json`` and a plot into ``output``, over those of an earlier demo; prints what they come to.

    Cut short by Ctrl-C or a failure, it writes the runs that had ended to ``interrupted.json``; the exception goes on.
    """
    console = Console()
    started = perf_counter()
    runs: list[Run] = []
    try:
        with closing(train_all(planned, settings, jobs, console)) as ended:
            runs.extend(ended)
    except BaseException:
        where = "no run had ended, so nothing was written"
        if runs:
            write_json(output / INTERRUPTED, document(runs, settings, jobs, perf_counter() - started))
            where = f"the {len(runs)} runs that had ended are in {output / INTERRUPTED}"
        print(f"stopped: {where}", file=sys.stderr)
        raise
    write_json(output / RESULT, document(runs, settings, jobs, perf_counter() - started))
    (output / INTERRUPTED).unlink(missing_ok=True)
    write_plot(runs, settings, output / PLOT)
    rows = summarise(runs, settings)
    console.print(table(rows, settings, jobs))
    console.print(findings(rows), highlight=False)
    kernels = {run.backend for run in runs} - {None}
    console.print(f"{perf_counter() - started:.0f} s, kernels: {', '.join(map(str, kernels)) or 'none'}. Written:")
    console.print(f"  {output / RESULT}", f"  {output / PLOT}", sep="\n")
