"""What surrounds the passes of a step, and what the optimizer knows of the module that it trains (``model=``).

Two passes a step are one too many for whatever counts passes or draws numbers: running statistics, random masks,
gradients that are synchronised between ranks. And whoever keeps a second copy of the weights must hear when they move.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from lets_kernels.runs import capturing, refuse_while_capturing

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


class RunningStatistics:
    """Running means and variances count the passes at θ, once a step, and not those at other weights.

    For batch norm of every kind, SyncBatchNorm and instance norm, whatever their momentum: their buffers are copied
    when the passes at θ are over, and brought back when those at other weights are. ``hold`` and ``release`` may be
    called any number of times.
    """

    def __init__(self) -> None:
        self._model: torch.nn.Module | None = None
        self._copies: list[Tensor] = []
        self._held: list[tuple[Tensor, Tensor]] = []

    def bind(self, model: torch.nn.Module | None) -> None:
        """Guard the statistics of this model: of the modules that it has at every ``hold``."""
        self._model = model

    def _buffers(self) -> list[Tensor]:
        modules = [m for m in self._model.modules() if isinstance(m, _NormBase)] if self._model is not None else []
        buffers = [b for m in modules for b in (m.running_mean, m.running_var, m.num_batches_tracked)]
        return [b for b in buffers if b is not None]

    def hold(self) -> None:
        """From here on what is counted is undone by ``release``."""
        if self._held:
            return
        buffers = self._buffers()
        if [(c.shape, c.dtype, c.device) for c in self._copies] != [(b.shape, b.dtype, b.device) for b in buffers]:
            refuse_while_capturing("the copy of the running statistics")
            self._copies = [torch.empty_like(b) for b in buffers]
        _copy(self._copies, buffers)
        self._held = list(zip(buffers, self._copies, strict=True))

    def release(self) -> None:
        """Bring the statistics back to where they were at ``hold``."""
        if self._held:
            _copy(*map(list, zip(*self._held, strict=True)))
            self._held = []


def _copy(to: list[Tensor], source: list[Tensor]) -> None:
    """In few launches: one for every dtype and device."""
    kinds: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]] = {}
    for home, value in zip(to, source, strict=True):
        pair = kinds.setdefault((home.dtype, home.device), ([], []))
        pair[0].append(home)
        pair[1].append(value)
    with torch.no_grad():
        for homes, values in kinds.values():
            torch._foreach_copy_(homes, values)


class SameRandomNumbers:
    """The random numbers of the first pass, once more for the second: dropout then has the same masks in both.

    torch's generators on the CPU and on the devices of the parameters.
    """

    def __init__(self) -> None:
        self._states: dict[torch.device, Tensor] | None = None

    @property
    def recorded(self) -> bool:
        return self._states is not None

    def record(self, devices: Iterable[torch.device]) -> None:
        """Remember where the generators stand: the first pass begins."""
        if capturing():
            raise RuntimeError("same_rng=True cannot be captured in a CUDA graph: the host sets the generators back")
        states = {torch.device("cpu"): torch.get_rng_state()}
        for device in devices:
            if device.type != "cpu":
                states[device] = torch.get_device_module(device.type).get_rng_state(device)
        self._states = states

    def replay(self) -> None:
        """Set the generators back: the second pass begins."""
        states, self._states = self._states, None
        for device, state in (states or {}).items():
            if device.type == "cpu":
                torch.set_rng_state(state)
            else:
                torch.get_device_module(device.type).set_rng_state(state, device)

    def forget(self) -> None:
        self._states = None


class Network:
    """The module that an optimizer trains, or None: what has to happen around its passes and its weights.

    Args:
        model: the module, wrapped by DistributedDataParallel or ``fully_shard`` where it is.
        sync_perturbation: False leaves the first pass of a DistributedDataParallel model unsynchronised.
        same_rng: the second pass draws the random numbers of the first.

    Raises:
        ValueError: ``sync_perturbation=False`` without a DistributedDataParallel model.
    """

    def __init__(self, model: torch.nn.Module | None, sync_perturbation: bool, same_rng: bool) -> None:
        if not sync_perturbation and not isinstance(model, DistributedDataParallel):
            raise ValueError(
                "sync_perturbation=False keeps each rank's own first gradient, and so needs the "
                "DistributedDataParallel module as model=. In one process, give step() a list of closures, one a "
                "micro-batch; with a sharded model (FSDP) no rank has a gradient of its own"
            )
        self.model, self.sync_perturbation, self.same_rng = model, sync_perturbation, same_rng
        self.statistics, self.numbers = RunningStatistics(), SameRandomNumbers()
        self._sharded: list[FSDPModule] = []
        self._roots: list[FSDPModule] = []
        self._passed = False
        self.bind()

    def bind(self) -> None:
        """Look at the modules, as they are when the optimizer builds its tables.

        Raises:
            TypeError: FullyShardedDataParallel, the first version.
        """
        modules = list(self.model.modules()) if self.model is not None else []
        # Importing FSDP takes most of a second; where nobody has done so, no module is sharded.
        fsdp = sys.modules.get("torch.distributed.fsdp")
        if fsdp is not None and any(isinstance(m, fsdp.FullyShardedDataParallel) for m in modules):
            raise TypeError(
                "FullyShardedDataParallel flattens parameters in a way that hides which rank holds what; shard the "
                "model with torch.distributed.fsdp.fully_shard"
            )
        sharded = [m for m in modules if isinstance(m, fsdp.FSDPModule)] if fsdp is not None else []
        inner = {id(child) for m in sharded for child in m.modules() if child is not m}
        self._sharded, self._roots = sharded, [m for m in sharded if id(m) not in inner]
        self.statistics.bind(self.model)

    def names(self) -> dict[int, str]:
        """Names by the id of the parameter."""
        return {id(p): name for name, p in self.model.named_parameters()} if self.model is not None else {}

    @contextmanager
    def first_pass(self, devices: Iterable[torch.device]) -> Iterator[None]:
        """Around forward and backward of the first pass.

        Raises:
            RuntimeError: the model cannot leave a pass unsynchronised, or the forward was not inside.
        """
        self._passed = False
        if self.same_rng:
            self.numbers.record(devices)
        with ExitStack() as stack:
            if not self.sync_perturbation:
                stack.enter_context(self._unsynchronised())
            yield
        self._passed = True

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
        """The gradients of a first pass that has ended are dropped: no step may be taken from it."""
        if self._passed:
            self._passed = False
            self.numbers.forget()

    def check_parameters(self, params: Iterable[Tensor]) -> None:
        """After a pass that left none of these a gradient: ``RuntimeError`` if none is the model's any more."""
        self.weights_move()  # else FSDP may have others in their place
        known = {id(p) for p in self.model.parameters()} if self.model is not None else set()
        if known and not any(id(p) in known for p in params):
            raise RuntimeError(
                "the model has other parameters than this optimizer by now, so none of them would be trained: call "
                "model.load_state_dict() without assign=True, or build the optimizer after it"
            )

    def check_first_pass(self) -> None:
        """``RuntimeError`` if the first gradients were not made as was asked for."""
        passed, self._passed = self._passed, False
        option = "same_rng=True" if self.same_rng else "sync_perturbation=False"
        if not passed and (self.same_rng or not self.sync_perturbation):
            raise RuntimeError(
                f"{option} needs to know where the first pass begins and ends: put its forward and backward into "
                "`with opt.first_pass():`, or let step(closure) call the closure for both"
            )

    def weights_move(self) -> None:
        """Before or after the weights are written: drop copies of them, which later passes would use instead.

        Those are unsharded parameters, which FSDP keeps after some passes, and the casts that autocast remembers.
        """
        for m in self._sharded:
            m.reshard()
        if torch.is_autocast_cache_enabled():
            torch.clear_autocast_cache()

    def pass_failed(self) -> None:
        """A pass may have been cut short. FSDP then takes itself to be within it, and keeps what it has gathered."""
        for m in self._roots:
            try:
                m.reset_iter_state()
            except (AttributeError, RuntimeError):  # a torch that lacks it, or a root that lies outside of the model
                m.set_reshard_after_forward(True)  # reshard() takes effect then; costs a gathering in the backward

    def perturbed(self) -> None:
        """The passes at θ are over, those at θ + ε begin."""
        if self.same_rng:
            self.numbers.replay()
