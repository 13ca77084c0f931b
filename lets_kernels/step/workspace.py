"""What every step works with: the settings, the base optimizer, what is kept from step to step, and the tables.

The tables of the parameters are built anew when groups or parameters have changed, with all that depends on them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lets_kernels.around.amp import LossScaling, Scaler
from lets_kernels.around.publication import Publication
from lets_kernels.base.state import Look
from lets_kernels.ops.layouts import gradients
from lets_kernels.parts.passes import FirstPass
from lets_kernels.parts.progress import Progress
from lets_kernels.parts.samples import Pass
from lets_kernels.space.buckets import Bucket, Runs
from lets_kernels.space.layout import ParameterSpace
from lets_kernels.step.fallback import warn_without_kernels
from lets_kernels.step.precision import warn_of_narrow
from lets_kernels.step.setting import Setting


class Tables:
    """The buckets of an optimizer's parameters."""

    def __init__(
        self, setting: Setting, base: torch.optim.Optimizer, progress: Progress, publication: Publication
    ) -> None:
        self._setting, self._base, self._progress, self._publication = setting, base, progress, publication
        #: The buckets as they were built last; see :meth:`current`.
        self.space: ParameterSpace | None = None
        #: The last measurement of a perturbation of 16-bit weights; empty until these tables have one.
        self.precision: dict[str, Tensor] = {}
        #: Some of the parameters have 16 bits.
        self.narrow = False
        #: What captured CUDA graphs read and write. Replays still need it after something has replaced it here.
        self.captured: list[Any] = []

    def current(self) -> ParameterSpace:
        """The buckets, built anew if the groups or the parameters have changed."""
        if self.space is None or not self.space.is_current(self._base.param_groups):
            setting = self._setting
            self.take_in_new_groups()
            self.forget_replaced()
            setting.network.bind()
            setting.network.weights_move()  # then each rank's modules hold its own shards of the parameters
            setting.direction.bind(setting.model)
            self._publication.cover(setting.model)
            space = ParameterSpace(
                self._base.param_groups,
                setting.network.names(),
                setting.direction.geometry,
                setting.backend,
                setting.flatten,
                setting.direction.filter_dim,
            )
            self._check_ranks(space)
            self.narrow = warn_of_narrow(space.buckets)
            warn_without_kernels(setting.backend, space.buckets)
            self.space, self.precision = space, {}
            self._move_scalars(space.buckets)
        return self.space

    def agreed(self) -> ParameterSpace:
        """Like :meth:`current`, for places that all ranks reach: they agree on the seed before anything is drawn."""
        space = self.current()
        self._progress.random.agree(self._setting.replicas)
        return space

    def take_in_new_groups(self) -> None:
        """Give groups that were added to the base optimizer the keys that they lack."""
        groups, keys = self._base.param_groups, self._setting.group_keys
        if any(name not in group for group in groups for name in keys):
            self._setting.direction.check_base(Look.at(self._base))
            for group in groups:
                for name, value in keys.items():
                    group.setdefault(name, value)
            self._setting.radius.bind(groups, self._progress.home)

    def forget_replaced(self) -> None:
        """Drop what is kept for parameters that were replaced in their groups, and are in no group any more.

        If a parameter was taken out, so that its group is shorter now, what is kept for it stays, as in torch.
        """
        groups = [list(group["params"]) for group in self._base.param_groups]
        present = {id(p) for group in groups for p in group}
        placed = self._progress.placed
        known = placed if len(placed) <= len(groups) else ()  # fewer groups: one was taken out
        for before, now in zip(known, groups, strict=False):
            for p in before if len(before) == len(now) else ():
                if id(p) not in present:
                    self._progress.held.state.pop(p, None)
                    self._base.state.pop(p, None)
        self._progress.placed = groups

    def keep_for_graphs(self) -> None:
        """Keep what the CUDA graph that is being captured refers to, as long as this optimizer lives.

        Later steps may replace the tensors here (``load_state_dict`` does), but not in the graph.
        """
        state = [t for entry in self._base.state.values() for t in entry.values() if isinstance(t, Tensor)]
        radii = [g["rho"] for g in self._base.param_groups if isinstance(g["rho"], Tensor)]
        held = [t for entry in self._progress.held.state.values() for t in entry.values()]
        self.captured.append((self.current(), state, radii, held))

    def _check_ranks(self, space: ParameterSpace) -> None:
        """Find the ranks that take part, and refuse settings that would go wrong among them without an error."""
        setting, random = self._setting, self._progress.random
        if setting.model is None and any(b.spread for b in space.buckets):
            raise ValueError(
                "DTensor parameters need model=, the sharded module: its unsharded copies of the weights have to be "
                "dropped whenever the weights move"
            )
        setting.replicas.find(setting.model, [p for b in space.buckets for p in b.params])
        shared: Mapping[str, bool] = {
            "a radius that is learned or finds itself": setting.radius.moves,
            "random decisions": random.used and not random.given,
            "decisions by the gradient": setting.schedule.looks_at_gradient,
        }
        what = next((name for name, present in shared.items() if present), None)
        if setting.replicas.unclear and what is not None:
            raise ValueError(
                f"several ranks are there, and {what} must be the same on all that train one model: pass model=, the "
                "DistributedDataParallel module, or process_group=; process_group='alone' if each rank trains a model "
                "of its own"
            )

    def _move_scalars(self, buckets: list[Bucket]) -> None:
        """Move counters and radii to the device of the first parameters."""
        progress = self._progress
        if buckets and buckets[0].device != progress.home:
            progress.to(buckets[0].device)
            self._setting.radius.to(progress.home)
        progress.random.to(progress.home)


