"""The arithmetic of the report, from the files alone: references, paired regrets and their intervals."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from scipy import stats

REFERENCE = "sam"  # the family whose best member on a task is what the others are compared with


def read(folder: Path) -> list[dict[str, Any]]:
    """All finished runs in a folder, in a fixed order."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*/*/*.json"))]


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and half the width of its 95 % t-interval; None with one seed, which has none."""

    mean: float
    half: float | None
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval":
        n = len(values)
        if n < 2:
            return cls(fmean(values), None, n)
        return cls(fmean(values), float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n)), n)


#: Accuracies in per cent: task, then seed.
BySeed = dict[str, dict[int, float]]


class Results:
    """The runs of a campaign, perhaps of an unfinished one."""

    def __init__(self, runs: Iterable[dict[str, Any]]) -> None:
        self.runs = list(runs)
        self._found = {(run["contender"], run["task"], run["seed"]): run for run in self.runs}
        self.tasks = list(dict.fromkeys(run["task"] for run in self.runs))
        self.members: dict[str, list[str]] = {}  # of each family, in the order of their numbers
        values = {(run["family"], run["settings"]["value"], run["contender"]) for run in self.runs}
        for family, _, name in sorted(values):
            self.members.setdefault(family, []).append(name)

    def seeds(self, contender: str, task: str) -> list[int]:
        return sorted(seed for name, where, seed in self._found if (name, where) == (contender, task))

    def accuracies(self, contender: str) -> BySeed:
        """Test accuracies of one contender, where it has run."""
        found: BySeed = {}
        for (name, task, seed), run in sorted(self._found.items()):
            if name == contender:
                found.setdefault(task, {})[seed] = run["test_accuracy"]
        return found

    def numbers(self, names: Iterable[str], key: str, tasks: Iterable[str]) -> list[Any]:
        """One entry of the files of these contenders on these tasks."""
        names, tasks = set(names), set(tasks)
        return [run[key] for run in self.runs if run["contender"] in names and run["task"] in tasks]

    # ---- which member of a family ------------------------------------------------------------------------------------

    def best(self, family: str, task: str) -> str | None:
        """The member with the highest mean on a task, over the seeds that all members have; the first of equals."""
        members = self.members.get(family, [])
        common = set.intersection(*(set(self.seeds(name, task)) for name in members)) if members else set()
        if not common:
            return None
        return max(members, key=lambda name: fmean(self._found[name, task, s]["test_accuracy"] for s in common))

    def references(self) -> dict[str, str]:
        """The best fixed radius of each task that all fixed radii have run on."""
        found = {task: self.best(REFERENCE, task) for task in self.tasks}
        return {task: name for task, name in found.items() if name is not None}

    def calibrated(self, family: str) -> str | None:
        """The one member with the highest mean over all tasks that the family has run on; the first of equals."""
        members = self.members.get(family, [])
        shared = [task for task in self.references() if self.best(family, task) is not None]
        if not shared:
            return None

        def mean(name: str) -> float:
            found = self.accuracies(name)
            common = {t: set.intersection(*(set(self.seeds(m, t)) for m in members)) for t in shared}
            return fmean(fmean(found[task][seed] for seed in common[task]) for task in shared)

        return max(members, key=mean)

    # ---- regret ------------------------------------------------------------------------------------------------------

    def regret(self, of: BySeed) -> BySeed:
        """Accuracy minus that of the task's reference, seed by seed, where there are both."""
        found: BySeed = {}
        for task, name in self.references().items():
            reference = self.accuracies(name)[task]
            paired = {seed: value - reference[seed] for seed, value in of.get(task, {}).items() if seed in reference}
            if paired:
                found[task] = paired
        return found

    def best_members(self, family: str) -> BySeed:
        """On each task its own best member: an oracle, as the reference is."""
        chosen = {task: self.best(family, task) for task in self.references()}
        return {task: self.accuracies(name)[task] for task, name in chosen.items() if name is not None}

    def over_members(self, family: str, reduce: Callable[[list[float]], float] = fmean) -> BySeed:
        """Seed by seed over all members of a family; by default their mean."""
        found: BySeed = {}
        members = [self.accuracies(name) for name in self.members.get(family, [])]
        for task in self.references():
            shared = set.intersection(*(set(one.get(task, {})) for one in members)) if members else set()
            if shared:
                found[task] = {seed: reduce([one[task][seed] for one in members]) for seed in sorted(shared)}
        return found

    def worst_start(self, family: str) -> str | None:
        """The member with the lowest mean regret over the tasks."""
        regrets = {name: over_tasks(self.regret(self.accuracies(name))) for name in self.members.get(family, [])}
        known = {name: interval.mean for name, interval in regrets.items() if interval is not None}
        return min(known, key=lambda name: known[name]) if known else None


def per_task(regrets: BySeed) -> dict[str, Interval]:
    return {task: Interval.of(list(by_seed.values())) for task, by_seed in regrets.items()}


def over_tasks(regrets: BySeed) -> Interval | None:
    """The mean over tasks for each seed that all of them have; mean and interval over these. None without any."""
    shared = set.intersection(*map(set, regrets.values())) if regrets else set()
    if not shared:
        return None
    return Interval.of([fmean(by_seed[seed] for by_seed in regrets.values()) for seed in sorted(shared)])
