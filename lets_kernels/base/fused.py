"""The restore fused into the base optimizer's step, for optimizers whose arithmetic the ops know.

The base optimizer stays the owner of its options and its state: the ops work on its own state tensors, under their own
names, so its checkpoints and schedulers notice nothing. If the ops do not cover its options, the base optimizer steps
by itself. It does so if the learning rate is a tensor on an accelerator, since the ops would have to wait for it. The
learning rate is an argument of a kernel, so a captured CUDA graph keeps the learning rate of the capture.
"""

import functools
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lets_kernels.base.guarded import guarded_step
from lets_kernels.base.state import State, packed_state
from lets_kernels.base.variational import VariationalSGD
from lets_kernels.ops.declared import UNSCALED
from lets_kernels.space.buckets import Bucket, Member, Runs
from lets_kernels.space.memory import refuse_while_capturing

Group = Mapping[str, Any]
#: A step on some runs, a function of the gate and of the flag that says whether they are perturbed.
Taken = Callable[[Tensor, Tensor], None]
TakenStep = tuple[Runs, Taken]


def _not_plain(group: Group, names: tuple[str, ...]) -> str | None:
    """The option of a group that the ops do not know, in words, or None."""
    for name in names:
        if group.get(name):
            return f"{name}={group[name]!r}"
    if isinstance(group["lr"], Tensor) and group["lr"].device.type != "cpu":
        return "lr is a tensor on an accelerator"
    return None


@dataclass(frozen=True)
class FusedStep:
    """How one base optimizer is fused."""

    #: The op, and the options that it takes, numbers first.
    op: str
    numbers: tuple[str, ...]
    flags: tuple[str, ...] = ()
    #: The state tensors that the op takes, each with the option without which the optimizer does not keep it.
    lists: tuple[tuple[str, str | None], ...] = ()
    #: Options that the op does not know.
    unknown: tuple[str, ...] = ()

    @property
    def needs(self) -> tuple[str, ...]:
        """The names in a parameter's state after its first step."""
        return tuple(name for name, option in self.lists if option is None)

    def refuses(self, base: torch.optim.Optimizer, group: Group) -> str | None:
        """Why the optimizer must step by itself with a group's options, in words, or None."""
        if "betas" in self.numbers and any(isinstance(beta, Tensor) for beta in group["betas"]):
            return "betas are tensors"
        return _not_plain(group, self.unknown)

    def kinds(self, runs: Runs, groups: Sequence[Group]) -> list[tuple[Group, Runs]]:
        """The runs that one call of the op can step, each time with one of their groups: the runs whose flags are the
        same, and which keep the same state.
        """
        present, group_of = runs.bucket.present, runs.bucket.group_of
        if len(present) == 1:
            return [(groups[present[0]], runs)]
        options = (*self.flags, *(option for _, option in self.lists if option is not None))
        kind_of = {g: tuple(bool(groups[g][option]) for option in options) for g in present}
        by_kind: dict[tuple[bool, ...], list[int]] = {}
        for j, i in enumerate(runs.indices):
            by_kind.setdefault(kind_of[group_of[i]], []).append(j)
        if len(by_kind) == 1:
            return [(groups[group_of[runs.indices[0]]], runs)]
        return [(groups[group_of[runs.indices[places[0]]]], runs.only(places)) for places in by_kind.values()]

    def prepare(self, runs: Runs, groups: Sequence[Group], state: State) -> list[TakenStep] | None:
        """The steps on these runs; None if the state has another memory layout."""
        steps = []
        for group, each in self.kinds(runs, groups):
            step = self._prepare(each, group, groups, state)
            if step is None:
                return None
            steps.append((each, step))
        return steps

    def _prepare(self, runs: Runs, group: Group, groups: Sequence[Group], state: State) -> Taken | None:
        """The step on runs of one kind, of which ``group`` is one of the groups."""
        lists, suits = [], not runs.copies
        for name, option in self.lists:
            absent = option is not None and not group[option]
            begun = _steps(runs, state) if name == "step" else [] if absent else packed_state(runs, state, name)
            suits = suits and begun is not None
            lists.append(begun or [])
        if not suits:
            return None
        b = runs.bucket
        options: list[Any] = []
        for name in self.numbers:
            if name == "betas":
                for k in range(2):
                    options.append(b.by_run({g: float(groups[g]["betas"][k]) for g in b.present}, runs.indices))
            else:
                options.append(runs.option(groups, name))
        options += [bool(group[name]) for name in self.flags]

        def step(gate: Tensor, dirty: Tensor) -> None:
            grads = runs.pack(runs.grads)
            getattr(b.ops, self.op)(runs.weights, grads, *lists, b.saved, dirty, runs.table, gate, *options)

        return step


