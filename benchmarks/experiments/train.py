"""One run: a task, a contender, a seed; and what its file says of it."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks.experiments.contenders import Contender, Setting
from benchmarks.experiments.data import IGNORED, Data
from benchmarks.experiments.tasks import Task
from lets_kernels import SAM
from lets_kernels.demo.data import batches

POINTS = 20  # of a radius's trajectory
MARGIN = 5.0  # points above chance up to which a run has collapsed


def settings(task: Task, contender: Contender) -> dict[str, Any]:
    """What a finished run is known by; one whose file has others is taken again."""
    return {**task.settings, "value": contender.value, "own_steps": contender.steps(task)}


def train(task: Task, contender: Contender, seed: int, after_step: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Data, initial weights and the order of the batches follow from the seed, and are the same for all contenders."""
    begun = time.perf_counter()
    data = task.load(seed)
    torch.manual_seed(seed)
    model, steps = task.model(), contender.steps(task)
    optimizer = contender.build(Setting(task, model, steps, seed))
    scheduler = CosineAnnealingLR(optimizer, steps)
    sam = optimizer if isinstance(optimizer, SAM) else None
    training = batches(data.train_inputs, data.train_targets, task.batch_size, seed)
    validation = batches(data.train_inputs, data.train_targets, task.batch_size, seed + 1_000_000)
    seen = {round(i * (steps - 1) / (POINTS - 1)) for i in range(POINTS)}
    trajectory = []

    def gradient(inputs: Tensor, targets: Tensor) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = _loss(model(inputs), targets)
            loss.backward()
            return loss

        return closure

    model.train()
    for step in range(steps):
        closures = [gradient(*next(training))]
        if sam and sam.radius.learns:
            closures.append(gradient(*next(validation)))
        optimizer.step(*closures)  # type: ignore[arg-type]
        scheduler.step()
        if sam and step in seen:
            trajectory.append(_round(float(sam.rho)))
        after_step()
    metrics = sam.metrics() if sam else {}
    accuracy, chance = test_accuracy(model, data), 100 * data.chance
    return {
        "task": task.name,
        "contender": contender.name,
        "family": contender.family.name,
        "seed": seed,
        "settings": settings(task, contender),
        "test_accuracy": round(accuracy, 4),
        "chance": round(chance, 4),
        "collapsed": accuracy <= chance + MARGIN,
        "train_loss": _round(train_loss(model, data)),
        "gradients": int(metrics.get("gradients", steps)),
        "skipped_steps": int(metrics.get("skipped_steps", 0)),
        "rho": trajectory,
        "backend": sam.backend if sam else None,
        "seconds": round(time.perf_counter() - begun, 2),
    }


def _loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats, over samples or over their places."""
    return cross_entropy(outputs.flatten(0, -2), targets.flatten(), ignore_index=IGNORED)


def _round(value: float) -> float | None:
    """Four significant digits; None for what is not finite, which JSON cannot say."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


@torch.no_grad()
def _outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    model.eval()
    return torch.cat([model(part) for part in inputs.split(1_000)])


def test_accuracy(model: nn.Module, data: Data) -> float:
    """Per cent of the test targets that count."""
    counts = data.test_targets != IGNORED
    return 100 * float((_outputs(model, data.test_inputs).argmax(-1) == data.test_targets)[counts].double().mean())


def train_loss(model: nn.Module, data: Data) -> float:
    """On the training set, wrong labels and all."""
    return float(_loss(_outputs(model, data.train_inputs), data.train_targets))
