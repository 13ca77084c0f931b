"""One run: a recipe, a method, a seed. It leaves a file of results, and after each epoch one to go on from."""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset

from lets_kernels import SAM
from lets_kernels.experiment.methods import Setting, method
from lets_kernels.experiment.recipes import Recipe
from lets_kernels.experiment.task import Batch, Source, Task
from lets_kernels.record import environment, write_json

OTHER = 1_000_000  # what the seed of the validation batches has more than that of the training batches
RESULT, STATE = "run.json", "state.pt"


class Stopped(Exception):
    """The run ended before its last epoch, as it was told to; the same command goes on."""


@dataclass(frozen=True)
class Options:
    """How to run it: nothing here changes what is computed, but for ``amp``, ``start`` and the order of sums on a GPU.

    Args:
        device: of the network.
        amp: the passes run under autocast to bfloat16.
        start: what the network starts from, by name; None: from random weights.
        workers: processes that prepare batches; 0: none, they are made where they are used.
        evaluate: the score is taken after every so many epochs, and after the last.
        go_on: asked before each epoch; False ends the run there.
        tensorboard: write TensorBoard's files beside the results.
        say: gets a line for each epoch.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    amp: bool = False
    start: str | None = None
    workers: int = 0
    evaluate: int = 1
    go_on: Callable[[], bool] = lambda: True
    tensorboard: bool = False
    say: Callable[[str], None] = print


def settings(recipe: Recipe, name: str, seed: int, options: Options) -> dict[str, Any]:
    """What a run is known by: a finished one with other settings is taken again."""
    start = {} if options.start is None else {"start": options.start}
    return {**recipe.settings, "method": name, "seed": seed, "amp": options.amp, **start}


def train(recipe: Recipe, name: str, seed: int, task: Task, folder: Path, options: Options) -> dict[str, Any]:
    """Train, from where a run that was interrupted has got to; returns what is written to ``run.json``.

    Initial weights and batches follow from the seed and are the same for every method, so that runs of one seed are
    pairs. A method that learns its radius gets validation batches from the training set, in another order, as in the
    LETS paper.

    Raises:
        ValueError: the training set is smaller than one batch.
        Stopped: ``go_on`` said so.
    """
    steps = len(task.train) // recipe.batch_size
    if steps == 0:
        raise ValueError(f"{len(task.train)} samples are less than one batch of {recipe.batch_size}")
    torch.manual_seed(seed)
    model = task.network().to(options.device)
    optimizer = method(name).build(Setting(recipe, model, recipe.epochs * steps, steps, seed), method(name).rho)
    scheduler = LambdaLR(optimizer, _shape(recipe, recipe.epochs * steps))
    run = _Run(recipe, task, model, optimizer, options, seed)
    records: list[dict[str, Any]] = []
    folder.mkdir(parents=True, exist_ok=True)
    about = {**settings(recipe, name, seed, options), "measure": task.measure}
    if (folder / STATE).exists():
        saved = torch.load(folder / STATE, map_location=options.device, weights_only=True)
        if saved["about"] == about:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            scheduler.load_state_dict(saved["scheduler"])
            records = saved["records"]
            _set_random(saved["random"])
    with _writer(folder, options) as write:
        for epoch in range(len(records), recipe.epochs):
            if not options.go_on():
                raise Stopped
            begun = time.perf_counter()
            loss = run.epoch(epoch, scheduler)
            seconds = time.perf_counter() - begun
            last = epoch + 1 == recipe.epochs
            score = run.score() if last or (epoch + 1) % options.evaluate == 0 else None
            records.append({"epoch": epoch + 1, "loss": loss, "score": score, "seconds": seconds, **run.metrics()})
            write(records[-1])
            options.say(f"{recipe.name} {name} seed {seed}: " + _line(records[-1], recipe.epochs, task.measure))
            _save(
                folder / STATE,
                {
                    "about": about,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scheduler": scheduler.state_dict(),
                    "records": records,
                    "random": _random(),
                },
            )
    machine = environment()
    if options.device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(options.device)
    result = {
        "settings": settings(recipe, name, seed, options),
        "measure": task.measure,
        "score": records[-1]["score"],
        "gradients": run.gradients() or recipe.epochs * steps,
        "skipped_steps": run.skipped(),
        "seconds": sum(record["seconds"] for record in records),
        "weights": sum(p.numel() for p in model.parameters()),
        "epochs": records,
        "environment": machine,
    }
    write_json(folder / RESULT, result)
    return result


class _Run:
    """The passes of a training."""

    def __init__(
        self, recipe: Recipe, task: Task, model: nn.Module, optimizer: Optimizer, options: Options, seed: int
    ) -> None:
        self.recipe, self.task, self.model, self.optimizer, self.options = recipe, task, model, optimizer, options
        self.seed = seed
        self.sam = optimizer if isinstance(optimizer, SAM) else None
        self.learns = self.sam is not None and self.sam.radius.learns
        self.per_sample = self.sam is not None and self.sam.samples.per_sample
        if self.per_sample and task.losses is None:
            raise ValueError("this method chooses among the samples, and here they have no loss of their own")

    def epoch(self, epoch: int, scheduler: LambdaLR) -> float | None:
        """All batches once; returns the mean of the first pass's losses."""
        self.model.train()
        training = batches(self.task.train, self.recipe.batch_size, self.seed, epoch, self.options)
        others: Iterator[Batch] = iter(())
        if self.learns:
            others = batches(self.task.train, self.recipe.batch_size, self.seed + OTHER, epoch, self.options)
        total, steps = torch.zeros((), dtype=torch.float64, device=self.options.device), 0
        for batch in training:
            closures = [self._closure(batch)]
            if self.learns:
                closures.append(self._closure(next(others)))
            loss: Any = self.optimizer.step(*closures)
            total += (loss[0] if isinstance(loss, tuple) else loss).detach().mean()
            steps += 1
            scheduler.step()
        mean = float(total) / steps
        return mean if math.isfinite(mean) else None

    def _closure(self, batch: Batch) -> Callable[..., Any]:
        """Called once for each gradient, with zeroed gradients before it; of a method that chooses samples, theirs."""
        batch = batch.to(self.options.device)

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            with self._cast():
                loss = self.task.loss(self.model, batch)
            loss.backward()
            return loss

        def losses(subset: Tensor | None = None) -> tuple[Tensor, Tensor]:
            chosen = slice(None) if subset is None else subset
            some = Batch(tuple(x[chosen] for x in batch.inputs), batch.targets[chosen])
            assert self.task.losses is not None
            with self._cast():
                return self.task.losses(self.model, some)

        return losses if self.per_sample else closure

    def _cast(self) -> Any:
        return torch.autocast(self.options.device.type, torch.bfloat16) if self.options.amp else nullcontext()

    def score(self) -> float | None:
        """Of the network as it is, in evaluation mode."""
        self.model.eval()
        with torch.no_grad(), self._cast():
            found = self.task.score(self.model, self._test())
        return found if math.isfinite(found) else None

    def _test(self) -> Iterator[Batch]:
        size = max(256, self.recipe.batch_size)
        parts = [list(range(i, min(i + size, len(self.task.test)))) for i in range(0, len(self.task.test), size)]
        for batch in _loader(self.task.test, [(part, None) for part in parts], self.options):
            yield batch.to(self.options.device)

    def metrics(self) -> dict[str, Any]:
        """The radius, where there is one."""
        return {} if self.sam is None else {"rho": float(self.sam.rho)}

    def gradients(self) -> int | None:
        return None if self.sam is None else int(self.sam.metrics()["gradients"])

    def skipped(self) -> int:
        return 0 if self.sam is None else int(self.sam.metrics()["skipped_steps"])