def _steps(runs: Runs, state: State) -> list[Tensor] | None:
    """Adam's step counts, one float32 tensor for each run, packed; None if they have another dtype.

    The counts are moved to the parameters' device, so that counting waits for nothing; torch's Adam reads them there
    too.
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
    return runs.bucket.pack(steps) if all(s.dtype is torch.float32 for s in steps) else None


class FusedLion(FusedStep):
    """Lion (Chen et al., 2023) from any package: torch has no Lion, so a class of that name is tried out first."""

    def refuses(self, base: torch.optim.Optimizer, group: Group) -> str | None:
        others = tuple((name, group[name]) for name in base.defaults if name not in self.numbers and name in group)
        for name, value in others:
            if isinstance(value, Tensor) or not isinstance(value, Hashable):
                return f"{name}={value!r}"
        if any(isinstance(x, Tensor) for x in (*group["betas"], group["weight_decay"])):
            return "betas or weight_decay are tensors"
        kind: Any = type(base)
        reason = _not_plain(group, tuple(name for name, _ in others))
        return reason or _steps_otherwise(kind, kind.step, tuple(map(float, group["betas"])), others)


@functools.lru_cache(maxsize=64)
def _steps_otherwise(
    kind: type, step: Any, betas: tuple[float, ...], others: tuple[tuple[str, Any], ...]
) -> str | None:
    """Why an optimizer's class is not Algorithm 2 of Chen et al. (2023), in words, or None. Takes two steps to find
    out.

    A new optimizer of the class, with the same options except learning rate and decay, must move a float64 parameter by
    the formula, and keep the average and nothing else. ``step`` is the class's method, a key in case it is replaced.
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
    except Exception as error:  # a class from another package may raise anything
        return f"{kind.__name__} could not be tried ({type(error).__name__}: {error})"
    kept = state.pop("exp_avg", None)
    alike = isinstance(kept, Tensor) and kept.shape == p.shape and not state
    # Sums of a few float64 numbers of at most 16, in any order.
    if alike and all(torch.allclose(x, y, rtol=0, atol=1e-14) for x, y in ((p.detach(), expected), (kept, average))):
        return None
    return f"{kind.__name__} does not step as Chen et al. (2023), Algorithm 2, say"


#: Without dampening momentum buffers begin at zero, so a skipped step can leave them at zero.
_SGD = FusedStep(
    "restore_sgd_",
    ("lr", "momentum", "weight_decay"),
    ("nesterov", "maximize"),
    lists=(("momentum_buffer", "momentum"),),
    unknown=("dampening", "differentiable"),
)
_ADAM = FusedStep(
    "restore_adamw_",
    ("lr", "betas", "eps", "weight_decay"),
    ("decoupled_weight_decay", "maximize"),
    lists=(("exp_avg", None), ("exp_avg_sq", None), ("step", None)),
    unknown=("amsgrad", "differentiable"),
)
_VARIATIONAL = FusedStep(
    "restore_bsam_", ("lr", "beta1", "weight_decay"), lists=(("exp_avg", None), ("precision", None))
)
_LION = FusedLion("restore_lion_", ("lr", "betas", "weight_decay"), lists=(("exp_avg", None),))

FUSED: dict[type, FusedStep] = {
    torch.optim.SGD: _SGD,
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
    VariationalSGD: _VARIATIONAL,
}


def fused_as(optimizer: type) -> FusedStep | None:
    """How an optimizer's class is fused; None if it is not. Lion is recognised by its name, and tried out later."""
    return FUSED.get(optimizer) or (_LION if optimizer.__name__ == "Lion" else None)


