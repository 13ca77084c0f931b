"""Tables as the papers have them: a line for each method, a column for each recipe."""

from collections.abc import Mapping, Sequence
from statistics import fmean, median, stdev
from typing import Any

from lets_kernels.experiment.methods import label
from lets_kernels.experiment.recipes import Recipe
from lets_kernels.sharpness.report import aligned

#: The results of all seeds, by the name of the recipe and that of the method.
Results = Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]


def scores(runs: Sequence[Mapping[str, Any]]) -> list[float]:
    """Of the runs that have one; a network that gives NaN has none."""
    return [run["score"] for run in runs if run["score"] is not None]


def cell(runs: Sequence[Mapping[str, Any]]) -> str:
    """Mean ± sample standard deviation over the seeds, and how many they are."""
    found = scores(runs)
    if not found:
        return "–" if not runs else "failed"
    some = "" if len(found) == len(runs) else f", {len(runs) - len(found)} failed"
    if len(found) == 1:
        return f"{found[0]:.2f} (1 seed{some})"
    return f"{fmean(found):.2f} ± {stdev(found):.2f} ({len(found)} seeds{some})"


def table(results: Results, recipes: Sequence[Recipe], markdown: bool = False) -> str:
    """Of what there is; the best mean of each column is bold in Markdown, and starred on the screen.

    Of one recipe alone, with the time of an epoch of training, the median over epochs and seeds.
    """
    here = [recipe for recipe in recipes if any(name == recipe.name for name, _ in results)]
    labels = {method: label(method, here) for (_, method), runs in results.items() if runs}
    best = {}
    for recipe in here:
        means = {m: fmean(scores(runs)) for (name, m), runs in results.items() if name == recipe.name and scores(runs)}
        best[recipe.name] = max(means, key=means.__getitem__, default=None) if len(means) > 1 else None
    rows = [["method", *(recipe.name for recipe in here)]]
    for method, shown in labels.items():
        row = [shown]
        for recipe in here:
            said = cell(results.get((recipe.name, method), ()))
            if best[recipe.name] == method:
                said = f"**{said}**" if markdown else f"* {said}"
            row.append(said)
        rows.append(row)
    if len(here) == 1:
        rows[0].append("an epoch")
        for row, method in zip(rows[1:], labels, strict=True):
            times = [e["seconds"] for run in results.get((here[0].name, method), ()) for e in run["epochs"]]
            row.append(f"{median(times):.3g} s" if times else "–")
    if not markdown:
        return aligned([[*row, ""] for row in rows])
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def document(results: Results, recipes: Sequence[Recipe]) -> str:
    """A page of Markdown: the tables of each measure, what was run, on what, and what differs from the papers."""
    measures = dict.fromkeys(run["measure"] for runs in results.values() for run in runs)
    parts = ["# Experiments"]
    for measure in measures:
        own = {key: runs for key, runs in results.items() if any(run["measure"] == measure for run in runs)}
        parts += [f"## {measure[0].upper()}{measure[1:]}", table(own, recipes, markdown=True)]
    lines = []
    for recipe in recipes:
        runs = [run for (name, _), found in results.items() if name == recipe.name for run in found]
        if runs:
            commits = ", ".join(dict.fromkeys(run["environment"]["commit"] for run in runs))
            machines = ", ".join(dict.fromkeys(_machine(run["environment"]) for run in runs))
            differs = "; ".join(recipe.differs) or "nothing that we know of"
            settings = f"Settings: {recipe.source or 'ours'}. Differs from the paper: {differs}"
            trained = f"{recipe.network}, {_counted(recipe.epochs, 'epoch')}, on {machines}, commit {commits}"
            lines.append(f"- *{recipe.name}* ({recipe.shows}): {trained}. {settings}.")
    return "\n\n".join([*parts, "## What was run", "\n".join(lines)]) + "\n"


def _machine(environment: Mapping[str, Any]) -> str:
    on_cpu = f"{environment['cpu']}, {_counted(environment['threads'], 'thread')}"
    return str(environment.get("gpu") or on_cpu)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)