Ask = tuple[list[int], int | None]


class _Batches(Dataset[Batch]):
    """A source behind torch's ``Dataset``: its item is a whole batch."""

    def __init__(self, source: Source, asks: list[Ask]) -> None:
        self.source, self.asks = source, asks

    def __len__(self) -> int:
        return len(self.asks)

    def __getitem__(self, index: int) -> Batch:
        return self.source.batch(*self.asks[index])


def _loader(source: Source, asks: list[Ask], options: Options) -> Iterator[Batch]:
    return iter(
        DataLoader(
            _Batches(source, asks),
            batch_size=None,
            num_workers=options.workers,
            pin_memory=options.device.type == "cuda",
            generator=torch.Generator(),  # of its own: the global one is the network's
        )
    )


def batches(source: Source, size: int, seed: int, epoch: int, options: Options) -> Iterator[Batch]:
    """All full batches of an epoch, in an order of its own, each augmented by a seed of its own."""
    random = torch.Generator().manual_seed(2**20 * seed + epoch)
    order = torch.randperm(len(source), generator=random)
    seeds = torch.randint(2**62, (len(source) // size,), generator=random).tolist()
    parts = order[: len(seeds) * size].view(-1, size).tolist()
    return _loader(source, list(zip(parts, seeds, strict=True)), options)


def _shape(recipe: Recipe, steps: int) -> Callable[[int], float]:
    """The learning rate in step t, as a share of the highest."""
    warm = round(recipe.warmup * steps)

    def rate(t: int) -> float:
        if t < warm:
            return (t + 1) / warm
        if recipe.schedule == "inverse-sqrt":
            return math.sqrt(warm / (t + 1))
        past = min(1.0, (t - warm) / (steps - warm))
        return 1 - past if recipe.schedule == "linear" else (1 + math.cos(math.pi * past)) / 2

    return rate


def _line(record: dict[str, Any], epochs: int, measure: str) -> str:
    parts = [f"epoch {record['epoch']}/{epochs}", f"{record['seconds']:.0f} s"]
    if record["loss"] is not None:
        parts.append(f"loss {record['loss']:.3f}")
    if record["score"] is not None:
        parts.append(f"{measure.partition(',')[0]} {record['score']:.2f}")
    if "rho" in record:
        parts.append(f"ρ {record['rho']:.3g}")
    return ", ".join(parts)


def _random() -> dict[str, Any]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def _set_random(saved: dict[str, Any]) -> None:
    torch.set_rng_state(saved["cpu"].cpu())
    if saved["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([state.cpu() for state in saved["cuda"]])


def _save(path: Path, state: dict[str, Any]) -> None:
    """Never leaves half a file behind."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


@contextmanager
def _writer(folder: Path, options: Options) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that takes a record; it writes TensorBoard's files, if they are wanted."""
    if not options.tensorboard:
        yield lambda record: None
        return
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))

    def write(record: dict[str, Any]) -> None:
        for name in ("loss", "score", "rho"):
            if record.get(name) is not None:
                writer.add_scalar(name, record[name], record["epoch"])

    try:
        yield write
    finally:
        writer.close()