@dataclass(eq=False)
class Workspace:
    """What every step works with. Whether a step has begun is not kept here but in ``Now``."""

    setting: Setting
    base: torch.optim.Optimizer  # whose groups and state are the optimizer's
    progress: Progress
    tables: Tables
    scaling: LossScaling = field(default_factory=LossScaling)
    #: The number of the micro-batch that is under way, and how many make the step.
    piece: tuple[int, int] = (0, 1)
    _open: Tensor | None = None

    @property
    def groups(self) -> list[dict[str, Any]]:
        return self.base.param_groups

    def params(self) -> list[Tensor]:
        """The parameters, in the order in which a saved state numbers them."""
        return [p for group in self.base.param_groups for p in group["params"]]

    def gradients(self) -> list[Tensor]:
        """The gradients of the parameters that have one."""
        each = [gradients(group["params"]) for group in self.base.param_groups]
        return each[0] if len(each) == 1 else list(chain.from_iterable(each))

    def open_gate(self, device: torch.device, captured: bool) -> Tensor:
        """The gate of a step that is not in doubt: 1. A graph that is captured makes its own."""
        if captured:
            return torch.ones((), dtype=torch.float64, device=device)
        if self._open is None or self._open.device != device:
            self._open = torch.ones((), dtype=torch.float64, device=device)
        return self._open

    def has_gradient(self) -> bool:
        """True if a parameter has a gradient."""
        for group in self.base.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.requires_grad:
                    return True
        return False

    def drop_gradients(self) -> None:
        for group in self.base.param_groups:
            for p in group["params"]:
                p.grad = None

    def first_pass(
        self,
        runs: list[Runs],
        keeps: bool = False,
        synced: bool = True,
        ascent: int = 0,
        carried: dict[int, Tensor] | None = None,
    ) -> FirstPass:
        """The first pass as a direction sees it.

        Args:
            runs: the runs of the buckets that take part.
            keeps: the vectors of the perturbation are needed after it.
            synced: False for the gradients of this rank alone.
            ascent: which ascent of the step this is, from 0.
            carried: what the direction keeps from one ascent to the next.
        """
        progress = self.progress
        return FirstPass(
            runs=runs,
            groups=self.base.param_groups,
            step=progress.step,
            home=progress.skipped.device,
            replicas=self.setting.replicas if synced else None,
            random=progress.random,
            held=progress.held,
            base=Look.at(self.base),
            keeps=keeps,
            ascent=ascent,
            carried={} if carried is None else carried,
            piece=self.piece[0],
            pieces=self.piece[1],
        )

    def a_pass(self, scaler: Scaler | None) -> Pass:
        """How a closure makes a pass."""
        return Pass(lambda closure: self.call(closure, scaler), self.drop_gradients, scaler)

    def call(self, closure: Callable[..., Any], scaler: Scaler | None = None) -> Any:
        """Let a closure make a pass, with gradients enabled and then unscaled. Returns what the closure returned."""
        with torch.enable_grad():
            loss = closure()
        if scaler is not None:
            self.scaling.unscale(scaler, self.base.param_groups)
        return loss


def given_up() -> RuntimeError:
    """The error for a step that ``restore()`` has ended from outside."""
    return RuntimeError(
        "restore() was called in the middle of this step, by a signal handler perhaps: the step is given up, and the "
        "weights are those from before it"
    )
