"""One step, from the first gradients to the base optimizer's step; and the start of a first pass that is not at θ."""

from collections.abc import Callable, Hashable
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from lets_kernels.base.foreign import own_step
from lets_kernels.base.fused import prepared
from lets_kernels.base.guarded import guarded_step
from lets_kernels.learning.hypergradient import Trial
from lets_kernels.learning.moving import Observed
from lets_kernels.parts.direction import Ascent, Perturbation
from lets_kernels.parts.passes import FirstPass, Gradients, Moment, SecondPass, add_up, by_index, displacements, squared
from lets_kernels.parts.radius import radii
from lets_kernels.space.buckets import Runs
from lets_kernels.space.shards import versions
from lets_kernels.step.capture import check_capture
from lets_kernels.step.precision import INTERVAL, measure
from lets_kernels.step.workspace import Workspace, given_up


def _seen(gradients: list[Tensor]) -> list[tuple[int, Hashable]]:
    """Which gradients these are, and how often each has been written."""
    return list(zip(map(id, gradients), versions(gradients), strict=True))


class Root(NamedTuple):
    """x^(1/q), taken only when somebody asks for it."""

    x: Tensor
    q: float

    def taken(self) -> Tensor:
        return self.x.sqrt() if self.q == 2 else self.x.pow(1 / self.q)


class Start:
    """The weights at θ + δ, for the first pass. ``restore`` may be called at any time and does no harm."""

    def __init__(self, work: Workspace) -> None:
        self._work = work
        self._runs = [b.all_runs() for b in work.tables.current().buckets]
        #: The weights are moving, to θ + δ or back.
        self.torn = self.given_up = False

    @torch.no_grad()
    def move(self) -> None:
        w, self.torn = self._work, True
        first = w.first_pass(self._runs, synced=False)
        w.setting.network.weights_move()
        one = torch.ones((), dtype=torch.float64, device=first.home)
        for runs in self._runs:
            room = first.room(runs)
            w.setting.direction.start(runs, first)
            near = one.to(runs.bucket.device)
            Ascent.along(runs, room).perturb(near, near)
        self.torn = False
        if self.given_up:
            for runs in self._runs:
                runs.bucket.dirty.fill_(1)
            self.restore()
            raise given_up()

    @torch.no_grad()
    def restore(self) -> None:
        self.torn = True
        self._work.setting.network.weights_move()
        for runs in self._runs:
            runs.bucket.restore(runs)
        self.torn = False


