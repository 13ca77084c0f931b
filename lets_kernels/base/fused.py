"""Restore fused into the base optimizer's step, for the optimizers whose arithmetic the ops know.

The base optimizer stays the owner of its options and its state: the ops work on its own state tensors, under the names
that it gives them, so its checkpoints and schedulers notice nothing. What the ops do not cover, it does itself: among
that a learning rate that is a tensor on an accelerator, which the ops could only take by waiting for it. Its value is
an argument of a kernel, so a captured CUDA graph keeps the learning rate that it was captured with.
"""

import functools
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from lets_kernels.base.guarded import guarded_step
from lets_kernels.base.state import State, begun_state
from lets_kernels.base.variational import VariationalSGD
from lets_kernels.ops.declared import UNSCALED
from lets_kernels.space.buckets import Bucket, Runs
from lets_kernels.space.memory import refuse_while_capturing

Group = Mapping[str, Any]


def _not_plain(group: Group, names: tuple[str, ...]) -> str | None:
    """Why a group has options that the ops do not know, or None."""
    for name in names:
        if group.get(name):
            return f"{name}={group[name]!r}"
    if isinstance(group["lr"], Tensor) and group["lr"].device.type != "cpu":
        return "lr is a tensor on an accelerator"
    return None


class FusedStep(Protocol):
    """How one base optimizer is fused."""

    #: What a parameter's state holds, once there is any.
    needs: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    def refuses(base: torch.optim.Optimizer, group: Group) -> str | None:
        """Why a group's options need the optimizer itself, in words, or None."""

    @staticmethod
    def prepare(runs: Runs, group: Group, state: State) -> Callable[[Tensor], None] | None:
        """The step on these runs, to be called with the gate; None where the state's memory does not suit."""


class FusedSGD:
    """torch.optim.SGD without dampening: its momentum buffers then begin at zero, which a skipped step can leave."""

    needs: ClassVar[tuple[str, ...]] = ()  # without momentum there is no buffer

    @staticmethod
    def refuses(base: torch.optim.Optimizer, group: Group) -> str | None:
        return _not_plain(group, ("dampening", "differentiable"))

    @staticmethod
    def prepare(runs: Runs, group: Group, state: State) -> Callable[[Tensor], None] | None:
        momenta = begun_state(runs, state, "momentum_buffer") if group["momentum"] else []
        if momenta is None or runs.copies:
            return None
        b, momentum, nesterov = runs.bucket, float(group["momentum"]), bool(group["nesterov"])
        options = (float(group["lr"]), momentum, float(group["weight_decay"]), nesterov, bool(group["maximize"]))

        def step(gate: Tensor) -> None:
            grads = runs.pack(runs.grads)
            b.ops.restore_sgd_(runs.weights, grads, b.pack(momenta), b.saved, b.dirty, runs.table, gate, *options)

        return step


def _steps(runs: Runs, state: State) -> list[Tensor] | None:
    """Adam's step counts, one float32 tensor a run; None if they are of another dtype.

    They lie beside the parameters, so that counting waits for nothing; torch's Adam reads them from anywhere.
    """
    steps = []
    for i in runs.indices:
        own = state[runs.bucket.params[i]]
        count = own.get("step")
        if count is None or count.device != runs.bucket.device or count.is_neg():
            refuse_while_capturing("the optimizer's step count")
            count = torch.zeros((), dtype=torch.float32, device="cpu") if count is None else count
            own["step"] = count = count.to(runs.bucket.device).resolve_neg()
        steps.append(count)
    return steps if all(s.dtype is torch.float32 for s in steps) else None


class FusedAdam:
    """torch.optim.Adam and AdamW, without amsgrad."""

    needs: ClassVar[tuple[str, ...]] = ("step", "exp_avg", "exp_avg_sq")

    @staticmethod
    def refuses(base: torch.optim.Optimizer, group: Group) -> str | None:
        if any(isinstance(beta, Tensor) for beta in group["betas"]):
            return "betas are tensors"
        return _not_plain(group, ("amsgrad", "differentiable"))

    @staticmethod
    def prepare(runs: Runs, group: Group, state: State) -> Callable[[Tensor], None] | None:
        averages, squares = begun_state(runs, state, "exp_avg"), begun_state(runs, state, "exp_avg_sq")
        steps = _steps(runs, state)
        if averages is None or squares is None or steps is None or runs.copies:
            return None
        b = runs.bucket
        lr, (beta1, beta2), eps = float(group["lr"]), map(float, group["betas"]), float(group["eps"])
        decay, decoupled = float(group["weight_decay"]), bool(group["decoupled_weight_decay"])
        options = (lr, beta1, beta2, eps, decay, decoupled, bool(group["maximize"]))

        def step(gate: Tensor) -> None:
            grads, m, v, t = runs.pack(runs.grads), b.pack(averages), b.pack(squares), b.pack(steps)
            b.ops.restore_adamw_(runs.weights, grads, m, v, t, b.saved, b.dirty, runs.table, gate, *options)

        return step


