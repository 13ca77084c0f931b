"""What does a training step cost? ResNet-18 on 32 x 32 images, batch 128, bf16 autocast, channels_last.

Synthetic images and labels, all on the device. Milliseconds a step are means over ten steps (one period of LETS at
interval 10), medians over rounds with the contenders in turn: eager, and each captured in a CUDA graph where it can be.
A gradient is zero_grad, forward and backward; the plain step is that and torch's fused SGD.
"""

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.timing import Contender, measure, summary
from benchmarks.gpu.worker import Work, in_words, main
from lets_kernels import ASAM, LETSSAM, SAM, LearnedRadius
from lets_kernels.bench import eager
from lets_kernels.bench.resnet import ResNet18

BATCH, STEPS, ROUNDS, WARM_UP = 128, 10, 7, 3
SGD = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
RHO = 0.05
Step = Callable[[], object]


class Training:
    """A model of its own, two fixed batches, and the closures on them."""

    def __init__(self, work: Work) -> None:
        device = work.device.device
        torch.manual_seed(0)
        batch, width, size = (2, 2, 8) if work.dry else (BATCH, 64, 32)
        self.model = ResNet18(width).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.params = list(self.model.parameters())
        self._type = device.type
        self._batches = []
        for seed in (1, 2):
            generator = torch.Generator(device).manual_seed(seed)
            images = torch.empty(batch, 3, size, size, device=device).normal_(generator=generator)
            labels = torch.randint(10, (batch,), device=device, generator=generator)
            self._batches.append((images.to(memory_format=torch.channels_last), labels))

    def gradient(self, batch: int = 0) -> Tensor:
        """zero_grad, forward, backward; the loss."""
        images, labels = self._batches[batch]
        for p in self.params:
            p.grad = None
        with torch.autocast(self._type, torch.bfloat16):
            loss = nn.functional.cross_entropy(self.model(images), labels)
        loss.backward()
        return loss

    def val_gradient(self) -> Tensor:
        return self.gradient(1)


def steps(work: Work) -> dict[str, tuple[str, Callable[[], tuple[Step, Any]]]]:
    """By name: the method, and what builds its step and the optimizer (None where there is none)."""

    def gradient() -> tuple[Step, Any]:
        return Training(work).gradient, None

    def plain() -> tuple[Step, Any]:
        t = Training(work)
        optimizer = torch.optim.SGD(t.params, **SGD, fused=True)

        def step() -> None:
            t.gradient()
            optimizer.step()

        return step, optimizer

    def per_tensor() -> tuple[Step, Any]:
        t = Training(work)
        sam = eager.PerTensor(t.params, lambda params: torch.optim.SGD(params, **SGD, fused=True), RHO)

        def step() -> None:
            t.gradient()
            sam.first_step()
            t.gradient()
            sam.second_step()

        return step, None

    def ours(kind: Callable[..., SAM], rho: Callable[[], Any], **options: Any) -> Callable[[], tuple[Step, Any]]:
        def make() -> tuple[Step, Any]:
            t = Training(work)
            optimizer = kind(t.params, torch.optim.SGD, rho(), **SGD, **options)
            if optimizer.radius.learns:
                return lambda: optimizer.step(t.gradient, t.val_gradient), optimizer
            return lambda: optimizer.step(t.gradient), optimizer

        return make

    found: dict[str, tuple[str, Callable[[], tuple[Step, Any]]]] = {
        "gradient": ("gradient", gradient),
        "SGD": ("SGD", plain),
        "SAM per tensor": ("SAM per tensor", per_tensor),
    }
    methods: dict[str, tuple[Callable[..., SAM], Callable[[], Any]]] = {
        "SAM": (SAM, lambda: RHO),
        "ASAM": (ASAM, lambda: 0.5),
        "LETS-SAM 1": (LETSSAM, lambda: LearnedRadius(RHO, interval=1)),
        "LETS-SAM 10": (LETSSAM, lambda: LearnedRadius(RHO, interval=10)),
    }
    for backend in work.backends:
        for method, (kind, rho) in methods.items():
            found[f"{method} {backend}"] = method, ours(kind, rho, backend=backend)
        found[f"SAM {backend} flatten"] = "SAM", ours(SAM, lambda: RHO, backend=backend, flatten=True)
    return found


def times(step: Step, count: int) -> Contender:
    """So many steps in a row."""

    def run(_: int) -> None:
        for _ in range(count):
            step()

    return Contender(run)


def capture(work: Work, step: Step) -> Step:
    """The step captured in a CUDA graph after a warm-up on a side stream; returns what replays it.

    A dry run captures nothing and returns the step.
    """
    if work.dry:
        step()
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return functools.partial(_replay, graph, step)  # the graph reads memory that the step's objects own


def _replay(graph: Any, step: Step) -> None:
    graph.replay()


def report(work: Work, how: str, contenders: dict[str, tuple[str, Step]]) -> None:
    rounds, count = (1, 1) if work.dry else (ROUNDS, STEPS)
    runs = {name: times(step, count) for name, (_, step) in contenders.items()}
    seconds = measure(work.device, runs, rounds, limit=0.5 * work.remaining())
    each = {name: [s / count for s in values] for name, values in seconds.items()}
    for name, values in each.items():
        row: dict[str, Any] = {"how": how, "step": name, "method": contenders[name][0], **summary(values, "ms")}
        row |= {"batch": BATCH, "backend": next((b for b in work.backends if b in name.split()), None)}
        for against in ("gradient", "SGD"):
            if against in each:
                pairs = zip(values, each[against], strict=True)
                row[f"times_{against}"] = round(statistics.median(a / b for a, b in pairs), 4)
        work.row(**row)


def run(work: Work) -> None:
    torch.backends.cudnn.benchmark = True
    made: dict[str, tuple[str, Step]] = {}
    kinds = steps(work)
    work.write(plan=["eager steps", "captured steps"])

    def eager_steps() -> None:
        for name, (method, make) in kinds.items():
            try:
                step, optimizer = make()
                for _ in range(1 if work.dry else WARM_UP):
                    step()
                if isinstance(optimizer, SAM) and not optimizer.fused:
                    raise RuntimeError(f"not fused: {optimizer.fused_reason}")
                made[name] = method, step
            except Exception as failure:
                work.fail(f"{name} eager", in_words(failure))
        report(work, "eager", made)

    def captured_steps() -> None:
        made.clear()
        for name, (method, make) in kinds.items():
            if name == "SAM per tensor":
                work.leave_out(f"{name} captured", "it re-points the weights, so a replay would not go on from them")
                continue
            try:
                made[name] = method, capture(work, make()[0])
            except Exception as refused:
                work.leave_out(f"{name} captured", f"cannot be captured: {in_words(refused)}")
        report(work, "captured", made)

    work.case("eager steps", eager_steps)
    work.case("captured steps", captured_steps)


if __name__ == "__main__":
    main(run, __doc__)
