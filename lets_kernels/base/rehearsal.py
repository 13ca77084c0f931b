"""What an optimizer's next step would be: taken on copies, so that weights, state and options stay as they are."""

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lets_kernels.base.foreign import without_global_hooks
from lets_kernels.space.buckets import Runs
from lets_kernels.space.shards import local, whole_gradient

#: Attributes of an optimizer that its shadow does not get: hooks are of the optimizer itself, and so is a ``step`` that
#: an LR scheduler has wrapped.
_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
_NARROW = (torch.float16, torch.bfloat16)
#: Into so many parts the parameters of torch's own optimizers are split.
_SHARES = 8

#: A parameter, its gradient, and where to write.
_Row = tuple[Tensor, Tensor, Tensor]


@torch.no_grad()
def rehearse(optimizer: torch.optim.Optimizer, passes: Sequence[Runs], into: Sequence[list[Tensor]]) -> None:
    """Write how far each parameter would move, as −Δθ/lr: what the optimizer would subtract at a learning rate of one.

    The optimizer's own ``step`` runs, on a double with copies of the weights, of the gradients, and of the state, so it
    sees the same numbers. Weight decay is left out, and so are hooks. A group whose learning rate is 0 steps with 1.
    Weights of 16 bits, and their state, are copied in float32: in 16 bits a small step would be lost in the weight.
    Torch's own optimizers step every parameter by itself, so they get an eighth of the parameters at a time, and the
    copies are small.

    Args:
        optimizer: the optimizer. Random numbers that its step draws are drawn again by the step itself.
        passes: the parameters with their gradients.
        into: for each of ``passes`` one tensor a run, of the run's shape, for this rank's part, complex numbers as
            pairs.

    Raises:
        RuntimeError: the step fails on the double.
    """
    each: list[_Row] = []
    for runs, to in zip(passes, into, strict=True):
        each += zip((runs.bucket.params[i] for i in runs.indices), runs.grads, to, strict=True)
    by_itself = type(optimizer).__module__.startswith("torch.optim.")
    most = sum(p.numel() for p, *_ in each) / (_SHARES if by_itself else 1)  # the same on ranks that share a parameter
    some, size = list[_Row](), 0
    for row in each:
        some.append(row)
        size += row[0].numel()
        if row is each[-1] or size >= most:
            _rehearse(optimizer, some)
            some, size = [], 0


def _rehearse(optimizer: torch.optim.Optimizer, each: Sequence[_Row]) -> None:
    """The step on some of the parameters."""
    doubles: dict[int, Tensor] = {}  # by the id of the parameter
    for p, g, _ in each:
        doubles[id(p)] = double = torch.nn.Parameter(_tensor(p, p.dtype in _NARROW))
        double.grad = whole_gradient(_tensor(g, True), p)
    shadow = _shadow(optimizer, doubles)
    rates = {id(d): group.get("lr", 1.0) for group in shadow.param_groups for d in group["params"]}
    devices = {d.device.index for d in doubles.values() if d.device.type == "cuda"}
    try:
        with without_global_hooks(), torch.random.fork_rng(devices=sorted(devices)):
            shadow.step()
    except Exception as error:
        raise RuntimeError(
            f"{type(optimizer).__name__}.step() failed on copies of the weights and the state, on which it shows where "
            f"it would go ({type(error).__name__}: {error}); direction=Gradient() perturbs along the gradient itself"
        ) from error
    for p, _, to in each:
        own = doubles[id(p)]
        to.copy_(local(own).detach().sub_(local(p).detach()).div_(-rates[id(own)]))


def _tensor(t: Tensor, widen: bool) -> Tensor:
    """A copy; of 16 bits in float32, if they are to be widened."""
    return t.detach().to(torch.float32 if widen and t.dtype in _NARROW else t.dtype, copy=True)


def _shadow(optimizer: torch.optim.Optimizer, doubles: dict[int, Tensor]) -> torch.optim.Optimizer:
    """An optimizer of the same class over the doubles of the parameters that have one, with copies of all it keeps."""
    made: Any = object.__new__(type(optimizer))
    left_out = {"state", "param_groups", "step", *_HOOKS}
    made.__dict__.update({k: _copied(v, doubles) for k, v in optimizer.__dict__.items() if k not in left_out})
    made.__dict__.update({name: OrderedDict() for name in _HOOKS})
    made.state = defaultdict(dict)
    for key, value in optimizer.state.items():
        if not isinstance(key, Tensor):
            made.state[key] = _copied(value, doubles)
        elif id(key) in doubles:
            made.state[doubles[id(key)]] = _copied(value, doubles, wide=key.dtype in _NARROW)
    made.param_groups = []
    for group in optimizer.param_groups:
        options = {name: _copied(value, doubles) for name, value in group.items() if name != "params"}
        if "weight_decay" in options:
            options["weight_decay"] = 0.0
        if "lr" in options:
            options["lr"] = _rate(options["lr"])
        params = [doubles[id(p)] for p in group["params"] if id(p) in doubles]
        made.param_groups.append({"params": params, **options})
    return made


def _rate(lr: Any) -> Any:
    """The learning rate, or 1 for 0. A number where that waits for nothing: a number goes with every option."""
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        return torch.where(lr == 0, 1.0, lr)
    return float(lr) or 1.0


def _copied(value: Any, doubles: dict[int, Tensor], wide: bool = False) -> Any:
    """Tensors, and containers of them, as copies; a parameter is its double. Other objects are the same."""
    if isinstance(value, Tensor):
        return doubles[id(value)] if id(value) in doubles else _tensor(value, wide)
    if isinstance(value, dict):
        found = copy.copy(value)  # of its own kind, such as a defaultdict
        found.clear()
        found.update({doubles.get(id(k), k): _copied(v, doubles, wide) for k, v in value.items()})
        return found
    if type(value) in (list, tuple, set):
        return type(value)(_copied(v, doubles, wide) for v in value)
    return value