class Step:
    """What one step needs to know between its two passes.

    The constructor takes the first gradients. ``prepare`` finds the perturbation and touches no weight; ``perturb``
    moves the weights, ``restore`` brings them back, ``descend`` restores and lets the base optimizer step. Where the
    direction has several ascents, ``ascend`` goes on from the gradients at θ + ε to another θ + ε. The ops keep a flag
    for each bucket that says whether it is perturbed, so ``restore`` may be called at any time and does no harm.
    """

    perturbs: bool
    perturbation: Perturbation

    def __init__(self, work: Workspace, loss: Tensor | None, keep: bool) -> None:
        setting, progress = work.setting, work.progress
        self.work, self.loss, self._keep = work, loss, keep
        self.perturbed_loss: Tensor | None = None
        self.lesson: Trial | None = None
        self.is_perturbed = self.torn = self.in_context = self.returned = False
        self.given_up = False  # restore() sets this, perhaps called by a signal handler within one of the methods here
        #: How many ascents have been made, and what the direction and the descent keep from one to the next.
        self.ascended = 0
        self._carried: dict[int, Tensor] = {}
        self._gathered: list[Gradients] = []
        #: The dual norm at θ, and the totals of all ascents but the last, where there are several.
        self._norm_at_theta: Tensor | None = None
        self._earlier: list[Tensor] = []
        #: How many passes this step has made so far.
        self.passes = int(setting.direction.needs_gradient)
        self.captured = check_capture(work)
        self._learns = setting.learning is not None and setting.learning.due(progress.perturbed_steps)
        #: The first gradients are needed after the second pass.
        self._holds = self._learns or setting.descent.holds_first or setting.comparing is not None
        self.space = work.tables.agreed()
        self.buckets = self.space.buckets
        #: How much of the perturbation is left in weights that round; measured from time to time.
        tables = work.tables
        self._measures = tables.narrow and not (self.captured or (tables.precision and progress.step % INTERVAL))
        self.first = self._gather() if setting.direction.needs_gradient else [b.all_runs() for b in self.buckets]
        #: Not zero where a gradient scaler found an overflow.
        self.overflow: Tensor | None = None
        self.hats: list[Tensor] = []

    def _gather(self) -> list[Runs]:
        """The first gradients."""
        setting = self.work.setting
        network, learning = setting.network, setting.learning
        network.check_first_pass()
        # A parameter that one rank's own pass does not reach counts as zero in the mean from which the radius learns.
        whole, own = self._learns and not network.sync_perturbation, self._holds and not self._keep
        first, found = [], False
        for b in self.buckets:
            first.append(b.gather(own=own, whole=whole, current=True))
            found = found or bool(first[-1].indices)
        if not found:
            network.check_parameters([p for b in self.buckets for p in b.params])
        if learning is not None and learning.waits and learning.needs_train_loss and self.loss is None:
            raise RuntimeError(
                "the radius learns from the last step and from this step's first loss: pass it, first_step(loss=loss), "
                "or let step(closure, val_closure) call the closure for the first gradient too"
            )
        return first

    def prepare(self, decide: Callable[[Moment], bool], started: bool) -> None:
        """Let a radius that has waited learn, and find the perturbation of a step that perturbs.

        Args:
            decide: says whether this step perturbs.
            started: the first pass was made at weights that had been moved for it.

        Raises:
            RuntimeError: the direction needs a first pass at moved weights, and this one was not.
        """
        setting, progress = self.work.setting, self.work.progress
        direction, radius = setting.direction, setting.radius
        first = self._first_pass(self.first)
        runs = first.runs
        if setting.learning is not None and setting.learning.waits and direction.needs_gradient:
            self._complete(first)
        moment = Moment(progress.step, progress.random, first, self.loss)
        self.perturbs = decide(moment)
        if direction.starts and self.perturbs and not started:
            raise RuntimeError(
                f"{type(direction).__name__} takes the first gradients at moved weights: put the first forward and "
                "backward into `with opt.first_pass():`, or let step(closure) call the closure for both passes"
            )
        if self._keep and self.perturbs and self._holds:
            for each in self.first:
                each.grads = [g.clone() for g in each.grads]
        #: On a step that does not perturb: the present gradients. A second pass would make new ones.
        self._unperturbed = [] if self.perturbs else _seen(self.work.gradients())
        #: How far the weights have moved, for a radius that needs it; the direction may overwrite where they stood.
        self._moved: Tensor | None = None
        if self.perturbs and setting.comparing is not None:
            self._moved = displacements(runs, progress.held, len(setting.comparing.memory), first.home)
        #: ‖g‖², if the descent needs it; the direction then does not read the gradients a second time.
        needed = self.perturbs and setting.descent.needs_first_norm
        self._first_squared_norm = first.squared_norm if needed else None
        if self.perturbs:
            found = direction.prepare(first)
        elif direction.needs_gradient:
            found = Perturbation([], first.squared_norm, first.squared_norm.sqrt())
        else:
            found = Perturbation([], torch.ones((), dtype=torch.float64, device=first.home))
        self.perturbation, self.total = found, found.total
        #: The total of every first pass of this step: several over micro-batches. A total is not finite if one of the
        #: gradients of its pass is not.
        self.totals = [found.total]
        share = setting.rho_share(progress.step) if setting.rho_warmup else 1.0
        length = setting.length
        norm = self.total if length.fixed else self._norm()
        if self.perturbs and not length.fixed:
            length.begin(norm)
        #: ρ of each group, and of each bucket's parameters: the length of ε.
        self.radii: dict[int, float | Tensor] = {}
        one: float | Tensor | None = None
        self.rho = []
        for b in self.buckets:
            for g in b.present:
                if g not in self.radii:
                    if one is None:
                        rho = radius.value(g, first.groups[g], moment)
                        rho = rho if share == 1 else rho * share
                        rho = rho if length.fixed else length.of(rho, norm)
                    else:
                        rho = one
                    self.radii[g] = rho
                    one = rho if radius.shared else None
            self.rho.append(b.numbers(self.radii))
        self.gate, self.gated = self.work.open_gate(self.total.device, self.captured), False

    def _first_pass(self, gradients: list[Runs]) -> FirstPass:
        """The gradients from which the direction finds the next perturbation."""
        setting = self.work.setting
        keeps = self._measures or (self._learns and setting.learning is not None and setting.learning.needs_vectors)
        runs = [runs for runs in gradients if runs.indices]
        return self.work.first_pass(runs, keeps, setting.network.sync_perturbation, self.ascended, self._carried)

    @property
    def ascents_left(self) -> int:
        """How many ascents are still to be made, each from the gradients at the point that the last one reached."""
        return self.work.setting.direction.ascents - self.ascended if self.perturbs and self.ascended else 0

    def ascend(self) -> None:
        """From the gradients at θ + ε to another θ + ε, by way of θ."""
        setting = self.work.setting
        gradients = [b.gather() for b in self.buckets]
        if not any(runs.indices for runs in gradients):
            setting.network.check_parameters([p for b in self.buckets for p in b.params])
        self.passes += 1
        if setting.descent.gathers:
            self._gather_up(gradients)
        self.restore()
        if self._norm_at_theta is None:
            self._norm_at_theta = self._norm()
        self._earlier.append(self.total)
        found = setting.direction.prepare(self._first_pass(gradients))
        self.perturbation, self.total = found, found.total
        self.totals = [found.total]
        self.perturb()

    def _gather_up(self, gradients: list[Runs]) -> None:
        """Add to the sums that a descent over several ascents needs."""
        self._gathered = self._gathered or [{} for _ in self.buckets]
        for runs, sums in zip(gradients, self._gathered, strict=True):
            pairs = list(zip(runs.indices, runs.grads, strict=True))
            there = [(sums[i], g) for i, g in pairs if i in sums]
            if there:
                torch._foreach_add_(*map(list, zip(*there, strict=True)))
            sums |= {i: g.clone() for i, g in pairs if i not in sums}

    def _complete(self, first: FirstPass) -> None:
        """Let a radius that waits for the first gradients learn from them, unless they skip this step."""
        w, learning = self.work, self.work.setting.learning
        assert learning is not None
        found = [by_index(r) for r in self.first]
        finite = torch.isfinite(first.squared_norm)
        learning.complete(Observed(found, self.loss), finite, self.buckets, w.groups, w.setting.replicas)

    def perturb(self) -> None:
        """θ ← θ + ε, over all buckets with one norm; nothing on a step that does not perturb."""
        setting, ascents = self.work.setting, self.perturbation.ascents
        network = setting.network
        if setting.direction.needs_gradient:
            network.statistics.hold()  # a second pass may follow, perturbed or not
        if not self.perturbs:
            return
        self.is_perturbed = self.torn = True
        network.weights_move()
        for a in ascents:
            b = a.runs.bucket
            a.perturb(self.total.to(b.device), self.rho[b.index])
        network.perturbed(last=self.ascended + 1 == setting.direction.ascents)
        if self._measures:
            self.work.tables.precision = measure(ascents, self.total, self.rho)
        self.torn = False
        if self.given_up:  # so some of the buckets, or of their parameters, were perturbed after they had been restored
            self.is_perturbed = True
            for a in ascents:
                a.bucket.dirty.fill_(1)  # every bucket is saved
            self.restore()
            raise given_up()
        self.ascended += 1
        if not self.ascents_left:
            self._carried.clear()
        if not self._holds:  # only the saved weights, no other parameter-sized buffer, live through the second pass
            for a in ascents:
                a.vectors = a.runs.grads = []
            for runs in self.first:
                runs.grads = []

    def restore(self) -> None:
        """θ + ε → θ, to the bit, wherever the weights are perturbed."""
        network = self.work.setting.network
        self.torn = self.is_perturbed
        if self.is_perturbed:
            network.weights_move()
        refused: RuntimeError | None = None
        for a in self.perturbation.ascents if self.is_perturbed else ():
            try:
                a.bucket.restore(a.runs)
            except RuntimeError as error:  # a parameter was resized: the other parameters are restored all the same
                refused = error
        if refused is not None:
            raise refused
        network.statistics.release()
        self.is_perturbed = self.torn = False

    def find_second_pass(self) -> None:
        """Count the second pass, if there was one. On a step that does not perturb, the caller may leave it out."""
        if self.returned:
            return
        present = self.work.has_gradient()
        if self.perturbs:
            self.passes += present
        elif not present:
            self.return_gradients()
        elif _seen(self.work.gradients()) != self._unperturbed:
            self.passes += 1

    def return_gradients(self) -> None:
        """Put the first gradients back into the parameters, for a step along them without a second pass."""
        self.returned = True
        for runs in self.first:
            runs.return_gradients()

    def goes_along(self, totals: list[Tensor], passes: int, loss: Tensor | None, perturbed_loss: Tensor | None) -> None:
        """The gradients are now the mean of several steps' second gradients; the arguments are those steps' numbers."""
        self.totals, self.passes, self.returned = totals, passes, True  # no pass is left to be counted
        self.loss, self.perturbed_loss = loss, perturbed_loss

    def descend(self) -> tuple[bool, str]:
        """Restore the weights and step along the second gradients. Returns whether it was fused, and if not, why."""
        w, setting = self.work, self.work.setting
        setting.network.weights_move()
        for b, sums in zip(self.buckets, self._gathered, strict=False):  # empty unless the descent gathers
            for i in sums:
                if b.params[i].grad is None:  # the last pass has not reached it, but one before
                    b.params[i].grad = torch.zeros_like(b.params[i])
        second = [b.gather(own=self._learns) for b in self.buckets]
        if w.tables.space is not None:
            w.tables.space.look_again(w.base.param_groups)
        learns = self._learns and self.perturbs
        hats = [by_index(r) for r in second] if learns else []
        active = [r for r in second if r.indices]
        passed = SecondPass(
            runs=active,
            first=[by_index(r) if r.grads else {} for r in self.first] if self._holds else [{}] * len(self.first),
            perturbed=self.perturbs,
            home=w.progress.skipped.device,
            replicas=setting.replicas,
            held=w.progress.held,
            keeps=learns,
            gate=self.gate,
            offsets=self.space.offsets,
            groups=w.groups,
            first_squared_norm=self._first_squared_norm,
            gathered=self._gathered,
        )
        products, memory = self._compared(passed)
        squared_norm = setting.descent.look(passed)
        if squared_norm is None and products is not None:
            squared_norm = passed.compared()[0, 0]
        self._close_gate(active, squared_norm)
        passed.gate = self.gate
        setting.descent.choose(passed)
        setting.direction.conclude(passed)
        steps, reason = prepared(w.base, active)
        if reason is None:
            self._take(second, steps, passed)
        else:
            self.restore()
            for runs in active:
                runs.return_gradients()
            if self.gated:
                guarded_step(w.base, self.gate)
            else:
                own_step(w.base)
            for then in passed.follow_ups():
                then()
        if learns and (self.perturbation.ascents or setting.replicas.groups):
            self.lesson = self._trial(hats, [by_index(r) for r in second])
        if products is not None:
            assert setting.comparing is not None
            setting.comparing.compare(products, self.gate, w.groups, memory)
        return reason is None, reason or ""

    def _take(self, second: list[Runs], steps: list[Callable[..., None]], passed: SecondPass) -> None:
        """Take the fused steps, which also restore the weights that they step."""
        for a in self.perturbation.ascents:  # where the two passes reach different parameters
            if self.is_perturbed and second[a.runs.bucket.index].indices != a.runs.indices:
                a.bucket.restore(a.runs)
        self.torn = True  # an interrupt between buckets ends the step, so that no bucket is stepped twice
        follow_ups = passed.follow_ups()
        # Where the step goes on after the base optimizer's, these buckets can go back to before both, as one.
        saved = [a.bucket for a in self.perturbation.ascents if second[a.bucket.index].indices == a.runs.indices]
        self.is_perturbed |= bool(follow_ups)
        for runs, take, then in zip(passed.runs, steps, follow_ups or repeat(None), strict=False):
            take(self.gate, then, then is not None and runs.bucket in saved)
        if follow_ups and self.given_up:  # so the weights of some were brought back, and were moved on afterwards
            self.is_perturbed = True
            for b in saved:
                b.dirty.fill_(1)
            self.restore()
            raise given_up()
        self.work.setting.network.statistics.release()
        self.is_perturbed = self.torn = False

    def _compared(self, passed: SecondPass) -> tuple[Tensor | None, Tensor | None]:
        """The products from which the radius moves, and the first rank's memory of it; None where it does not move."""
        radius = self.work.setting.comparing
        if self._moved is None or radius is None:
            return None, None
        return passed.compared_by_groups(len(radius.memory), self._moved, radius.memory)

    def _close_gate(self, active: list[Runs], squared_norm: Tensor | None) -> None:
        """Set the gate to 0 if a gradient of any pass, on any rank, is not finite. The skip is counted, not read here.

        ``squared_norm``: ‖ĝ‖² over all ranks, if the descent has computed it already.
        """
        w, setting, home = self.work, self.work.setting, self.work.progress.skipped.device
        reads = setting.check_finite or w.scaling.every_pass  # else not needed, or a gradient scaler has read them
        flags: list[Tensor] = []
        if reads or self.overflow is not None:
            sums = [squared(r) for r in active] if reads and squared_norm is None else []
            if self.overflow is not None:
                overflow = self.overflow.to(self.total.device, torch.float64).reshape(())
                sums.append(torch.where(overflow != 0, torch.inf, torch.zeros_like(overflow)))
            alone = [] if setting.network.sync_perturbation else self.totals  # no rank knows the others' totals yet
            known = [] if squared_norm is None or not reads else [squared_norm]
            sent = [add_up(sums, home), *alone]
            means = sent[:0] if known and self.overflow is None and not alone else setting.replicas.means(sent)
            if reads:
                self.hats = known or means[:1]
            if alone:
                self.totals = means[1:]
            flags = [*known, *means[:1], *self._earlier, *self.totals]
        if flags and self.buckets:
            self.gate, self.gated = self.buckets[0].ops.all_finite_(flags, w.progress.skipped), True

    def _applied(self) -> Tensor:
        """The radius of this step's perturbation, as ``SAM.rho`` gives radii; 0 on a step that does not perturb."""
        groups = self.work.groups[:1] if self.work.setting.radius.shared else self.work.groups
        values = radii([self.radii.get(i, 0.0) if self.perturbs else 0.0 for i in range(len(groups))])
        return values[0] if len(values) == 1 else torch.stack(values)

    def _trial(self, hats: list[Gradients], stepped: list[Gradients]) -> Trial:
        groups, length = self.work.groups, self.work.setting.length
        lr = [g["lr"].clone().reshape(()) if isinstance(g["lr"], Tensor) else g["lr"] for g in groups]
        rho = radii([self.radii.get(g, 0.0) for g in range(len(groups))])
        if not length.fixed:
            lr = [rate * length.slope(r) for rate, r in zip(lr, rho, strict=True)]
        return Trial(
            buckets=self.buckets,
            ascents=self.perturbation.ascents,
            first=[by_index(r) if r.grads else {} for r in self.first],
            perturbed=hats,
            stepped=stepped,
            total=self.total,
            lr=lr,
            rho=rho,
            gate=self.gate,
            slope=self.work.setting.descent.slope,
            captured=self.captured,
            versions=[(g, g._version) for h in hats for g in h.values()],
        )

    def _norm(self) -> Tensor:
        """The dual norm of what the perturbation goes along: float64, 0-d."""
        norm = self.perturbation.norm
        return Root(self.total, self.work.setting.direction.q).taken() if norm is None else norm

    def metrics(self) -> dict[str, Tensor | Root]:
        """For :meth:`SAM.metrics`. A captured step takes the roots in its graph."""
        found = self._measured()
        if self.captured:
            return {name: x.taken() if isinstance(x, Root) else x for name, x in found.items()}
        return found

    def _measured(self) -> dict[str, Tensor | Root]:
        setting, q = self.work.setting, self.work.setting.direction.q
        norm: Tensor | Root
        if len(self.totals) > 1 or self.totals[0] is not self.total:  # totals of several passes, or means over ranks
            norm = Root(torch.stack(self.totals).mean(), q)
        elif self._norm_at_theta is not None:
            norm = self._norm_at_theta
        else:
            norm = Root(self.total, q) if self.perturbation.norm is None else self.perturbation.norm
        found = {"grad_norm": norm} if setting.direction.needs_gradient else {}
        if setting.rho_warmup or not setting.length.fixed:
            found["applied_rho"] = self._applied()
        if self.hats:
            found["perturbed_grad_norm"] = Root(self.hats[0], 2.0)
        if self.loss is not None:
            found["loss"] = self.loss
        if self.perturbed_loss is not None:
            found["perturbed_loss"] = self.perturbed_loss
            if self.loss is not None:
                found["loss_gap"] = self.perturbed_loss - self.loss
        return found