#: The folders of torch's code and of ours: the beginnings of file names.
OWN_CODE = tuple(f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parents[1]))


def _codes(step: Any) -> list[Any]:
    """The code of ``step`` and of each layer that it wraps. Attributes that functools.wraps copies say nothing."""
    codes, layer = [], getattr(step, "__func__", step)
    while layer is not None:
        codes.append(getattr(layer, "__code__", None))
        layer = getattr(layer, "__wrapped__", None)
    return codes


def _is_foreign(base: torch.optim.Optimizer) -> bool:
    """True if ``base.step()`` runs code that is not torch's (optimizers, and the wrappers of schedulers) and not that
    of a class that has been tried out.
    """
    tried = [] if type(base) in FUSED else _codes(type(base).step)
    for code in _codes(base.step):
        if code is None or not (code.co_filename.startswith(OWN_CODE) or code in tried):
            return True
    return False


def fused_by(base: torch.optim.Optimizer) -> FusedStep | str:
    """How the base optimizer's step is fused, or why it must step by itself, in words."""
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
    return kind


def prepared(base: torch.optim.Optimizer, runs: Iterable[Runs]) -> tuple[list[Callable[..., None]], str | None]:
    """The fused steps on these runs, each a function of the gate (and of what follows: see ``_take``), and the reason,
    in words, if the base optimizer must step by itself; or None.
    """
    kind = fused_by(base)
    if isinstance(kind, str):
        return [], kind
    steps: list[Callable[..., None]] = []
    for each in runs:
        found = kind.prepare(each, base.param_groups, base.state)
        if found is None:
            return [], "the state has another memory layout than the parameters"
        steps.append(functools.partial(_take, each.bucket, found))
    return steps, None


def _take(
    bucket: Bucket, steps: list[TakenStep], gate: Tensor, then: Callable[[], None] | None = None, saved: bool = False
) -> None:
    """Step all runs of a bucket, and leave it unperturbed: each call sets the flag that it is given to 0.

    ``then`` moves the weights on. If the weights from before the step are ``saved``, an interrupt before it has ended
    brings them back; state of the base optimizer that the step has moved stays moved.
    """
    gate, dirty = gate.to(bucket.device), bucket.dirty
    if then is not None:
        dirty = dirty.clone()
        bucket.dirty.fill_(int(saved))
    for place, (runs, step) in enumerate(steps):
        step(gate, dirty if place == len(steps) - 1 else dirty.clone())
        runs.write_back()
    if then is not None:
        then()
        bucket.dirty.zero_()


def _unscaled(*_: Any) -> tuple[int, int]:
    return UNSCALED, 0


class OwnStep:
    """Steps of an optimizer for the package's own scalars: fused if the ops can, otherwise guarded."""

    def __init__(self) -> None:
        self._buckets: dict[int, Bucket] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_buckets": {}}

    def __call__(self, optimizer: torch.optim.Optimizer, gate: Tensor, backend: str) -> None:
        """Step along the present gradients by the ops of ``backend``, if ``gate`` is not zero."""
        steps, _ = prepared(optimizer, self._runs(optimizer, backend))
        if not steps:
            guarded_step(optimizer, gate)
            return
        for step in steps:
            step(gate)
        optimizer.__dict__["_opt_called"] = True  # what LR schedulers look at

    def make_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the state that the first step would make, which begins at zero, if the ops take that step."""
        prepared(optimizer, self._runs(optimizer, "reference", every=True))

    def _runs(self, optimizer: torch.optim.Optimizer, backend: str, every: bool = False) -> Iterator[Runs]:
        """One ``Runs`` for each parameter with a gradient, or for ``every`` one. Makes missing buckets."""
        for index, group in enumerate(optimizer.param_groups):
            for place, p in enumerate(group["params"]):
                if not every and p.grad is None:
                    continue
                found = self._buckets.get(id(p))
                if found is None or found.backend != backend or not found.is_current():
                    member = Member(p, None, index, place)
                    found = Bucket([member], 0, optimizer.param_groups, _unscaled, backend, flatten=False)
                    self._buckets[id(p)] = found
                yield Runs(found, (0,), [p.detach()], [] if p.grad is None else [p.grad])
