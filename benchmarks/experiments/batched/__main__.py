"""``python -m benchmarks.experiments.batched``: the rule, its variants, fixed radii; goes on where it stopped."""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.experiments.batched.nets import train
from benchmarks.experiments.batched.rules import ADAPTIVE_REFERENCES, OURS, RAMPS, REFERENCES, VARIANTS, Rules
from benchmarks.experiments.batched.table import markdown
from benchmarks.experiments.batched.tasks import EIGHT, FOUR, HARD, TASKS, Task
from lets_kernels import AutoConstants
from lets_kernels.bench.clock import threads
from lets_kernels.record import environment

FOLDER = Path(__file__).resolve().parent.parent
SEEDS = (0, 1, 2, 3, 4)
AS_IT_IS = "as it is"


@dataclass(frozen=True)
class Case:
    """One task in one setting, with the rules that are trained side by side."""

    part: str
    name: str
    task: Task
    rules: Rules
    adaptive: bool = False
    scale: float = 1.0

    @property
    def settings(self) -> dict[str, Any]:
        """What a finished case is known by; one whose entry has others is run again."""
        found = {"task": asdict(self.task), "adaptive": self.adaptive, "scale": self.scale, "rules": list(self.rules)}
        return json.loads(json.dumps({**found, "seeds": SEEDS, "constants": asdict(AutoConstants())}))

    def run(self) -> dict[str, Any]:
        begun = time.perf_counter()
        _, accuracy = train(self.task, SEEDS, [make() for make in self.rules.values()], self.adaptive, self.scale)
        means = [round(mean, 3) for mean in accuracy.mean(0).tolist()]
        return {
            "part": self.part,
            "task": self.name,
            "settings": self.settings,
            "references": list(ADAPTIVE_REFERENCES if self.adaptive else REFERENCES),
            "accuracy": dict(zip(self.rules, means, strict=True)),
            "seconds": round(time.perf_counter() - begun, 1),
        }


def _cases() -> Iterator[Case]:
    common_rules = {**OURS, **REFERENCES, **RAMPS}
    for name, task in TASKS.items():
        yield Case(AS_IT_IS, name, task, {**common_rules, **(VARIANTS if name in HARD else {})})
    for times in (0.3, 3.0):
        for name in EIGHT:
            task = replace(TASKS[name], steps=int(TASKS[name].steps * times))
            yield Case(f"T x {times:g}", name, task, common_rules)
    for name in EIGHT:
        yield Case("ASAM", name, TASKS[name], {**OURS, **ADAPTIVE_REFERENCES}, adaptive=True)
        yield Case("loss x 10", name, TASKS[name], common_rules, scale=10.0)
    for name in FOUR:
        yield Case("no momentum", name, replace(TASKS[name], momentum=0.0, lr=5 * TASKS[name].lr), common_rules)
        for size in (16, 64, 256):
            yield Case(f"batch {size}", name, replace(TASKS[name], batch_size=size), common_rules)


CASES = list(_cases())
#: Title, part, tasks.
SECTIONS = [
    ("The hard tasks, by which the constants were chosen", AS_IT_IS, HARD),
    ("The other tasks", AS_IT_IS, tuple(name for name in TASKS if name not in HARD)),
    ("All tasks", AS_IT_IS, tuple(TASKS)),
    ("Eight tasks as they are, which the next four tables change", AS_IT_IS, EIGHT),
    ("0.3 times as many steps", "T x 0.3", EIGHT),
    ("3 times as many steps", "T x 3", EIGHT),
    ("The loss times 10", "loss x 10", EIGHT),
    ("Inside ASAM, against ASAM's own radii", "ASAM", EIGHT),
    ("SGD without momentum, learning rate times 5", "no momentum", FOUR),
    *((f"Batches of {size}", f"batch {size}", FOUR) for size in (16, 64, 256)),
]


def run(cases: list[Case], path: Path, console: Console) -> dict[str, Any]:
    """Run what is not in the file yet, which is rewritten after every case. Returns what it holds."""
    kept = json.loads(path.read_text())["cases"] if path.exists() else []
    finished = {(entry["part"], entry["task"]): entry for entry in kept}
    left = [c for c in cases if finished.get((c.part, c.name), {}).get("settings") != c.settings]
    content = {"seeds": SEEDS, "environment": {**environment(), "threads": 1}, "cases": kept}
    if not left:
        return json.loads(path.read_text())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with threads(1), Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("", total=len(left))
        for case in left:
            progress.update(bar, description=f"{case.part}: {case.name}")
            finished[case.part, case.name] = case.run() | {"commit": content["environment"]["commit"]}
            order = [(c.part, c.name) for c in CASES]
            content["cases"] = [finished[key] for key in order if key in finished]
            partial = path.with_suffix(".part")
            partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
            partial.replace(path)
            progress.advance(bar)
    return content


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiments.batched", description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="NAME", help="only of these")
    parser.add_argument("--results", type=Path, default=FOLDER / "results_batched.json", help="the accuracies")
    parser.add_argument("--table", type=Path, default=FOLDER / "batched.md", help="what is made of them")
    options = parser.parse_args(argv)
    console = Console()
    content = run([case for case in CASES if case.name in options.tasks], options.results, console)
    options.table.write_text(markdown(content, SECTIONS))
    console.print(f"written: {options.results}, {options.table}")


if __name__ == "__main__":
    main()
