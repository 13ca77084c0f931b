"""What surrounds the passes of a step, and what the optimizer knows of the module it trains (``model=``).

A step has two passes, but some things must count only one, or draw the same numbers in both: running statistics, random
masks, gradients that are synchronised between ranks. Owners of second copies of the weights must know when they move.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from lets_kernels.ops.memory import capturing
from lets_kernels.space.memory import refuse_while_capturing

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


#: The entries of running_state=: a module, a class of modules, or a name of a module or a buffer.
Named: TypeAlias = torch.nn.Module | type[torch.nn.Module] | str
_NORM_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass
class _HeldBuffer:
    """The value of a buffer at ``hold``, and the module that it belongs to."""

    module: torch.nn.Module
    name: str
    tensor: Tensor
    copy: Tensor
    version: int

    def in_place(self) -> bool:
        """True if the module still has this tensor, and the copy can be written into it."""
        return self.module._buffers.get(self.name) is self.tensor and self.tensor.shape == self.copy.shape

    def put_back(self) -> None:
        """Give the module back the buffer that it has replaced. The memory of the new buffer is not written."""
        now, old = self.module._buffers.get(self.name), self.tensor
        moved = now is not None and (now.device, now.dtype) != (old.device, old.dtype)  # module.to() replaces buffers
        if moved or old is now or old._version != self.version:
            like = old if now is None else now
            old = self.copy.to(like.device, like.dtype, copy=True)
        self.module._buffers[self.name] = old


class RunningStatistics:
    """Makes running means and variances count the pass at θ, once a step, and no pass at other weights.

    This covers batch norm of every kind, SyncBatchNorm and instance norm, with any momentum, and everything that is
    named. The buffers are copied when the passes at θ are over, and brought back when the passes at other weights are
    over. ``hold`` and ``release`` may be called any number of times.
    """

    def __init__(self) -> None:
        self._model: torch.nn.Module | None = None
        self._named: tuple[Named, ...] = ()
        self._copies: list[Tensor] = []
        self._held: list[_HeldBuffer] = []

    def bind(self, model: torch.nn.Module | None, named: tuple[Named, ...] = ()) -> None:
        """Guard the statistics of this model: of the modules, and of what ``named`` finds, at the time of each hold."""
        self._model, self._named = model, named

    def _buffers(self) -> list[tuple[torch.nn.Module, str, Tensor]]:
        model = self._model
        if model is None:
            return []
        norms = [m for m in model.modules() if isinstance(m, _NormBase)]
        places: list[tuple[torch.nn.Module, str]] = [(m, name) for m in norms for name in _NORM_BUFFERS]
        for each in self._named:
            places += buffers_of(model, each)
        unique = {(id(m), name): (m, name) for m, name in places}
        found = [(m, name, m._buffers.get(name)) for m, name in unique.values()]
        return [(m, name, b) for m, name, b in found if b is not None]

    def hold(self) -> None:
        """From here on, ``release`` undoes what is counted."""
        if self._held or self._model is None:
            return
        places = self._buffers()
        buffers = [b for _, _, b in places]
        if [(c.shape, c.dtype, c.device) for c in self._copies] != [(b.shape, b.dtype, b.device) for b in buffers]:
            refuse_while_capturing("the copy of the running statistics")
            self._copies = [torch.empty_like(b) for b in buffers]
        _copy(self._copies, buffers)
        pairs = zip(places, self._copies, strict=True)
        self._held = [_HeldBuffer(m, name, b, copy, b._version) for (m, name, b), copy in pairs]

    def keep(self) -> None:
        """Keep what was counted since ``hold``."""
        self._held = []

    def release(self) -> None:
        """Bring the statistics back to their values at ``hold``."""
        if not self._held:
            return
        kept = [h for h in self._held if h.in_place()]
        if kept:
            _copy([h.tensor for h in kept], [h.copy for h in kept])
        for h in self._held:
            if not h.in_place():
                h.put_back()
        self._held = []  # last, so that a release that an interrupt cut short is done again


def buffers_of(model: torch.nn.Module, named: Named) -> list[tuple[torch.nn.Module, str]]:
    """The buffers that an entry of ``running_state=`` (a module, a class or a name) stands for, as (module, name)."""
    if isinstance(named, str):
        modules = [m for name, m in model.named_modules(remove_duplicate=False) if name == named]
        if not modules:
            prefix, _, last = named.rpartition(".")
            owners = [m for name, m in model.named_modules(remove_duplicate=False) if name == prefix]
            return [(m, last) for m in owners if last in m._buffers]
    elif isinstance(named, type):
        modules = [m for m in model.modules() if isinstance(m, named)]
    else:
        modules = [m for m in model.modules() if m is named]
    return [(inner, name) for m in modules for inner in m.modules() for name in inner._buffers]


def check_running_state(model: torch.nn.Module | None, named: Iterable[Named]) -> tuple[Named, ...]:
    """``running_state=`` as a tuple.

    Raises:
        TypeError: the value is no list of modules, classes of modules and names.
        ValueError: an entry stands for no buffer of the model, or there is no model.
    """
    if isinstance(named, (str, type)) or not isinstance(named, Iterable):
        raise TypeError(f"running_state must be a list of modules, module classes or names, not {named!r}")
    found = tuple(named)
    if found and model is None:
        raise ValueError("running_state names what lies in the model: pass model=, the module that is trained")
    for each in found:
        if not isinstance(each, (str, torch.nn.Module)) and not (
            isinstance(each, type) and issubclass(each, torch.nn.Module)
        ):
            raise TypeError(f"running_state holds modules, module classes and names, not {each!r}")
        assert model is not None
        if not buffers_of(model, each):
            what = repr(each) if isinstance(each, str) else getattr(each, "__name__", type(each).__name__)
            raise ValueError(
                f"running_state: {what} stands for no buffer of the model. Names are those of model.named_modules() "
                "and model.named_buffers(), with the prefixes of wrappers; what is no buffer yet becomes one by "
                "register_buffer()"
            )
    return found


def _copy(to: list[Tensor], source: list[Tensor]) -> None:
    """Copy with few launches: one for every dtype and device."""
    kinds: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]] = {}
    for home, value in zip(to, source, strict=True):
        pair = kinds.setdefault((home.dtype, home.device), ([], []))
        pair[0].append(home)
        pair[1].append(value)
    with torch.no_grad():
        for homes, values in kinds.values():
            torch._foreach_copy_(homes, values)


class SameRandomNumbers:
    """Draws the random numbers of the first pass again in the second: dropout then has the same masks in both.

    Covers torch's generators on the CPU and on the devices of the parameters.
    """

    def __init__(self) -> None:
        self._states: dict[torch.device, Tensor] | None = None

    @property
    def recorded(self) -> bool:
        return self._states is not None

    def record(self, devices: Iterable[torch.device]) -> None:
        """Remember the states of the generators: the first pass begins."""
        if capturing():
            raise RuntimeError("same_rng=True cannot be captured in a CUDA graph: the host sets the generators back")
        states = {torch.device("cpu"): torch.get_rng_state()}
        for device in devices:
            if device.type != "cpu":
                states[device] = torch.get_device_module(device.type).get_rng_state(device)
        self._states = states

    def replay(self, last: bool = True) -> None:
        """Set the generators back: another pass begins, the last one that draws the same numbers or one before it."""
        states = self._states or {}
        if last:
            self._states = None
        for device, state in states.items():
            if device.type == "cpu":
                torch.set_rng_state(state)
            else:
                torch.get_device_module(device.type).set_rng_state(state, device)

    def forget(self) -> None:
        self._states = None


class Network:
    """The module that an optimizer trains, or None; and what has to happen around its passes and its weights.

    Args:
        model: the module, with its wrapper of DistributedDataParallel or sharded by ``fully_shard``, if it is used.
        sync_perturbation: False leaves the first pass of a DistributedDataParallel model unsynchronised.
        same_rng: the second pass draws the same random numbers as the first pass.
        running_state: what else, beside normalisation layers, counts only the passes at θ.

    Raises:
        ValueError: ``sync_perturbation=False`` without a DistributedDataParallel model; ``running_state`` stands for
            nothing in the model.
        TypeError: ``running_state`` is no list of modules, classes and names.
    """

    def __init__(
        self,
        model: torch.nn.Module | None,
        sync_perturbation: bool,
        same_rng: bool,
        running_state: Iterable[Named] = (),
    ) -> None:
        if not sync_perturbation and not isinstance(model, DistributedDataParallel):
            raise ValueError(
                "sync_perturbation=False keeps each rank's own first gradient, and so needs the "
                "DistributedDataParallel module as model=. In one process, give step() a list of closures, one a "
                "micro-batch; with a sharded model (FSDP) no rank has a gradient of its own"
            )
        self.model, self.sync_perturbation, self.same_rng = model, sync_perturbation, same_rng
        self.running_state = check_running_state(model, running_state)
        self.statistics, self.numbers = RunningStatistics(), SameRandomNumbers()
        self._sharded: list[FSDPModule] = []
        self._roots: list[FSDPModule] = []
        #: True if a first pass has ended, and no step has followed it yet.
        self.passed = False
        self.bind()

    def bind(self) -> None:
        """Look at the modules, as they are when the optimizer builds its tables.

        Raises:
            TypeError: FullyShardedDataParallel, the first version.
        """
        modules = list(self.model.modules()) if self.model is not None else []
        # Importing FSDP takes most of a second; if it is not imported yet, no module is sharded.
        fsdp = sys.modules.get("torch.distributed.fsdp")
        if fsdp is not None and any(isinstance(m, fsdp.FullyShardedDataParallel) for m in modules):
            raise TypeError(
                "FullyShardedDataParallel flattens parameters in a way that hides which rank holds what; shard the "
                "model with torch.distributed.fsdp.fully_shard"
            )
        sharded = [m for m in modules if isinstance(m, fsdp.FSDPModule)] if fsdp is not None else []
        inner = {id(child) for m in sharded for child in m.modules() if child is not m}
        self._sharded, self._roots = sharded, [m for m in sharded if id(m) not in inner]
        self.statistics.bind(self.model, self.running_state)

    def names(self) -> dict[int, str]:
        """Names by the id of the parameter."""
        return {id(p): name for name, p in self.model.named_parameters()} if self.model is not None else {}

    @contextmanager
    def first_pass(self, devices: Iterable[torch.device]) -> Iterator[None]:
        """A context around forward and backward of the first pass.

        Raises:
            RuntimeError: the model cannot leave a pass unsynchronised, or the forward was not inside.
        """
        self.passed = False
        if self.same_rng:
            self.numbers.record(devices)
        with ExitStack() as stack:
            if not self.sync_perturbation:
                stack.enter_context(self._unsynchronised())
            yield
        self.passed = True

    @contextmanager
    def _unsynchronised(self) -> Iterator[None]:
        model = self.model
        assert isinstance(model, DistributedDataParallel)
        if model.static_graph:
            raise RuntimeError(
                "a DistributedDataParallel model with static_graph=True synchronises as in its first pass: set "
                "static_graph=False, or sync_perturbation=True"
            )
        forwards = []
        hook = model.register_forward_pre_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
        try:
            with model.no_sync():
                yield
        finally:
            hook.remove()
        if not any(forwards):
            raise RuntimeError(
                "no forward pass inside first_pass(): with sync_perturbation=False both forward and backward of the "
                "first pass belong inside, or its gradients are synchronised all the same"
            )

    def forget_pass(self) -> None:
        """The gradients of a first pass are dropped: no step may be taken from that pass."""
        if self.passed:
            self.passed = False
            self.numbers.forget()

    def _has_one_of(self, params: Iterable[Tensor]) -> bool:
        self.weights_move()  # otherwise FSDP may have other weights in their place
        known = {id(p) for p in self.model.parameters()} if self.model is not None else set()
        return not known or any(id(p) in known for p in params)

    def check_parameters(self, params: Iterable[Tensor]) -> None:
        """For a pass that gave none of these parameters a gradient: ``RuntimeError`` if the model has none of them."""
        if not self._has_one_of(params):
            raise RuntimeError(
                "the model has other parameters than this optimizer by now, so none of them would be trained: call "
                "model.load_state_dict() without assign=True, or build the optimizer after it"
            )

    def check_holds(self, params: Iterable[Tensor]) -> None:
        """``ValueError`` for a model that holds none of these parameters, such as an averaged copy of the network."""
        if not self._has_one_of(params):
            raise ValueError(
                f"model= is a {type(self.model).__name__} that holds none of the parameters given to this optimizer: "
                "pass the network that is trained, whose parameters() these are, and not a copy or an average of it"
            )

    def check_first_pass(self) -> None:
        """``RuntimeError`` if the first gradients had to be made inside ``first_pass()``, and were not."""
        passed, self.passed = self.passed, False
        option = "same_rng=True" if self.same_rng else "sync_perturbation=False"
        if not passed and (self.same_rng or not self.sync_perturbation):
            raise RuntimeError(
                f"{option} needs to know where the first pass begins and ends: put its forward and backward into "
                "`with opt.first_pass():`, or let step(closure) call the closure for both"
            )

    def weights_move(self) -> None:
        """Drop copies of the weights, before or after the weights are written: later passes would use the copies.

        The copies are unsharded parameters, which FSDP keeps after some passes, and the casts that autocast remembers.
        """
        for m in self._sharded:
            m.reshard()
        if torch.is_autocast_cache_enabled():
            torch.clear_autocast_cache()

    def pass_failed(self) -> None:
        """A pass may have been cut short. FSDP then believes that it is still inside, and keeps gathered weights."""
        for m in self._roots:
            try:
                m.reset_iter_state()
            except (AttributeError, RuntimeError):  # an older torch, or a root module outside of the model
                m.set_reshard_after_forward(True)  # then reshard() takes effect; the backward has to gather once more

    def perturbed(self, last: bool = True) -> None:
        """The weights are at θ + ε, and a pass begins there: the last one of the step, or one before it."""
        if self.same_rng:
            self.numbers.replay(last)
