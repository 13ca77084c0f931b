"""What an optimizer of this package is around its steps: tables of its parameters, ranks, and what a user reads."""

import warnings
from typing import Any

import torch
from torch import Tensor

from lets_kernels.around.amp import LossScaling, Scaler
from lets_kernels.around.network import Network
from lets_kernels.parts.passes import FirstPass
from lets_kernels.parts.radius import RadiusWarning, radii
from lets_kernels.parts.samples import Closure, Pass
from lets_kernels.parts.schedule import Moment
from lets_kernels.space.distributed import Replicas
from lets_kernels.space.layout import Bucket, ParameterSpace
from lets_kernels.step.precision import warn_of_narrow
from lets_kernels.step.saving import Saved

#: Steps from which a radius could have learned, after which it is said that it did not.
_MISSED = 10


class Engine(Saved):
    """All of :class:`SAM` but its steps."""

    network: Network
    replicas: Replicas
    check_finite: bool
    rho_warmup: int
    _scaling: LossScaling
    _backend: str
    _flatten: bool

    # ---- what a user reads -------------------------------------------------------------------------------------------

    @property
    def rho(self) -> Tensor:
        """The radius: 0-d if all groups share one, else one value a group. Nothing waits for the device."""
        self._take_in_new_groups()
        groups = self.param_groups[:1] if self.radius.shared else self.param_groups
        values = radii([self.radius.present(i, group) for i, group in enumerate(groups)])
        return values[0].clone() if len(values) == 1 else torch.stack(values)

    @property
    def model(self) -> torch.nn.Module | None:
        """The module that was given as ``model=``."""
        return self.network.model

    @property
    def backend(self) -> str:
        """The backend that runs, by name; several, separated by commas, where parameters lie on several devices."""
        return ", ".join(sorted({b.backend for b in self._space().buckets}))

    def metrics(self) -> dict[str, Tensor]:
        """What the last step saw, as tensors on the device; nothing waits for them.

        ``grad_norm`` is ‖Tg‖ in the dual norm (over all parameters; the power mean of several where ranks or
        micro-batches are perturbed one by one; ‖g‖ on a step that does not perturb), ``perturbed_grad_norm`` ‖ĝ‖ (with
        ``check_finite``), ``rho`` the present radius, ``skipped_steps`` and ``gradients``, the gradients that all steps
        have taken, two counts; ``loss``, ``perturbed_loss`` and
        ``loss_gap`` where the optimizer saw the losses; with ``rho_warmup`` ``applied_rho``, by which the last step
        perturbed; and what the radius reports: ``rho_grad`` = ∂F/∂ρ,
        ``val_loss``, ``train_loss``. With 16-bit weights, from the first step and then from every hundredth:
        ``perturbation_cosine`` between ε and what rounding left of it, ``perturbation_length``, the ratio of their
        lengths, and ``perturbed_fraction``, the share of weights that moved at all.
        """
        gradients = torch.full((), self._passes, dtype=torch.int64, device=self.skipped.device)
        counted = {"rho": self.rho, "skipped_steps": self.skipped.clone(), "gradients": gradients}
        return {**self._last, **self._precision, **counted, **self.radius.metrics()}

    # ---- within ----------------------------------------------------------------------------------------------------

    def _space(self) -> ParameterSpace:
        """The buckets, built anew where the groups or the parameters have changed."""
        if self._buckets is None or not self._buckets.is_current(self.param_groups):
            self._take_in_new_groups()
            self._forget_replaced()
            self.network.bind()
            self.network.weights_move()  # parameters are found, and stand in their modules, in one piece a rank
            self.direction.bind(self.model)
            self._publication.cover(self.model)
            direction, names = self.direction, self.network.names()
            space = ParameterSpace(
                self.param_groups, names, direction.geometry, self._backend, self._flatten, direction.filter_dim
            )
            self._check_ranks(space)
            warn_of_narrow(space.buckets)
            self._buckets, self._precision = space, {}
            self._move_scalars(self._buckets.buckets)
        return self._buckets

    def _agreed_space(self) -> ParameterSpace:
        """As :meth:`_space`, where all ranks come by: they agree on the seed before anything is drawn."""
        space = self._space()
        self.random.agree(self.replicas)
        return space

    def _check_ranks(self, space: ParameterSpace) -> None:
        """Find the ranks that take part, and refuse what would go wrong among them in silence."""
        params = [p for b in space.buckets for p in b.params]
        if self.model is None and any(b.spread for b in space.buckets):
            raise ValueError(
                "DTensor parameters need model=, the sharded module: its unsharded copies of the weights have to be "
                "dropped whenever the weights move"
            )
        self.replicas.find(self.model, params)
        shared = {
            "a radius that is learned or finds itself": self.radius.moves,
            "random decisions": self.random.used and not self.random.given,
            "decisions by the gradient": self.schedule.looks_at_gradient,
        }
        what = next((name for name, present in shared.items() if present), None)
        if self.replicas.unclear and what is not None:
            raise ValueError(
                f"several ranks are there, and {what} must be the same on all that train one model: pass model=, the "
                "DistributedDataParallel module, or process_group=; process_group='alone' if each rank trains a model "
                "of its own"
            )

    def _move_scalars(self, buckets: list[Bucket]) -> None:
        """What is counted and learned lies beside the first parameters, also where those have been moved."""
        if buckets and buckets[0].device != self.skipped.device:
            self.skipped = self.skipped.to(buckets[0].device)
            self.radius.to(self.skipped.device)
        self.random.to(self.skipped.device)

    def keep_for_graphs(self) -> None:
        """Keep what the CUDA graph that is being captured refers to, as long as this optimizer lives.

        Later steps may replace it here (``load_state_dict`` does), but not in the graph.
        """
        state = [t for entry in self.base_optimizer.state.values() for t in entry.values() if isinstance(t, Tensor)]
        radii = [g["rho"] for g in self.param_groups if isinstance(g["rho"], Tensor)]
        held = [t for entry in self.held.state.values() for t in entry.values()]
        self._captured.append((self._space(), state, radii, held))

    def rho_share(self) -> float:
        """The share of the radius that the present step perturbs by: below 1 while ``rho_warmup`` lasts."""
        if self._step_number >= self.rho_warmup:
            return 1.0
        return (self._step_number + 1) / self.rho_warmup

    def _forget_trial(self) -> None:
        """The next step begins, and writes where the last one left what the radius would learn from.

        Say it once if steps pass by from which it does not learn, since nobody calls what it learns from.
        """
        missed, self._trial, self._radius_waits = self._trial is not None, None, False
        if self._missed is None or not missed:
            return
        self._missed += 1
        if self._missed == _MISSED:
            warnings.warn(
                f"the radius has not learned from any of {_MISSED} steps and stays where it began: call "
                "opt.radius_step(closure, val_closure) after every second_step(), or take steps with "
                "opt.step(closure, val_closure); LearnedRadius(validation='next') and rho='auto' need neither",
                RadiusWarning,
                stacklevel=2,
            )

    # ---- passes ------------------------------------------------------------------------------------------------------

    def _perturbs(self, first: FirstPass | None) -> bool:
        known = self._decision
        # A schedule that looks at the gradient is asked once a first pass: a step that is begun again has another one.
        if known is None or known[0] != self._step_number or self.schedule.looks_at_gradient:
            moment = Moment(self._step_number, self.random, first)
            known = self._decision = self._step_number, self.schedule.decide(moment)
        return known[1]

    def _pass(self, scaler: Scaler | None) -> Pass:
        return Pass(lambda closure: self._call(closure, scaler), self._drop_gradients, scaler)

    def _forget_pass(self) -> None:
        self.network.forget_pass()
        self._started = False
        if self._scaling.first_only:
            self._scaling.give_up()

    def _call(self, closure: Closure, scaler: Scaler | None = None) -> Any:
        try:
            # No scaler steps within a closure. Lightning asks there whether to clip, and would refuse, in bf16 too.
            self._step_supports_amp_scaling = False
            with torch.enable_grad():
                loss = closure()
        finally:
            self.__dict__.pop("_step_supports_amp_scaling", None)
        if scaler is not None:
            self._scaling.unscale(scaler, self.param_groups)
        return loss
