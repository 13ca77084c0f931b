"""How far to perturb, learned: LETS."""

import inspect
import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from lets_kernels.base.foreign import check_steps_alone
from lets_kernels.base.fused import OwnStep, fused_by
from lets_kernels.base.guarded import make_state
from lets_kernels.learning.hypergradient import Trial, fit, placed
from lets_kernels.learning.moving import Groups, MovingRadius, Observed, Summed
from lets_kernels.learning.saved import check_learned
from lets_kernels.parts.direction import Direction
from lets_kernels.parts.radius import check_rho
from lets_kernels.parts.samples import Samples
from lets_kernels.space.buckets import Bucket
from lets_kernels.space.distributed import Replicas

METRICS = ("squared_gap", "gap", "validation_loss")
CURVATURES = ("diagonal", "secant")
DIRECTIONS = ("epsilon", "algorithm1")
VALIDATIONS = ("closure", "next")


#: log ρ stays within ± this, where ρ fits float32: from 1.8e-35 to 5.5e34.
MOST_NU = 80.0


class CurvatureWarning(UserWarning):
    """A learned radius compares two gradients that differ in more than the perturbation.

    Examples:
        >>> import warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", CurvatureWarning)  # stop where it is given
        ...     opt = RSAM([w], SGD, rho="auto", lr=0.1)
        Traceback (most recent call last):
            ...
        lets_kernels.learning.learned.CurvatureWarning: rho='auto' takes the difference of the two gradients ...
    """


