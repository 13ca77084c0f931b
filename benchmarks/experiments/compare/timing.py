"""What a step costs in time: all rows in turn on one small network, in multiples of SGD's step."""

import time
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.experiments.compare.rows import SGD, Row, Setting
from benchmarks.experiments.compare.runs import KEPT, Stepper
from benchmarks.experiments.compare.tasks import TASKS
from benchmarks.experiments.tasks import Task
from lets_kernels.bench.clock import threads
from lets_kernels.record import environment, now

ROUNDS = 9
STEPS = 10  # of each row in a round


def times(rows: Mapping[str, Row], rounds: int = ROUNDS, task: Task = TASKS["cifar-0"]) -> dict[str, Any]:
    """CPU time of one thread, which other processes disturb less than the clock on the wall; random images.

    Ten steps of each row in turn, round after round; the sum over all rounds over that of SGD. It is no median, since
    the steps of some rows are not alike: late SAM's last ones take twice as long. A row with a radius to find takes the
    middle one; one with more steps counts all of them.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(task.batch_size, 3, 16, 16, generator=generator)
    batch = images, torch.randint(10, (task.batch_size,), generator=generator)
    everyone = {name: rows[name] for name in dict.fromkeys((SGD, *rows)) if name in rows}
    steps = {}
    for name, row in everyone.items():
        torch.manual_seed(0)
        model = task.model()
        # As many steps as a training has: a method that perturbs late shall do so here, too.
        setting = Setting(task, model, 2_048, STEPS * rounds, 0)
        rho = row.radii[len(row.radii) // 2] if row.radii else None
        steps[name] = Stepper(model, row.build(setting, rho)), row.times * STEPS
    seconds: dict[str, list[float]] = {name: [] for name in everyone}
    with threads(1):
        for _ in range(rounds):
            for name, (step, number) in steps.items():
                start = time.process_time()
                for _ in range(number):
                    step(batch, batch)
                seconds[name].append(time.process_time() - start)
    machine = {key: value for key, value in environment().items() if key in (*KEPT, "load_average")}
    return {
        "unit": "CPU time of a step in multiples of SGD's, one thread",
        "steps": STEPS,
        "rounds": rounds,
        "sgd_ms": round(1e3 * sum(seconds[SGD]) / (STEPS * rounds), 4),
        "environment": machine,
        "date": now(),
        "ratio": {name: round(sum(own) / sum(seconds[SGD]), 3) for name, own in seconds.items()},
    }
