"""One step of the engine, from the first gradients to the base optimizer's."""

from collections.abc import Callable, Mapping
from itertools import accumulate
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lets_kernels.base.foreign import own_step
from lets_kernels.base.fused import FUSED, refusal
from lets_kernels.base.guarded import guarded_step
from lets_kernels.base.state import Look
from lets_kernels.learning.hypergradient import Trial
from lets_kernels.parts.direction import Perturbation
from lets_kernels.parts.passes import FirstPass, Gradients, SecondPass, add_up, by_index, displacements, squared
from lets_kernels.parts.radius import radii
from lets_kernels.space.layout import Bucket
from lets_kernels.space.runs import Runs, capturing
from lets_kernels.space.shards import version
from lets_kernels.step.base import given_up
from lets_kernels.step.precision import INTERVAL, NARROW, measure

if TYPE_CHECKING:
    from lets_kernels.sam import SAM

Closure = Callable[[], Any]


def check_capture(optimizer: "SAM") -> bool:
    """True if the step that begins goes into a CUDA graph, which then may use the buckets as long as it lives.

    Raises:
        RuntimeError: the host decides in this step what a replay could not decide again.
    """
    if not capturing():
        return False
    schedule, reason = optimizer.schedule, optimizer.radius.not_capturable() or optimizer.direction.not_capturable()
    way_out = "capture forward and backward only, and take the step outside of the graph"
    if optimizer.rho_share() < 1:
        reason = f"rho still rises over the first {optimizer.rho_warmup} steps, and a graph keeps the present one"
        way_out = f"take {optimizer.rho_warmup} steps before the capture (rho_warmup=), or {way_out}"
    if not schedule.capturable:
        reason = f"{type(schedule).__name__} decides on the host at every step whether to perturb"
        way_out = f"perturb at every step (schedule=Always()), or {way_out}"
    if reason is not None:
        raise RuntimeError(f"this step cannot be captured in a CUDA graph: {reason}. Way out: {way_out}")
    optimizer.keep_for_graphs()
    return True


def check_same_graph(captured: bool, now: str, before: str) -> None:
    """``RuntimeError`` where one of two parts of a step is captured and the other is not: replays would come apart."""
    if captured != capturing():
        inside, outside = (before, now) if captured else (now, before)
        raise RuntimeError(f"{inside} in a CUDA graph needs {outside} in a graph too: capture both or neither")


def as_scalar(loss: Any) -> Tensor | None:
    """A loss as a 0-d float64 tensor without a graph; None stays None.

    Raises:
        ValueError: it is no number.
    """
    found = loss_in(loss)
    if found is None and loss is not None:
        raise ValueError(f"loss must be a number, or a tensor with one element, not {_described(loss)}")
    return found


def loss_in(returned: Any) -> Tensor | None:
    """The loss in what a closure returned, as a 0-d float64 tensor without a graph; None where there is none to see.

    A number, a tensor with one element, or such a one under ``"loss"`` in a mapping or first in a tuple or list.
    """
    if isinstance(returned, Mapping):
        returned = returned.get("loss")
    elif isinstance(returned, (tuple, list)):
        returned = returned[0] if returned else None
    if isinstance(returned, Tensor):
        one = returned.layout is torch.strided and not returned.is_complex() and returned.numel() == 1
        return returned.detach().double().reshape(()) if one else None
    if not isinstance(returned, Real):
        return None
    try:
        return torch.tensor(float(returned), dtype=torch.float64, device="cpu")
    except OverflowError:  # an integer beyond float64
        return None


def as_loss(returned: Any, name: str) -> Tensor:
    """As :func:`loss_in`; ``ValueError`` where there is none."""
    found = loss_in(returned)
    if found is None:
        raise ValueError(
            f"{name} must return the loss, which a learned radius needs: a number or a tensor with one element, by "
            f"itself, first in a tuple, or under 'loss' in a dict. It returned {_described(returned)}"
        )
    return found


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    return "None" if value is None else f"a {type(value).__name__}"


