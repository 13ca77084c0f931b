"""What the files come to: ``report.md``, ``summary.json`` and the plots."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from benchmarks.experiments.contenders import FAMILIES
from benchmarks.experiments.regret import BySeed, Interval, Results, over_tasks, per_task, read

NAMES = {
    "base": "SGD or AdamW alone",
    "sam": "SAM",
    "sam-ramp": "SAM, ramped",
    "asam": "ASAM",
    "loss-equated": "loss-equated",
    "auto-asam": "auto, ASAM",
    "auto-shuffled": "auto, its headway shuffled",
    "random-walk": "ρ as a random walk",
    "lets-next": "LETS-SAM by the next gradient",
    "lets-paper": "LETS-SAM as published",
    "lets-warmup": "the same with rho_warmup",
}


OWN = ("value", "own_steps")  # settings of a contender; the others are its task's


@dataclass(frozen=True)
class Line:
    """One row: a way to choose among the members of a family, and what came of it."""

    label: str
    family: str
    choice: str  # all: its only one; best: the best of each task; calibrated: of all tasks; mean, worst: of the starts
    members: dict[str, list[str]]  # by task: those whose runs count here
    regrets: BySeed
    gradients: float  # a step
    collapses: int
    runs: int

    @property
    def overall(self) -> Interval | None:
        return over_tasks(self.regrets)

    @property
    def worst(self) -> tuple[str, Interval] | None:
        """The task with the lowest mean regret."""
        tasks = per_task(self.regrets)
        return min(tasks.items(), key=lambda item: item[1].mean) if tasks else None


def lines(results: Results) -> list[Line]:
    """The rows, in the order of ``FAMILIES``."""
    found = []
    tasks = results.references()
    for family, meaning in ((name, FAMILIES[name].meaning) for name in FAMILIES if name in results.members):
        members, name = results.members[family], NAMES.get(family, family)
        everywhere = dict.fromkeys(tasks, members)
        if len(members) == 1 and meaning == "start":
            found.append(_line(results, name, family, "all", everywhere, results.accuracies(members[0])))
        elif meaning == "start":
            of = results.over_members(family)
            found.append(_line(results, f"{name}, mean of {len(members)} starts", family, "mean", everywhere, of))
            if worst := results.worst_start(family):
                label, one = f"{name}, worst start {number(worst)}", {task: [worst] for task in tasks}
                found.append(_line(results, label, family, "worst", one, results.accuracies(worst)))
        else:
            best = {task: results.best(family, task) for task in tasks}
            own = {task: [one] for task, one in best.items() if one is not None}
            label = f"{name}, best {meaning} of each task"
            found.append(_line(results, label, family, "best", own, results.best_members(family)))
            if one := results.calibrated(family):
                label, same = f"{name}, {number(one)} everywhere", {task: [one] for task in tasks}
                found.append(_line(results, label, family, "calibrated", same, results.accuracies(one)))
    return [line for line in found if line.regrets]


def _line(
    results: Results, label: str, family: str, choice: str, members: dict[str, list[str]], accuracies: BySeed
) -> Line:
    regrets = results.regret(accuracies)
    runs = [run for run in results.runs if run["contender"] in members.get(run["task"], ()) and run["task"] in regrets]
    steps = sum(run["settings"]["own_steps"] for run in runs)
    gradients = sum(run["gradients"] for run in runs) / steps if steps else 0.0
    collapses = sum(run["collapsed"] for run in runs)
    return Line(label, family, choice, members, regrets, gradients, collapses, len(runs))


def number(contender: str) -> str:
    """The number in a contender's name."""
    return contender.partition("@")[2]


# ---- as text ---------------------------------------------------------------------------------------------------------


def interval(found: Interval | None, sign: bool = True) -> str:
    if found is None:
        return "–"
    half = "" if found.half is None else f" ± {found.half:.2f}"
    return points(found.mean, sign) + half


def points(value: float, sign: bool = True) -> str:
    """Two digits, and no sign before zero."""
    rounded = round(value, 2) or 0.0
    return f"{rounded:{'+' if sign and rounded else ''}.2f}".replace("-", "−")


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    marks = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, marks, *rows))


