"""One training: a method, a radius, a seed, and what is recorded after each epoch."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from lets_kernels import SAM
from lets_kernels.demo.data import Digits, batches, load, noisy_targets
from lets_kernels.demo.methods import ALL, Settings
from lets_kernels.demo.model import small_cnn


@dataclass(frozen=True)
class Epoch:
    """Measured after an epoch (number 0: before training). Losses are mean cross-entropies in nats."""

    epoch: int
    train_loss: float  # on the training set with its wrong labels
    test_loss: float  # on the test set with its right labels
    noisy_test_loss: float  # on the test set, expected if its labels were as noisy as those of the training set
    gap: float  # generalisation gap: noisy_test_loss - train_loss
    test_accuracy: float  # share of the test set, 0 ... 1
    rho: float | None  # the radius; None for SGD
    gradients: int  # the number taken so far
    skipped_steps: int  # the number so far; a step is skipped if a gradient is not finite
    step_ms: float | None  # wall time of a step, median over the epoch
    optimizer_ms: float | None  # the same without the closures (forward and backward passes)


@dataclass(frozen=True)
class Training:
    """A training with one method, from one radius, with one seed."""

    method: str
    rho: float | None  # the first radius; None for SGD
    seed: int
    backend: str | None  # which kernels ran; None for SGD
    epochs: list[Epoch]


class Timer:
    """Adds up the wall time, in ms, that is spent in the closures it wraps."""

    ms = 0.0

    def __call__(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            start = perf_counter()
            loss = closure(*args)
            self.ms += 1e3 * (perf_counter() - start)
            return loss

        return timed


def train(
    name: str,
    rho: float | None,
    seed: int,
    settings: Settings,
    after_epoch: Callable[[], None] = lambda: None,
    trained: Callable[[nn.Module, Digits], None] = lambda model, data: None,
) -> Training:
    """Trains one network. Data, initial weights and batches follow from ``seed`` and are the same for every method.

    At the end ``trained`` gets the network and the data.
    """
    data = load(seed, settings.noise)
    torch.manual_seed(seed)
    model = small_cnn()
    optimizer = ALL[name].build(model.parameters(), settings, rho)
    scheduler = CosineAnnealingLR(optimizer, settings.epochs)
    per_sample = isinstance(optimizer, SAM) and optimizer.samples.per_sample

    def gradient(images: Tensor, labels: Tensor) -> Callable[[], Any]:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = cross_entropy(model(images), labels)
            loss.backward()
            return loss

        def losses(subset: Tensor | None = None) -> tuple[Tensor, Tensor]:
            chosen = slice(None) if subset is None else subset
            outputs = model(images[chosen])
            return cross_entropy(outputs, labels[chosen], reduction="none"), outputs

        return timer(losses if per_sample else closure)

    timer = Timer()
    train_batches = batches(data.train_images, data.train_labels, settings.batch_size, seed)
    # LETS draws its validation batches from the training set, with its wrong labels.
    val_batches = batches(data.train_images, data.train_labels, settings.batch_size, seed + 1_000_000)
    records = [evaluate(0, model, data, settings.noise, optimizer, [])]
    for epoch in range(1, settings.epochs + 1):
        model.train()
        times = []
        for _ in range(settings.steps_per_epoch):
            closure = gradient(*next(train_batches))
            val_closure = gradient(*next(val_batches))
            timer.ms, start = 0.0, perf_counter()
            if isinstance(optimizer, SAM) and optimizer.radius.learns:
                optimizer.step(closure, val_closure)
            else:
                optimizer.step(closure)
            step_ms = 1e3 * (perf_counter() - start)
            times.append((step_ms, step_ms - timer.ms))
        scheduler.step()
        records.append(evaluate(epoch, model, data, settings.noise, optimizer, times))
        after_epoch()
    trained(model, data)
    backend = optimizer.backend if isinstance(optimizer, SAM) else None
    return Training(name, rho, seed, backend, records)


@torch.no_grad()
def evaluate(
    epoch: int, model: nn.Module, data: Digits, noise: float, optimizer: Optimizer, times: list[tuple[float, float]]
) -> Epoch:
    """Measures the network after an epoch. ``times``: ms of each of its steps, in all and without the closures.

    The generalisation gap compares like with like: training labels are noisy, so the test loss in it is the one that
    equally noisy labels would have (in exact expectation, not by a draw). It is near zero until wrong labels are
    memorised.
    """
    model.eval()
    train_loss = cross_entropy(model(data.train_images), data.train_labels).item()
    logits = model(data.test_images)
    noisy_test_loss = cross_entropy(logits, noisy_targets(data.test_labels, noise)).item()
    sam = optimizer if isinstance(optimizer, SAM) else None
    calls_backward = sam is not None and sam.samples.per_sample  # so its time cannot be measured apart
    return Epoch(
        epoch=epoch,
        train_loss=train_loss,
        test_loss=cross_entropy(logits, data.test_labels).item(),
        noisy_test_loss=noisy_test_loss,
        gap=noisy_test_loss - train_loss,
        test_accuracy=(logits.argmax(1) == data.test_labels).double().mean().item(),
        rho=float(sam.rho) if sam else None,
        gradients=int(sam.metrics()["gradients"]) if sam else epoch * len(times),
        skipped_steps=int(sam.metrics()["skipped_steps"]) if sam else 0,
        step_ms=median(step for step, _ in times) if times else None,
        optimizer_ms=median(rest for _, rest in times) if times and not calls_backward else None,
    )