class FusedVariational:
    """The step of Variational SAM."""

    needs: ClassVar[tuple[str, ...]] = ("exp_avg", "precision")

    @staticmethod
    def refuses(base: torch.optim.Optimizer, group: Group) -> str | None:
        return _not_plain(group, ())

    @staticmethod
    def prepare(runs: Runs, group: Group, state: State) -> Callable[[Tensor], None] | None:
        averages, precisions = begun_state(runs, state, "exp_avg"), begun_state(runs, state, "precision")
        if averages is None or precisions is None or runs.copies:
            return None
        b = runs.bucket
        options = (float(group["lr"]), float(group["beta1"]), float(group["weight_decay"]))

        def step(gate: Tensor) -> None:
            lists = (runs.pack(runs.grads), b.pack(averages), b.pack(precisions))
            b.ops.restore_bsam_(runs.weights, *lists, b.saved, b.dirty, runs.table, gate, *options)

        return step


class FusedLion:
    """Lion (Chen et al., 2023), of whatever package: torch has none, so what is called that is tried out first."""

    needs: ClassVar[tuple[str, ...]] = ("exp_avg",)

    @staticmethod
    def refuses(base: torch.optim.Optimizer, group: Group) -> str | None:
        others = tuple((name, group[name]) for name in base.defaults if name not in _LION and name in group)
        for name, value in others:
            if isinstance(value, Tensor) or not isinstance(value, Hashable):
                return f"{name}={value!r}"
        if any(isinstance(x, Tensor) for x in (*group["betas"], group["weight_decay"])):
            return "betas or weight_decay are tensors"
        kind: Any = type(base)
        reason = _not_plain(group, tuple(name for name, _ in others))
        return reason or _steps_otherwise(kind, kind.step, tuple(map(float, group["betas"])), others)

    @staticmethod
    def prepare(runs: Runs, group: Group, state: State) -> Callable[[Tensor], None] | None:
        averages = begun_state(runs, state, "exp_avg")
        if averages is None or runs.copies:
            return None
        b, (beta1, beta2) = runs.bucket, map(float, group["betas"])
        options = (float(group["lr"]), beta1, beta2, float(group["weight_decay"]))

        def step(gate: Tensor) -> None:
            grads, m = runs.pack(runs.grads), b.pack(averages)
            b.ops.restore_lion_(runs.weights, grads, m, b.saved, b.dirty, runs.table, gate, *options)

        return step


#: The options that Lion has.
_LION = ("lr", "betas", "weight_decay")


@functools.lru_cache(maxsize=64)
def _steps_otherwise(
    kind: type, step: Any, betas: tuple[float, ...], others: tuple[tuple[str, Any], ...]
) -> str | None:
    """Why an optimizer's class is not Algorithm 2 of Chen et al. (2023), in words, after two steps of it; or None.

    A new one, with the same options but for the learning rate and the decay, moves a parameter of float64 along the
    formula, and keeps its average and nothing else. ``step`` is what the class steps with, should that change.
    """
    lr, decay, (beta1, beta2) = 0.125, 0.5, betas
    start, gradients = [1.0, -2.0, 0.5, 0.0, 3.0], ([1.0, -0.25, 0.0, 0.0, -1.0], [-0.01, 4.0, 1.0, 0.0, 30.0])
    p = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64, device="cpu"))
    expected, average = p.detach().clone(), torch.zeros_like(p, requires_grad=False)
    try:
        with torch.random.fork_rng(devices=[]):
            optimizer = kind([p], lr=lr, betas=betas, weight_decay=decay, **dict(others))
            for numbers in gradients:
                p.grad = g = torch.tensor(numbers, dtype=torch.float64, device="cpu")
                optimizer.step()
                expected -= lr * ((beta1 * average + (1 - beta1) * g).sign() + decay * expected)
                average = beta2 * average + (1 - beta2) * g
            state = dict(optimizer.state[p])
    except Exception as error:  # whatever somebody's class may raise
        return f"{kind.__name__} could not be tried ({type(error).__name__}: {error})"
    kept = state.pop("exp_avg", None)
    alike = isinstance(kept, Tensor) and kept.shape == p.shape and not state
    # Sums of a few float64 numbers of at most 16, in whatever order.
    if alike and all(torch.allclose(x, y, rtol=0, atol=1e-14) for x, y in ((p.detach(), expected), (kept, average))):
        return None
    return f"{kind.__name__} does not step as Chen et al. (2023), Algorithm 2, say"