def markdown(results: Results) -> str:
    """The tables. Numbers are points of test accuracy (%), with 95 % t-intervals over the seeds."""
    found, tasks = lines(results), list(results.references())
    regret_rows = []
    for line in found:
        worst = line.worst
        at = "–" if worst is None else f"{points(worst[1].mean)} ({worst[0]})"
        overall = interval(line.overall) + ("" if len(line.regrets) == len(tasks) else f" ({len(line.regrets)} tasks)")
        collapsed = f"{line.collapses} of {line.runs}"
        regret_rows.append([line.label, f"{line.gradients:.3g}", overall, at, collapsed])
    task_rows = [
        [line.label, *(interval(per_task(line.regrets).get(task)) for task in tasks)] for line in found if line.regrets
    ]
    text = [
        "# The no-regret experiment",
        "Test accuracy minus that of SAM with the best fixed ρ of the task, in points, paired by seed, at equal "
        "gradients: mean ± half of the 95 % t-interval over seeds. README.md has the tasks and the columns.",
        "## Over all tasks",
        table(["contender", "gradients a step", "regret", "worst task", "collapsed runs"], regret_rows),
        "## Task by task",
        table(["regret", *tasks], task_rows),
        "## Accuracies (%)",
        table(["task", "chance", "base", "SAM, best ρ", "ramped, best ρ", "ASAM, best ρ"], _accuracies(results)),
        "## Which runs",
        _which(results),
    ]
    return "\n\n".join(text) + "\n"


def _accuracies(results: Results) -> list[list[str]]:
    rows = []
    for task in results.references():
        chance = results.numbers(results.members["sam"], "chance", [task])
        row = [task, f"{sum(chance) / len(chance):.1f}"]
        base = results.accuracies("base").get(task)
        row.append(interval(Interval.of(list(base.values())), sign=False) if base else "–")
        for family in ("sam", "sam-ramp", "asam"):
            best = results.best(family, task)
            values = results.accuracies(best)[task].values() if best else ()
            row.append(f"{interval(Interval.of(list(values)), sign=False)} ({number(best)})" if best else "–")
        rows.append(row)
    return rows


def _which(results: Results) -> str:
    """How many runs, and what is missing: an unfinished campaign must not look like a finished one."""
    missing = []
    for task in results.tasks:
        wanted = sorted({run["seed"] for run in results.runs if run["task"] == task})
        for family, members in results.members.items():
            lacking = sum(seed not in results.seeds(name, task) for name in members for seed in wanted)
            if lacking:
                missing.append(f"{task}: {lacking} of {len(members) * len(wanted)} runs of {family}")
        settings = (run["settings"] for run in results.runs if run["task"] == task)
        found = {json.dumps({k: v for k, v in one.items() if k not in OWN}) for one in settings}
        if len(found) > 1:
            missing.append(f"{task}: runs with {len(found)} different settings, of which one is out of date")
    skipped = sum(run["skipped_steps"] for run in results.runs)
    versions = sorted({f"torch {run['environment']['torch']}, {run['environment']['cpu']}" for run in results.runs})
    commits = sorted({run["environment"]["commit"][:7] for run in results.runs})
    dates = sorted(run["date"][:10] for run in results.runs)
    text = (
        f"{len(results.runs)} runs on {len(results.tasks)} tasks; {skipped} steps skipped, their gradient not finite. "
        f"{'; '.join(versions)}; commits {', '.join(commits)}; {dates[0]} to {dates[-1]}."
    )
    return text + ("\n\nNot there yet: " + "; ".join(missing) + "." if missing else "")


# ---- as numbers ------------------------------------------------------------------------------------------------------


def summary(results: Results) -> dict[str, Any]:
    """The same and more for programs: the tables' rows, and every contender's mean accuracy on every task."""

    def plain(found: Interval | None) -> dict[str, Any] | None:
        if found is None:
            return None
        half = None if found.half is None else round(found.half, 4)
        return {"mean": round(found.mean, 4), "half": half, "seeds": found.seeds}

    everything = [name for members in results.members.values() for name in members]
    return {
        "unit": "points of test accuracy, in per cent; half: of the 95 % t-interval over seeds",
        "references": results.references(),
        "lines": [
            {
                "label": line.label,
                "family": line.family,
                "choice": line.choice,
                "members": line.members,
                "gradients_per_step": round(line.gradients, 3),
                "collapses": line.collapses,
                "runs": line.runs,
                "regret": plain(line.overall),
                "worst_task": line.worst[0] if line.worst else None,
                "regret_by_task": {task: plain(found) for task, found in per_task(line.regrets).items()},
            }
            for line in lines(results)
        ],
        "accuracy": {
            name: {t: plain(Interval.of(list(v.values()))) for t, v in results.accuracies(name).items()}
            for name in everything
        },
    }


def write(folder: Path, output: Path, console: Console) -> None:
    """Read the runs' files in ``folder``, and write the report into ``output``."""
    from benchmarks.experiments import plots

    results = Results(run for run in read(folder) if run["family"] in FAMILIES)
    if not results.references():
        console.print(f"no task in {folder} has a run of every sam@ yet: nothing to compare with")
        return
    output.mkdir(parents=True, exist_ok=True)
    text = markdown(results)
    (output / "report.md").write_text(text)
    (output / "summary.json").write_text(json.dumps(summary(results), indent=1, ensure_ascii=False) + "\n")
    written = plots.write(results, output)
    console.print(Markdown(text))
    console.print(
        f"written: {', '.join(str(path) for path in (output / 'report.md', output / 'summary.json', *written))}"
    )
