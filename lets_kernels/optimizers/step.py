"""One step of the engine, from the first gradients to the base optimizer's."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lets_kernels.fused import FUSED, refusal
from lets_kernels.guarded import guarded_step
from lets_kernels.hypergradient import Gradients, Trial, by_index
from lets_kernels.layout import Bucket, Runs, capturing

if TYPE_CHECKING:
    from lets_kernels.optimizers.sam import SAM


def check_capture(optimizer: "SAM") -> bool:
    """True if the step that begins goes into a CUDA graph, which then may use the buckets as long as it lives.

    Raises:
        RuntimeError: the host decides in this step what a replay could not decide again.
    """
    if not capturing():
        return False
    schedule, reason = optimizer.schedule, optimizer.radius.not_capturable()
    way_out = "capture forward and backward only, and take the step outside of the graph"
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
    """A loss as a 0-d float64 tensor without a graph; None stays None."""
    return None if loss is None else torch.as_tensor(loss).detach().double().reshape(())


def as_loss(loss: Any, name: str) -> Tensor:
    """As :func:`as_scalar`; ``ValueError`` for None."""
    scalar = as_scalar(loss)
    if scalar is None:
        raise ValueError(f"{name} must return the loss, which a learned radius needs")
    return scalar


class Step:
    """What one step needs to know between its two passes.

    The constructor reads the first gradients and touches no weight. ``perturb`` moves the weights, ``restore`` brings
    them back, ``descend`` restores and lets the base optimizer step. The ops keep a flag beside each bucket that says
    whether it is perturbed, so ``restore`` is right, and harmless, at any point.
    """

    def __init__(self, optimizer: "SAM", loss: Tensor | None, keep: bool) -> None:
        self.optimizer, self.loss = optimizer, loss
        self.perturbed_loss: Tensor | None = None
        self.trial: tuple[Trial, list[tuple[Tensor, int]]] | None = None
        self.is_perturbed = self.torn = self.in_context = False
        self.captured = check_capture(optimizer)
        o, radius = optimizer, optimizer.radius
        self._observed = radius.due(o._step_number)
        self.perturbs = o.schedule.perturbs(o._step_number)
        self.buckets: list[Bucket] = o._space().buckets
        first = [b.gather() for b in self.buckets]
        if radius.waits:
            if radius.needs_train_loss and loss is None:
                raise RuntimeError(
                    "the radius learns from the last step and this one's first loss: pass it, first_step(loss=loss), "
                    "or let step(closure, val_closure) call the closure for the first gradient too"
                )
            with torch.no_grad():
                radius.complete([by_index(r) for r in first], loss, self.buckets, o.param_groups, o.replicas)
        self._holds = self._observed or o.descent.holds_first
        if keep and self._holds:
            for runs in first:
                runs.grads = [g.clone() for g in runs.grads]
        self.first = first
        self.ascents = [o.direction.ascent(r, o.param_groups[r.bucket.group]) for r in first if r.indices]
        self.total = o.replicas.mean(self._sum([a.total() for a in self.ascents]))
        self.rho = [self._radius(b) for b in self.buckets]
        self.hats: list[Tensor] = []
        self.gate, self.gated = torch.ones_like(self.total), False

    def _sum(self, values: list[Tensor]) -> Tensor:
        """The sum of 0-d tensors from several devices, on the first bucket's."""
        home = self.optimizer.skipped.device
        if not values:
            return torch.zeros((), dtype=torch.float64, device=home)
        if len(values) == 1:
            return values[0].to(home)
        return torch.stack([v.to(home) for v in values]).sum()

    def _radius(self, bucket: Bucket) -> Tensor:
        o, group = self.optimizer, self.optimizer.param_groups[bucket.group]
        return bucket.scalar(o.radius.value(bucket.group, group, o._step_number))

    def perturb(self) -> None:
        """θ ← θ + ε, over all buckets with one norm; nothing on a step that does not perturb."""
        if not self.perturbs:
            return
        self.is_perturbed = self.torn = True
        for a in self.ascents:
            a.perturb(self.total.to(a.bucket.device), self.rho[a.bucket.index])
        self.torn = False
        if not self._holds:  # nothing parameter-sized but the saved weights lives through the second pass
            for a in self.ascents:
                a.vectors = a.runs.grads = []

    def restore(self) -> None:
        """θ + ε → θ, to the bit, wherever the weights are perturbed."""
        self.torn = self.is_perturbed
        for a in self.ascents:
            if self.is_perturbed:
                a.bucket.restore(a.runs)
        self.is_perturbed = self.torn = False

    def return_gradients(self) -> None:
        """Give back the first gradients that were taken, for a step along them."""
        for runs in self.first:
            for i, g in zip(runs.indices, runs.grads, strict=True):
                runs.bucket.params[i].grad = g

    def descend(self) -> tuple[bool, str]:
        """Restore, and step along the second gradients: was it fused, and if not, why."""
        o = self.optimizer
        second = [b.gather() for b in self.buckets]
        hats = [by_index(r) for r in second]
        for runs, first in zip(second, self.first, strict=True):
            if runs.indices:
                runs.grads = o.descent.gradients(runs, by_index(first) if o.descent.holds_first else {})
        active = [r for r in second if r.indices]
        self._close_gate(active)
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
            self.is_perturbed = self.torn = False
        else:
            self.restore()
            for runs in active:
                for i, g in zip(runs.indices, runs.grads, strict=True):
                    runs.bucket.params[i].grad = g
            if self.gated:
                guarded_step(o.base_optimizer, self.gate)
            else:
                o.base_optimizer.step()
        if self._observed and self.perturbs and self.ascents:
            held = [g for h in hats for g in h.values()]
            self.trial = self._record(hats, [by_index(r) for r in second]), [(g, g._version) for g in held]
        return reason is None, reason or ""

    def _close_gate(self, active: list[Runs]) -> None:
        """0 where a gradient is not finite, of either pass and on any rank; counted, and never read here."""
        o = self.optimizer
        if not o.check_finite or not active:
            return
        unscaled = [(r.bucket, r.pack(r.grads), r.bucket.unscaled_table(r.indices)) for r in active]
        sums = [b.ops.grad_norm(grads, [], table, None, 0.0, 2.0) for b, grads, table in unscaled]
        self.hats = [o.replicas.mean(self._sum(sums))]
        self.gate, self.gated = self.buckets[0].ops.all_finite_([self.total, *self.hats], o.skipped), True

    def _record(self, hats: list[Gradients], stepped: list[Gradients]) -> Trial:
        groups = [self.optimizer.param_groups[b.group] for b in self.buckets]
        lr = [g["lr"].clone().reshape(()) if isinstance(g["lr"], Tensor) else g["lr"] for g in groups]
        first = [by_index(r) for r in self.first]
        return Trial(self.ascents, first, hats, stepped, self.total, lr, self.rho, self.gate, self.captured)

    def metrics(self) -> dict[str, Tensor]:
        """For :meth:`SAM.metrics`."""
        found = {"grad_norm": self.total.pow(1 / self.optimizer.direction.q)}
        if self.hats:
            found["perturbed_grad_norm"] = self.hats[0].sqrt()
        if self.loss is not None:
            found["loss"] = self.loss
        if self.perturbed_loss is not None:
            found["perturbed_loss"] = self.perturbed_loss
            if self.loss is not None:
                found["loss_gap"] = self.perturbed_loss - self.loss
        return found