FUSED: dict[type, type[FusedStep]] = {
    torch.optim.SGD: FusedSGD,
    torch.optim.Adam: FusedAdam,
    torch.optim.AdamW: FusedAdam,
    VariationalSGD: FusedVariational,
}


def fused_as(optimizer: type) -> type[FusedStep] | None:
    """How an optimizer's class is fused; None where it is not. Lion is known by its name, and tried out later."""
    return FUSED.get(optimizer) or (FusedLion if optimizer.__name__ == "Lion" else None)


#: Where torch's code lies and where ours does, as files' names begin there.
OWN_CODE = tuple(f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parents[1]))


def _codes(step: Any) -> list[Any]:
    """The code of ``step``, and of each layer that it wraps: copied attributes (``functools.wraps``) tell nothing."""
    codes, layer = [], getattr(step, "__func__", step)
    while layer is not None:
        codes.append(getattr(layer, "__code__", None))
        layer = getattr(layer, "__wrapped__", None)
    return codes


def _is_foreign(base: torch.optim.Optimizer) -> bool:
    """True if some of the code that ``base.step()`` runs is neither torch's (its optimizers, and what its schedulers
    put around) nor that of a class that has been tried out.
    """
    tried = [] if type(base) in FUSED else _codes(type(base).step)
    for code in _codes(base.step):
        if code is None or not (code.co_filename.startswith(OWN_CODE) or code in tried):
            return True
    return False


def refusal(base: torch.optim.Optimizer) -> str | None:
    """Why the base optimizer must step by itself, in words; None where the fused step may stand for it."""
    kind = fused_as(type(base))
    if kind is None:
        return f"{type(base).__name__} has no fused step"
    if base._optimizer_step_pre_hooks or base._optimizer_step_post_hooks:
        return "the base optimizer has step hooks"
    if _is_foreign(base):
        return "the base optimizer's step was replaced"
    for group in base.param_groups:
        reason = kind.refuses(base, group)
        if reason is not None:
            return reason
    return None


def prepared(
    base: torch.optim.Optimizer, runs: Sequence[Runs]
) -> tuple[list[tuple[Runs, Callable[[Tensor], None]]], str | None]:
    """The fused steps on these runs, and why the base optimizer must step by itself, in words, or None."""
    reason, kind, steps = refusal(base), fused_as(type(base)), []
    if reason is not None or kind is None:
        return [], reason
    for each in runs:
        step = kind.prepare(each, base.param_groups[each.bucket.group], base.state)
        if step is None:
            return [], "the state lies otherwise in memory than the parameters"
        steps.append((each, step))
    return steps, None


class OwnStep:
    """Steps of an optimizer whose parameters are the package's own scalars, fused where the ops can, else guarded."""

    def __init__(self) -> None:
        self._buckets: dict[int, Bucket] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_buckets": {}}

    def __call__(self, optimizer: torch.optim.Optimizer, gate: Tensor, backend: str) -> None:
        """A step along the gradients that are there, if ``gate`` is not zero, by the ops of ``backend``."""
        steps = []
        kind = fused_as(type(optimizer))
        if kind is not None and refusal(optimizer) is None:
            for group in optimizer.param_groups:
                for p in (p for p in group["params"] if p.grad is not None):
                    runs = Runs(self._bucket(p, backend), (0,), [p.detach()], [p.grad])
                    steps.append((runs, kind.prepare(runs, group, optimizer.state)))
        if not steps or any(step is None for _, step in steps):
            guarded_step(optimizer, gate)
            return
        for runs, step in steps:
            assert step is not None
            step(gate)
            runs.write_back()
        optimizer.__dict__["_opt_called"] = True  # what LR schedulers look at

    def make_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the state that the first step would, which begins at zero, where the ops take that step."""
        kind = fused_as(type(optimizer))
        if kind is None or refusal(optimizer) is not None:
            return
        for group in optimizer.param_groups:
            for p in group["params"]:
                memory = [p.detach()]
                runs = Runs(self._bucket(p, "reference"), (0,), memory, memory)
                kind.prepare(runs, group, optimizer.state)

    def _bucket(self, p: Tensor, backend: str) -> Bucket:
        found = self._buckets.get(id(p))
        if found is None or found.backend != backend or not found.is_current():
            found = Bucket([p], [None], 0, 0, {}, lambda *_: (UNSCALED, 0), backend, flatten=False)
            self._buckets[id(p)] = found
        return found