class Step:
    """What one step needs to know between its two passes.

    The constructor reads the first gradients and touches no weight. ``perturb`` moves the weights, ``restore`` brings
    them back, ``descend`` restores and lets the base optimizer step. The ops keep a flag beside each bucket that says
    whether it is perturbed, so ``restore`` is right, and harmless, at any point.
    """

    def __init__(self, optimizer: "SAM", loss: Tensor | None, keep: bool) -> None:
        o = self.optimizer = optimizer
        self.loss = loss
        self.perturbed_loss: Tensor | None = None
        self.trial: tuple[Trial, list[tuple[Tensor, int]]] | None = None
        self.is_perturbed = self.torn = self.in_context = self.returned = False
        self.given_up = False  # by restore(), perhaps of a signal handler within one of the methods here
        #: Passes that this step has gone along so far.
        self.passes = int(o.direction.needs_gradient)
        self.captured = check_capture(o)
        self._observed = o.radius.due(o._perturbed_steps)
        self.buckets: list[Bucket] = o._agreed_space().buckets
        self.first = self._gather(keep) if o.direction.needs_gradient else [b.all_runs() for b in self.buckets]
        first = FirstPass(
            [runs for runs in self.first if runs.indices],
            o.param_groups,
            o._step_number,
            o.skipped.device,
            o.replicas if o.network.sync_perturbation else None,
            o.random,
            o.held,
            Look.at(o.base_optimizer),
            self._keeps_vectors(),
        )
        if o.radius.waits and o.direction.needs_gradient:
            self._complete(first)
        self.perturbs = o._perturbs(first)
        started, o._started = o._started, False
        if o.direction.starts and self.perturbs and not started:
            raise RuntimeError(
                f"{type(o.direction).__name__} takes the first gradients beside the weights: put the first forward and "
                "backward into `with opt.first_pass():`, or let step(closure) call the closure for both"
            )
        if keep and self.perturbs and self._holds:
            for runs in self.first:
                runs.grads = [g.clone() for g in runs.grads]
        #: On a step that does not perturb: the gradients that are there now, by which later ones are told from them.
        self._unperturbed = [] if self.perturbs else [(id(g), version(g)) for g in o._gradients()]
        #: How far the weights have moved, for a radius that goes by that; a direction may write where they stood.
        self._moved: Tensor | None = None
        if self.perturbs and o.radius.compares:
            self._moved = displacements(first.runs, o.held, len(o.radius.memory), first.home)
        if self.perturbs:
            found = o.direction.prepare(first)
        elif o.direction.needs_gradient:
            found = Perturbation([], first.squared_norm, first.squared_norm.sqrt())
        else:
            found = Perturbation([], torch.ones((), dtype=torch.float64, device=first.home))
        self.ascents, self.total = found.ascents, found.total
        self._norm = found.total.pow(1 / o.direction.q) if found.norm is None else found.norm
        #: Of every first pass that this step goes along; several where micro-batches are perturbed one by one. Not
        #: finite where one of its gradients is not.
        self.totals = [self.total]
        #: Not zero where a gradient scaler found an overflow.
        self.overflow: Tensor | None = None
        self.rho = [self._radius(b) for b in self.buckets]
        self.hats: list[Tensor] = []
        self.gate, self.gated = torch.ones_like(self.total), False

    @property
    def _holds(self) -> bool:
        """The first gradients are asked for after the second pass."""
        o = self.optimizer
        return self._observed or o.descent.holds_first or o.radius.compares

    def _gather(self, keep: bool) -> list[Runs]:
        """The first gradients."""
        o, radius = self.optimizer, self.optimizer.radius
        o.network.check_first_pass()
        # What one rank's own pass does not reach has gradient zero in the mean over ranks that the radius learns from.
        whole = self._observed and not o.network.sync_perturbation
        first = [b.gather(own=self._holds and not keep, whole=whole, current=True) for b in self.buckets]
        if not any(runs.indices for runs in first):
            o.network.check_parameters(p for b in self.buckets for p in b.params)
        if radius.waits and radius.needs_train_loss and self.loss is None:
            raise RuntimeError(
                "the radius learns from the last step and this one's first loss: pass it, first_step(loss=loss), "
                "or let step(closure, val_closure) call the closure for the first gradient too"
            )
        return first

    def _complete(self, first: FirstPass) -> None:
        """Let a radius that waits for the first gradients learn from them, unless they skip this step."""
        o, found = self.optimizer, [by_index(r) for r in self.first]
        finite = torch.isfinite(first.squared_norm)
        o.radius.complete(found, self.loss, self.buckets, o.param_groups, o.replicas, finite)

    def _keeps_vectors(self) -> bool:
        o = self.optimizer
        learns = self._observed and o.radius.needs_vectors
        return learns or (self._measures and any(b.dtype in NARROW for b in self.buckets))

    @property
    def _measures(self) -> bool:
        """From time to time: how much of the perturbation is left in weights that round."""
        o = self.optimizer
        return not (self.captured or (o._precision and o._step_number % INTERVAL))

    def _radius(self, bucket: Bucket) -> Tensor:
        o, group = self.optimizer, self.optimizer.param_groups[bucket.group]
        rho, share = o.radius.value(bucket.group, group, o._step_number), o.rho_share()
        return bucket.scalar(rho if share == 1 else rho * share)

    def perturb(self) -> None:
        """θ ← θ + ε, over all buckets with one norm; nothing on a step that does not perturb."""
        network = self.optimizer.network
        if self.optimizer.direction.needs_gradient:
            network.statistics.hold()  # a second pass may follow, perturbed or not
        if not self.perturbs:
            return
        self.is_perturbed = self.torn = True
        network.weights_move()
        for a in self.ascents:
            a.perturb(self.total.to(a.bucket.device), self.rho[a.bucket.index])
        network.perturbed()
        if self._measures:
            self.optimizer._precision = measure(self.ascents, self.total, self.rho)
        self.torn = False
        if self.given_up:  # and so some of the buckets, or of their parameters, were perturbed after they were restored
            self.is_perturbed = True
            for a in self.ascents:
                a.bucket.dirty.fill_(1)  # all of them are saved
            self.restore()
            raise given_up()
        if not self._holds:  # nothing parameter-sized but the saved weights lives through the second pass
            for a in self.ascents:
                a.vectors = a.runs.grads = []
            for runs in self.first:
                runs.grads = []

    def restore(self) -> None:
        """θ + ε → θ, to the bit, wherever the weights are perturbed."""
        self.torn = self.is_perturbed
        if self.is_perturbed:
            self.optimizer.network.weights_move()
        refused: RuntimeError | None = None
        for a in self.ascents if self.is_perturbed else ():
            try:
                a.bucket.restore(a.runs)
            except RuntimeError as error:  # a parameter that was resized: the others come home all the same
                refused = error
        if refused is not None:
            raise refused
        self.optimizer.network.statistics.release()
        self.is_perturbed = self.torn = False

    def find_second_pass(self) -> None:
        """Count the second pass, if there was one; on a step that does not perturb it may be left out."""
        if self.returned:
            return
        present = self.optimizer._gradients()
        if not self.perturbs and not present:
            self.return_gradients()
        elif [(id(g), version(g)) for g in present] != self._unperturbed:
            self.passes += 1

    def return_gradients(self) -> None:
        """Give back the first gradients that were taken, for a step along them: there is no second pass."""
        self.returned = True
        for runs in self.first:
            runs.return_gradients()

    def descend(self) -> tuple[bool, str]:
        """Restore, and step along the second gradients: was it fused, and if not, why."""
        o = self.optimizer
        o.network.weights_move()
        second = [b.gather(own=self._observed) for b in self.buckets]
        if o._buckets is not None:
            o._buckets.look_again(o.param_groups)
        hats = [by_index(r) for r in second]
        active = [r for r in second if r.indices]
        held = [by_index(r) if self._holds and r.grads else {} for r in self.first]
        keeps = self._observed and self.perturbs
        offsets = list(accumulate((len(b.params) for b in self.buckets), initial=0))
        passed = SecondPass(
            active, held, self.perturbs, o.skipped.device, o.replicas, o.held, keeps, self.gate, offsets
        )
        products = self._compare(passed)
        squared_norm = o.descent.look(passed)
        if squared_norm is None and products is not None:
            squared_norm = passed.compared()[0, 0]
        self._close_gate(active, squared_norm)
        passed.gate = self.gate
        o.descent.choose(passed)
        fused, reason = [], refusal(o.base_optimizer)
        if reason is None:
            kind = FUSED[type(o.base_optimizer)]
            for runs in active:
                group = o.param_groups[runs.bucket.group]
                step: Callable[[Tensor], None] | None = kind.prepare(runs, group, o.base_optimizer.state)
                if step is None:
                    reason = "the state lies otherwise in memory than the parameters"
                    break
                fused.append((runs, step))
        if reason is None:
            for a in self.ascents:  # where the passes have different gradients
                if self.is_perturbed and second[a.bucket.index].indices != a.runs.indices:
                    a.bucket.restore(a.runs)
            self.torn = True  # an interrupt between buckets ends the step: none is stepped twice
            for runs, take in fused:
                take(self.gate.to(runs.bucket.device))
                runs.write_back()
            o.network.statistics.release()
            self.is_perturbed = self.torn = False
        else:
            self.restore()
            for runs in active:
                runs.return_gradients()
            if self.gated:
                guarded_step(o.base_optimizer, self.gate)
            else:
                own_step(o.base_optimizer)
        if self._observed and self.perturbs and (self.ascents or o.replicas.groups):
            hat_list = [g for h in hats for g in h.values()]
            self.trial = self._record(hats, [by_index(r) for r in second]), [(g, g._version) for g in hat_list]
        if products is not None:
            o.radius.compare(products, self.gate, o.param_groups)
        return reason is None, reason or ""

    def _compare(self, passed: SecondPass) -> Tensor | None:
        """The products that the radius goes by, and its memory as the first rank has it."""
        radius = self.optimizer.radius
        if self._moved is None:
            return None
        products, memory = passed.compared_by_groups(len(radius.memory), self._moved, radius.memory)
        if memory is not radius.memory:
            radius.memory.copy_(memory)
        return products

    def _close_gate(self, active: list[Runs], squared_norm: Tensor | None) -> None:
        """0 where a gradient is not finite, of any pass and on any rank; counted, and never read here.

        ``squared_norm``: ‖ĝ‖² over all ranks, where the descent has it already.
        """
        o = self.optimizer
        reads = o.check_finite or o._scaling.every_pass  # else nobody asks, or a gradient scaler has read them
        flags: list[Tensor] = []
        if reads or self.overflow is not None:
            sums = [squared(r) for r in active] if reads and squared_norm is None else []
            if self.overflow is not None:
                overflow = self.overflow.to(self.total.device, torch.float64).reshape(())
                sums.append(torch.where(overflow != 0, torch.inf, torch.zeros_like(overflow)))
            alone = [] if o.network.sync_perturbation else self.totals  # no rank has heard of the others' yet
            known = [] if squared_norm is None or not reads else [squared_norm]
            sent = [add_up(sums, o.skipped.device), *alone]
            means = sent[:0] if known and self.overflow is None and not alone else o.replicas.means(sent)
            if reads:
                self.hats = known or means[:1]
            if alone:
                self.totals = means[1:]
            flags = [*known, *means[:1], *self.totals]
        if flags and self.buckets:
            self.gate, self.gated = self.buckets[0].ops.all_finite_(flags, o.skipped), True

    def _applied(self) -> Tensor:
        """The radius of this step's perturbation, as ``SAM.rho`` gives radii; 0 on a step that does not perturb."""
        o = self.optimizer
        groups = o.param_groups[:1] if o.radius.shared else o.param_groups
        own = {b.group: rho for b, rho in zip(self.buckets, self.rho, strict=True)}
        values = radii([own.get(i, 0.0) if self.perturbs else 0.0 for i in range(len(groups))])
        return values[0] if len(values) == 1 else torch.stack(values)

    def _record(self, hats: list[Gradients], stepped: list[Gradients]) -> Trial:
        groups = [self.optimizer.param_groups[b.group] for b in self.buckets]
        lr = [g["lr"].clone().reshape(()) if isinstance(g["lr"], Tensor) else g["lr"] for g in groups]
        first = [by_index(r) if r.grads else {} for r in self.first]
        slope = self.optimizer.descent.slope
        return Trial(
            self.buckets, self.ascents, first, hats, stepped, self.total, lr, self.rho, self.gate, slope, self.captured
        )

    def metrics(self) -> dict[str, Tensor]:
        """For :meth:`SAM.metrics`."""
        norm = self._norm
        if len(self.totals) > 1 or self.totals[0] is not self.total:  # of several passes, or means over ranks
            norm = torch.stack(self.totals).mean().pow(1 / self.optimizer.direction.q)
        found = {"grad_norm": norm} if self.optimizer.direction.needs_gradient else {}
        if self.optimizer.rho_warmup:
            found["applied_rho"] = self._applied()
        if self.hats:
            found["perturbed_grad_norm"] = self.hats[0].sqrt()
        if self.loss is not None:
            found["loss"] = self.loss
        if self.perturbed_loss is not None:
            found["perturbed_loss"] = self.perturbed_loss
            if self.loss is not None:
                found["loss_gap"] = self.perturbed_loss - self.loss
        return found