class LearnedRadius(MovingRadius):
    """LETS: ρ = exp(ν), learned by bilevel optimisation (Wang et al., ECML-PKDD 2024, Algorithm 1).

    After every step the gradients of the training and the validation loss are taken at the new weights, and an
    optimizer of its own moves ν along ∂F/∂ν (:mod:`lets_kernels.learning.hypergradient`). The paper does not state the
    optimizer for ν, and whether there is one radius or one for each group: these are arguments here. It does not state
    either how a step of a base optimizer other than plain SGD enters: here as −η ĝ.

    ν is kept within ±80, so ρ within [1.8e-35, 5.5e34], whatever its optimizer does. So ρ is finite and positive in
    float32 after any step, and in any saved state.

    A step holds three gradients at once: g, ĝ and one at the new weights, which is summed and dropped before the next
    one.

    ``group["rho"]`` shows the radius, as a 0-d tensor; a value written there is not read.

    A step with this radius, and the learning after it, can be captured in a CUDA graph with ``interval=1``, with
    validation closures and without ``reuse_train_gradient``. The learning rates are then those of the capture, and
    ``opt.rho`` follows the replays.

    Args:
        rho: ρ_0 > 0, within the bounds above. With ``per_group``, the ρ_0 of groups without their own ``rho``.
        metric: F. ``"squared_gap"`` (the paper) is ½(L_vl − L_tr)², ``"gap"`` is L_vl − L_tr, ``"validation_loss"`` is
            L_vl, which needs one gradient fewer. None takes ``"squared_gap"`` with ``validation="closure"``; with
            ``validation="next"`` it takes ``"validation_loss"``, the only metric allowed there.
        curvature: ``"diagonal"`` (the paper) or ``"secant"``.
        direction: for the diagonal. ``"epsilon"`` takes the perturbation that was applied (the derivation in the text);
            ``"algorithm1"`` takes the training gradient at the new weights, as Algorithm 1 prints it: scaled by T and
            divided by its norm, whatever else the method makes of its own gradient.
        optimizer: class of the torch optimizer for ν, by default Adam. It gets ``optimizer_kwargs`` (``lr`` is 1e-2 by
            default), and on an accelerator ``capturable=True`` if it has that option. SGD, Adam and AdamW step by the
            ops. After binding, the attribute ``optimizer`` is the instance, for an LR scheduler. The paper's plain SGD
            at 1e-4 cannot move ρ: in 200 steps from 0.05 by 2e-11 with the diagonal, by 3e-8 with the secant (the
            demo's network, 40 % wrong labels, batches of 64).
        validation: where ḡ_vl comes from. ``"closure"`` (the paper) is the validation closure of
            ``step(closure, val_closure)`` or ``radius_step``. ``"next"`` takes the next step's first gradient, on the
            next batch: a step then costs two gradients, there is nothing to call, and ν moves at the beginning of the
            next step. The step's two gradients wait until then, in two parameter-sized buffers. Training batches are
            not held out: from the second epoch on the weights have been fitted to them, also to wrong labels, and the
            signal then leans towards a smaller radius (docs/radius.md).
        interval: learn only on every ``interval``-th of the steps that perturb.
        reuse_train_gradient: takes the next step's first gradient, on the next batch, as ḡ_tr: three gradients a step
            and not four. ν then moves at the beginning of the next step. The step's two gradients wait until then, with
            ``direction="algorithm1"`` also ḡ_vl.
        per_group: one ν for each param group. With a secant, a group's ν sees only the group's part of ĝ − g.

    Raises:
        ValueError: an argument is out of its range; ``direction`` is given with a secant, which needs none; or
            ``validation="next"`` with an option that needs a gradient at the new weights on this step's batch.
        TypeError: an optimizer that calls its closure itself.

    Examples:
        >>> opt = SAM([w], SGD, rho=LearnedRadius(0.05, optimizer=torch.optim.SGD, lr=0.1), lr=0.1)
        >>> loss = opt.step(closure, closure)  # the second one should see a batch held out from training
        >>> sorted(opt.radius.metrics())
        ['rho_grad', 'train_loss', 'val_loss']
    """

    def __init__(
        self,
        rho: float = 0.05,
        *,
        metric: str | None = None,
        curvature: str = "diagonal",
        direction: str = "epsilon",
        optimizer: type[torch.optim.Optimizer] = torch.optim.Adam,
        validation: str = "closure",
        interval: int = 1,
        reuse_train_gradient: bool = False,
        per_group: bool = False,
        **optimizer_kwargs: Any,
    ) -> None:
        if metric is None:
            metric = "validation_loss" if validation == "next" else "squared_gap"
        for name, value, known in (
            ("metric", metric, METRICS),
            ("curvature", curvature, CURVATURES),
            ("direction", direction, DIRECTIONS),
            ("validation", validation, VALIDATIONS),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")
        if curvature == "secant" and direction != "epsilon":
            raise ValueError(f"direction={direction!r} goes with curvature='diagonal'; a secant needs no direction")
        if validation == "next":
            for refused in (
                f"metric={metric!r}" if metric != "validation_loss" else "",
                "direction='algorithm1'" if direction == "algorithm1" else "",
                "reuse_train_gradient=True" if reuse_train_gradient else "",
            ):
                if refused:
                    raise ValueError(
                        f"{refused} needs the gradient of this step's batch at the new weights, and validation='next' "
                        "takes that of the next batch only: leave it out, or use validation='closure'"
                    )
        if isinstance(optimizer, type):
            check_steps_alone(optimizer)
        if interval < 1:
            raise ValueError(f"interval must be at least 1, not {interval}")
        super().__init__()
        self.rho = _check_learned(rho)
        self.metric, self.curvature, self.direction = metric, curvature, direction
        self.validation = validation
        self.interval, self.reuse_train_gradient, self.per_group = interval, reuse_train_gradient, per_group
        self._make_optimizer = optimizer
        self._optimizer_kwargs = {"lr": 1e-2, **optimizer_kwargs}
        self._step_nu = OwnStep()
        self.nu: list[Tensor] = []
        self._optimizer: torch.optim.Optimizer | None = None
        self._pending: tuple[Trial, Observed | Summed | None] | None = None
        self._packed: dict[str, Any] | None = None

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of ν, for an LR scheduler.

        Raises:
            RuntimeError: it is made when an optimizer is built with this radius, and none has been built yet.
        """
        if self._optimizer is None:
            raise RuntimeError("build the optimizer first, SAM(..., rho=radius): with it the radius gets its own")
        return self._optimizer

    @property
    def learns(self) -> bool:  # type: ignore[override]
        return self.validation == "closure"

    # ---- the radius ----------------------------------------------------------------------------------------------

    def bind(self, groups: Groups, device: torch.device) -> None:
        self.check_groups(groups)
        for group in groups[len(self.nu) :] if self.per_group else groups[: 1 - len(self.nu)]:
            start = math.log(float(group["rho"]))
            nu = torch.tensor(start, dtype=torch.float64, device=device, requires_grad=True)
            if self._optimizer is None:
                self._optimizer = self._make_optimizer([nu], **{**self._optimizer_kwargs, **self._on(device)})
            else:
                self.optimizer.add_param_group({"params": [nu]})
            self.nu.append(nu)
        if self._optimizer is not None:
            self._step_nu.make_state(self._optimizer)
        self._publish(groups)

    def _on(self, device: torch.device) -> dict[str, bool]:
        """Options that make torch's optimizer keep its step count on ν's device, if it can; CUDA graphs need this."""
        if "capturable" not in inspect.signature(self._make_optimizer).parameters:
            return {}
        return {"capturable": self._optimizer_kwargs.get("capturable", device.type in ("cuda", "xpu"))}

    def check_passes(self, sync_perturbation: bool, direction: Direction, samples: Samples) -> None:
        secant, reuses = self.curvature == "secant", self.reuse_train_gradient or not self.learns
        option = "reuse_train_gradient=True" if self.reuse_train_gradient else "validation='next'"
        if not direction.needs_gradient and (secant or reuses):
            what = "curvature='secant'" if secant else option
            raise ValueError(f"{what} needs a first gradient, and this direction takes none: leave it out")
        elsewhere = direction.starts or not samples.first_is_whole
        if reuses and elsewhere:
            raise ValueError(
                f"{option} takes a step's first gradient for that of the batch at the weights, and this method's is "
                "another: leave it out"
            )
        if secant and (elsewhere or not samples.second_is_whole):
            warnings.warn(
                "curvature='secant' takes the difference of the two gradients for the Hessian along the perturbation, "
                "and in this method they differ in more than that (where or from which samples they are taken): the "
                "radius may learn the wrong way. curvature='diagonal' sees the perturbation alone",
                CurvatureWarning,
                stacklevel=2,
            )
        if not sync_perturbation and reuses:
            raise ValueError(
                f"{option} takes a first gradient for that of the whole batch, and with sync_perturbation=False it is "
                "one rank's: leave one of the two out"
            )

    def to(self, device: torch.device) -> None:
        if self.nu and self.nu[0].device != device:
            for nu in self.nu:
                nu.data, nu.grad = nu.detach().to(device), None
            self._load_optimizer(self.optimizer.state_dict())

    def check_groups(self, groups: Groups) -> None:
        for group in groups:
            _check_learned(float(group["rho"]))
        given = {float(g["rho"]) for g in groups} - ({self.rho, *map(float, self._radii())} if self.nu else set())
        if not self.per_group and len(given) > (0 if self.nu else 1):
            raise ValueError("the groups have different rho, but one radius is learned for all: use per_group=True")
        if any("lr" not in g for g in groups):
            raise ValueError("a learned radius needs the learning rate: the base optimizer's groups have no 'lr'")

    def _log(self, k: int) -> Tensor:
        return self.nu[k].detach()

    def _radii(self) -> list[Tensor]:
        return [nu.detach().exp() for nu in self.nu]

    def not_capturable(self) -> str | None:
        if self.interval != 1:
            return f"with interval={self.interval} the host decides at every step whether to learn from it"
        if self.reuse_train_gradient or not self.learns:
            return "the radius learns at the beginning of a step from gradients that the step before left elsewhere"
        return None

    # ---- learning --------------------------------------------------------------------------------------------------

    def due(self, step: int) -> bool:
        """True if the radius learns from step number ``step``, counted from 0 among the steps that perturb."""
        return (step + 1) % self.interval == 0

    @property
    def needs_train_gradient(self) -> bool:
        """True if ∂F/∂ν contains ḡ_tr."""
        return self.metric != "validation_loss" or self.goes_along_train

    @property
    def goes_along_train(self) -> bool:
        """True if ε̂ is made of ḡ_tr, which then has to be there until ḡ_vl has been summed."""
        return (self.curvature, self.direction) == ("diagonal", "algorithm1")

    @property
    def needs_vectors(self) -> bool:
        """True if :meth:`observe` needs the vectors of the perturbation."""
        return (self.curvature, self.direction) == ("diagonal", "epsilon")

    @property
    def needs_train_closure(self) -> bool:
        """True if :meth:`observe` needs the training gradient at the new weights."""
        return self.needs_train_gradient and not self.reuse_train_gradient

    @property
    def waits(self) -> bool:
        """True if a step waits for the next first gradient, to be learned from."""
        return self._pending is not None or self._packed is not None

    @property
    def needs_train_loss(self) -> bool:
        """True if :meth:`complete` needs the loss of the next first gradient."""
        return self.metric == "squared_gap"

    def take_train(self, trial: Trial, train: Observed, replicas: Replicas) -> tuple[Trial, Summed]:
        """What the training gradients at the new weights give; they may be dropped afterwards.

        Returns:
            The trial to go on with, which holds them in place of g if ε̂ is made of them; and their sums, none if they
            are not part of the metric.
        """
        if self.goes_along_train:
            trial = trial.along(train.gradients, replicas)
        if self.metric == "validation_loss":
            return trial, Summed([], train.loss)
        return trial, self._summed(trial, train)

    def take_val(self, trial: Trial, val: Observed) -> Observed | Summed:
        """What the validation gradients at the new weights give; the gradients themselves if ε̂ is not known yet.

        Args:
            trial: the step; after :meth:`take_train` what that returned.
            val: these gradients.
        """
        return val if self.goes_along_train and self.reuse_train_gradient else self._summed(trial, val)

    def observe(
        self, trial: Trial, val: Observed | Summed | None, train: Summed | None, groups: Groups, replicas: Replicas
    ) -> None:
        """Learn from one step, or keep it until :meth:`complete`.

        Args:
            trial: the step; after :meth:`take_train` what that returned.
            val: what :meth:`take_val` returned. None with ``validation="next"``.
            train: what :meth:`take_train` returned, if the radius needs the training gradients.
            groups: the param groups.
            replicas: the ranks that take part.
        """
        if isinstance(val, Summed) and (train is not None or not self.needs_train_gradient):
            self._learn(trial, val, train, groups, replicas)
        else:
            self._pending = trial.detached(), val

    def complete(
        self, now: Observed, finite: Tensor, buckets: list[Bucket], groups: Groups, replicas: Replicas
    ) -> None:
        """Learn from the step that waits, now that the next one's first gradients are there.

        Nothing is learned if ``finite`` (bool, 0-d) is False on any rank: these gradients are not finite there.
        """
        if self._packed is not None:
            state, self._packed = self._packed, None
            val, loss = state["val"], state["val_loss"]
            summed = isinstance(val, Mapping)  # otherwise gradients, also in states from before they were summed
            if Trial.fits(state["trial"], buckets) and (val is None or summed or fit(val, buckets)):
                loaded: Observed | Summed | None = None
                if val is not None:
                    loaded = Summed(val["sums"], loss) if summed else Observed(placed(val, buckets), loss)
                self._pending = Trial.unpack(state["trial"], buckets), loaded
        if self._pending is None:
            return
        (trial, observed), self._pending = self._pending, None
        # If parameters have been frozen, added or moved since, that step's gradients do not belong to these parameters.
        if any(a.bucket not in buckets for a in trial.ascents):
            return
        if isinstance(observed, Summed) and len(observed.sums) != len(self.nu):
            return
        trial = replace(trial, gate=torch.where(finite, trial.gate, torch.zeros_like(trial.gate)))
        if observed is None:  # this step's first gradient validates, on a batch that the last step has not seen
            self._learn(trial, self._summed(trial, now), None, groups, replicas)
        else:
            trial, train = self.take_train(trial, now, replicas)
            val = observed if isinstance(observed, Summed) else self._summed(trial, observed)
            self._learn(trial, val, train, groups, replicas)

    def _summed(self, trial: Trial, seen: Observed) -> Summed:
        """The sums over the gradients of one pass, for each ν."""
        shares = (trial.secant if self.curvature == "secant" else trial.diagonal)(seen.gradients, self.per_group)
        sums = [torch.zeros_like(nu) for nu in self.nu]
        for group, share in shares:
            sums[group if self.per_group else 0] += share.to(sums[0].device)
        return Summed(sums, seen.loss)

    def _learn(self, trial: Trial, val: Summed, train: Summed | None, groups: Groups, replicas: Replicas) -> None:
        sums = [s.to(nu.device) for s, nu in zip(val.sums, self.nu, strict=True)]
        if train is not None and train.sums:
            sums = [v - t for v, t in zip(sums, train.sums, strict=True)]
        losses_there = (val.loss, None if train is None else train.loss)
        known = [t.to(sums[0].device) for t in losses_there if t is not None]
        means, first = replicas.agree([*sums, *known], [nu.detach() for nu in self.nu])
        if replicas.groups:
            for nu, value in zip(self.nu, first, strict=True):
                nu.detach().copy_(value)
        losses = means[len(sums) :]
        weight = losses[0] - losses[1] if self.metric == "squared_gap" else torch.ones_like(sums[0])
        gradients = [weight * s for s in means[: len(sums)]]
        ok = torch.isfinite(torch.stack(gradients)).all() * trial.gate
        self._metrics = {
            "rho_grad": _one_or_all([d / nu.detach().exp() for d, nu in zip(gradients, self.nu, strict=True)]),
            **dict(zip(("val_loss", "train_loss"), losses, strict=False)),
        }
        for nu, d in zip(self.nu, gradients, strict=True):
            nu.grad = torch.where(ok != 0, d, torch.zeros_like(d))
        beside = [a.bucket.backend for a in trial.ascents if a.bucket.device == ok.device]
        self._step_nu(self.optimizer, ok, beside[0] if beside else "auto")
        self._bound()
        self._publish(groups)

    def _bound(self) -> None:
        """Keep every ν within its bounds: in place and on the device, so a captured graph does it too."""
        present = [nu.detach() for nu in self.nu]
        torch._foreach_clamp_min_(present, -MOST_NU)
        torch._foreach_clamp_max_(present, MOST_NU)

    # ---- state -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """ν, the optimizer for ν, and the step that waits to be learned from, if there is one."""
        pending = self._packed
        if self._pending is not None:
            trial, val = self._pending
            there: Any = val.gradients if isinstance(val, Observed) else None
            if isinstance(val, Summed):
                there = {"curvature": self.curvature, "sums": val.sums}
            pending = {"trial": trial.pack(), "val": there, "val_loss": None if val is None else val.loss}
        return {
            "nu": [nu.detach().clone() for nu in self.nu],
            "optimizer": self.optimizer.state_dict(),
            "pending": pending,
        }

    def make_state(self) -> None:
        if isinstance(fused_by(self.optimizer), str):  # a fused optimizer's state was made with ν
            make_state(self.optimizer)

    def check_state_dict(self, state: dict[str, Any]) -> None:
        super().check_state_dict(state)
        curvature = None if self.goes_along_train else self.curvature
        check_learned(state, self.nu, self.optimizer, self.learns, self.needs_vectors, curvature)

    def load_state_dict(self, state: dict[str, Any], groups: Groups) -> None:
        with torch.no_grad():
            for nu, value in zip(self.nu, state["nu"], strict=True):
                nu.copy_(value)
        self._bound()
        self._load_optimizer(state["optimizer"])
        self._pending, self._packed = None, state["pending"]
        self._publish(groups)

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        """Load the optimizer's state as torch does, with the options and the step counts that this device needs."""
        self.optimizer.load_state_dict(state)
        wanted = self._on(self.nu[0].device)
        for group in self.optimizer.param_groups:
            group.update(wanted)
        for nu, own in self.optimizer.state.items():
            if wanted.get("capturable") and "step" in own:
                own["step"] = own["step"].to(nu.device)
        self._step_nu.make_state(self.optimizer)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: a waiting step is copied as data, without its buckets."""
        own = dict(self.__dict__)
        if self._pending is not None:
            own["_packed"], own["_pending"] = self.state_dict()["pending"], None
        return own


def _check_learned(rho: float) -> float:
    if isinstance(rho, (Real, Tensor)) and not (math.isfinite(rho) and rho > 0):
        raise ValueError(f"a learned radius starts at a finite rho > 0 (rho = exp(nu)), not {rho}")
    value = check_rho(rho)
    if abs(math.log(value)) > MOST_NU + 1e-9:  # the bound itself, as exp(nu) shows it
        raise ValueError(f"a learned radius stays within exp(-80) = 1.8e-35 and exp(80) = 5.5e34; rho={value} is not")
    return value


def _one_or_all(values: list[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(values)
