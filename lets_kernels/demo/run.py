"""From options to results: trains, prints the table, writes the files."""

import sys
from contextlib import closing
from pathlib import Path
from time import perf_counter

from rich.console import Console

from lets_kernels.demo.methods import Settings, Task
from lets_kernels.demo.plots import write_plot
from lets_kernels.demo.processes import train_all
from lets_kernels.demo.report import document, findings, summarise, table
from lets_kernels.demo.train import Training
from lets_kernels.record import write_json

RESULT = "results.json"
PLOT = "radius.png"
INTERRUPTED = "interrupted.json"  # the trainings that had ended; complete results stay as they are


def run_demo(planned: list[Task], settings: Settings, jobs: int, output: Path) -> None:
    """Writes ``results.json`` and a plot into ``output``, over those of an earlier demo; prints the table.

    After Ctrl-C or a failure it writes the trainings that had ended to ``interrupted.json``; the exception goes on.
    """
    console = Console()
    started = perf_counter()
    trainings: list[Training] = []
    try:
        with closing(train_all(planned, settings, jobs, console)) as ended:
            trainings.extend(ended)
    except BaseException:
        where = "no training had ended, so nothing was written"
        if trainings:
            write_json(output / INTERRUPTED, document(trainings, settings, jobs, perf_counter() - started))
            where = f"the {len(trainings)} trainings that had ended are in {output / INTERRUPTED}"
        print(f"stopped: {where}", file=sys.stderr)
        raise
    write_json(output / RESULT, document(trainings, settings, jobs, perf_counter() - started))
    (output / INTERRUPTED).unlink(missing_ok=True)
    write_plot(trainings, settings, output / PLOT)
    summaries = summarise(trainings, settings)
    console.print(table(summaries, settings, jobs))
    console.print(findings(summaries), highlight=False)
    kernels = {training.backend for training in trainings} - {None}
    console.print(f"{perf_counter() - started:.0f} s, kernels: {', '.join(map(str, kernels)) or 'none'}. Written:")
    console.print(f"  {output / RESULT}", f"  {output / PLOT}", sep="\n")
