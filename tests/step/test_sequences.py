"""Whatever is done to an optimizer, in whatever order: its weights are those of a float64 model of the formulas.

hypothesis chooses the moves and shrinks what fails to the shortest row of them. The same rows at every run;
LETS_KERNELS_EXAMPLES=n takes n new ones for each method.
"""

import copy
import functools
import io
import math
import os
import warnings
from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
import torch
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import lets_kernels as lk
from support.drawn_examples import EXAMPLES, drawn
from support.guard_bands import GUARD, same_bits
from support.inside import now, waits

EXTENSION = os.environ.get("LETS_KERNELS_TESTS_WITHOUT_EXTENSION") != "1"
BACKENDS = ["auto", "cpu", "reference"] if EXTENSION else ["reference"]
SETTINGS = drawn(18, stateful_step_count=40 if EXAMPLES else 25)

# The model takes over the weights and the base optimizer's state after every comparison, so what is compared is one
# step. In it a rounding of the gradient, some u of numbers up to ten, comes to the weights by at most lr/eps = 0.1/0.01
# (Adam, RMSprop), and by |g|/|g_v|, up to a hundred, where LookSAM divides by what two gradients differ in: 1e4 u.
# What is not taken over (averages, nu) has forty steps to gather roundings. float64's u is 1.1e-16, float32's 6e-8.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-3}

# eps keeps the derivative of a step in its gradient below ten.
BASES = {
    "sgd": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "adam": (torch.optim.Adam, {"weight_decay": 0.1, "eps": 1e-2}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1, "eps": 1e-2}),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.5, "eps": 1e-2}),
}
ANCHOR, TWINS = 0, (1, 6)  # a parameter that always takes part where a method divides by little; two of one shape
SHAPES = ((3, 4), (5,), (), (0,), (2, 3, 2, 2), (4, 3), (5,))
MORE = ((2, 3), (3,))  # of the groups that come later
LRS, RADII = (0.01, 0.05, 0.1), (0.0, 0.05, 0.3, 2.0)


# ------------------------------------------------------------------------------------------------------------ the loss


@functools.cache
def constants(k, shape, batch):
    """Curvatures, minima and a direction; exact in float32."""
    generator = torch.Generator().manual_seed(100 * batch + k)
    curvature = torch.rand(shape, generator=generator) + 0.5
    return [x.double() for x in (curvature, *(torch.randn(shape, generator=generator) for _ in range(2)))]


def loss_at(tensors, batch, absent=()):
    """Half a quadratic in each parameter, and a tanh that joins all; `absent` ones get no gradient."""
    total = along = torch.zeros((), dtype=tensors[0].dtype)
    for k, x in enumerate(tensors):
        curvature, minimum, direction = (c.to(x.dtype) for c in constants(k, x.shape, batch))
        x = x.detach() if k in absent else x
        total = total + (curvature * (x - minimum) ** 2).sum() / 2
        along = along + 0.2 * (direction * x).sum()
    return total + along.tanh()


class Thrown(Exception):
    pass


# ----------------------------------------------------------------------------------------------------------- the model


@dataclass
class Formula:
    """What a method does with two gradients, as its paper prints it."""

    options: dict  # for lk.SAM, made anew by each call
    rho: float = 0.1
    p: float = 2.0
    scale: str = "one"  # T: one, element, filter
    every: int = 1
    average: str = ""  # "", friendly, vasso
    descent: str = ""  # "", gsam, penalty, apart, stable, looksam
    learned: str = ""  # "", closures, next
    narrow: bool = True  # float32 too
    anchored: bool = False


SIGMA, DECAY, THETA, ALPHA, XI, NU_LR = 0.8, 0.7, 0.4, 0.4, 0.02, 0.3
METHODS = {
    "sam": Formula(dict),
    "asam": Formula(lambda: {"direction": lk.Adaptive(XI)}, 0.5, scale="element"),
    "asam-filterwise": Formula(lambda: {"direction": lk.Adaptive(XI, filterwise=True)}, 0.3, scale="filter"),
    "p-1.5": Formula(lambda: {"direction": lk.Gradient(1.5)}, p=1.5),
    # float32 may round a gradient of nearly zero to the other sign
    "p-inf": Formula(lambda: {"direction": lk.Gradient(math.inf)}, 0.05, p=math.inf, narrow=False),
    "gsam": Formula(lambda: {"descent": lk.SurrogateGap(ALPHA)}, descent="gsam"),
    "norm-penalty": Formula(lambda: {"descent": lk.NormPenalty(ALPHA)}, descent="penalty"),
    "wsam": Formula(lambda: {"descent": lk.Decoupled(ALPHA)}, descent="apart"),
    "stable": Formula(lambda: {"descent": lk.Renormalized()}, descent="stable"),
    "every-second": Formula(lambda: {"schedule": lk.Every(2)}, every=2),
    "looksam": Formula(
        lambda: {"schedule": lk.Every(3), "descent": lk.Reuse(ALPHA)}, 0.3, every=3, descent="looksam", anchored=True
    ),
    "friendly": Formula(lambda: {"direction": lk.Friendly(SIGMA, DECAY)}, average="friendly"),
    "vasso": Formula(lambda: {"direction": lk.Smoothed(THETA)}, average="vasso"),
    # Adam's step along nu is as long for a derivative of nearly zero as for any other, and has its sign
    "lets": Formula(lambda: {"rho": lk.LearnedRadius(0.1, lr=NU_LR)}, learned="closures", narrow=False),
    "lets-next": Formula(
        lambda: {
            "rho": lk.LearnedRadius(0.1, curvature="secant", validation="next", optimizer=torch.optim.SGD, lr=NU_LR)
        },
        learned="next",
    ),
}


def finite(g):
    return all(bool(x.isfinite().all()) for x in g.values())


def dot(a, b):
    return float(sum((a[k] * b[k]).sum() for k in a if k in b))


def ratio(a, b):
    return a / b if b > 0 else 0.0


def own(values):
    """The values as a parameter of float64, in memory of its own."""
    return torch.nn.Parameter(values.to(torch.float64, memory_format=torch.contiguous_format, copy=True))


class Model:
    """The weights in float64, and a torch optimizer of the base's class over them."""

    def __init__(self, formula, base, values, groups, rho):
        self.formula, self.groups = formula, [list(g) for g in groups]
        self.x = list(map(own, values))
        self.rho = [rho for _ in groups]
        cls, options = BASES[base]
        self.base = cls([{"params": [self.x[k] for k in g]} for g in groups], **options, foreach=False)
        self.step = self.passes = self.skipped = self.updates = 0
        self.held, self.waiting, self.trial = {}, None, None
        self.nu = torch.tensor(math.log(formula.rho), dtype=torch.float64, requires_grad=True)
        cls = torch.optim.SGD if formula.learned == "next" else torch.optim.Adam
        self.nu_base = cls([self.nu], lr=NU_LR)

    @property
    def perturbs(self):
        return self.step % self.formula.every == 0

    def radii(self):
        return [float(self.nu.detach().exp())] if self.formula.learned else list(self.rho)

    def of(self, values):
        """A value a group as a dictionary of one a parameter."""
        return {k: values[i % len(values)] for i, g in enumerate(self.groups) for k in g}

    def gradient(self, at, batch, absent=(), frozen=(), poison=None):
        leaves = [x.detach().clone().requires_grad_() for x in at]
        loss = loss_at(leaves, batch)
        found = dict(enumerate(torch.autograd.grad(loss, leaves)))
        found = {k: g for k, g in found.items() if k not in absent and k not in frozen}
        if poison is not None:
            found[poison[0]].view(-1)[0] = poison[1]
        return loss.detach(), found

    def T(self, k):
        x = self.x[k].detach()
        if self.formula.scale == "one":
            return torch.ones_like(x)
        if self.formula.scale == "filter" and x.dim() > 2:
            return torch.linalg.vector_norm(x, dim=tuple(range(1, x.dim())), keepdim=True).expand_as(x) + XI
        return x.abs() + XI

    def towards(self, g):
        """What to perturb along; a moving average counts the gradient."""
        average = self.formula.average
        if not average or not finite(g):
            return g
        decay, d = DECAY if average == "friendly" else 1 - THETA, {}
        for k, x in g.items():
            old = self.held.get(k, torch.zeros_like(x))
            self.held[k] = x if self.updates == 0 else decay * old + (1 - decay) * x
            d[k] = self.held[k] if average == "vasso" else x if self.updates == 0 else x - SIGMA * old
        self.updates += 1
        return d

    def unit(self, d):
        """Foret et al., Eq. 2, with T as Kwon et al.; nothing where d is zero or not finite."""
        p = self.formula.p
        q = 1.0 if p == math.inf else p / (p - 1)
        scaled = {k: self.T(k) * x for k, x in d.items()}
        total = sum(float((x.abs() ** q).sum()) for x in scaled.values())
        if total == 0 or not math.isfinite(total):
            return {k: torch.zeros_like(x) for k, x in d.items()}
        root = total ** (0.0 if p == math.inf else 1 / p)
        return {k: self.T(k) * x.sign() * x.abs() ** (q - 1) / root for k, x in scaled.items()}

    def first(self, signature, *args):
        """The first pass; returns its loss."""
        loss, g = self.gradient([x.detach() for x in self.x], *args)
        waiting, self.waiting = self.waiting, None
        if waiting is not None and waiting[0] in (signature, (*signature[:-1], None)):
            self.learn(*waiting[1:], g)
        radii, eps = self.of(self.radii()), {}
        if self.perturbs:
            eps = {k: radii[k] * x for k, x in self.unit(self.towards(g)).items()}
        moved = [x.detach() + eps[k] if k in eps else x.detach() for k, x in enumerate(self.x)]
        self.trial = signature, g, eps, moved
        return loss

    def give_up(self):
        self.trial = None

    def second(self, *args, made=True):
        """The second pass, if one is made, and the step."""
        (signature, g, eps, moved), self.trial = self.trial, None
        g_hat = self.gradient(moved, *args)[1] if made else g
        self.passes += 1 + (made and bool(g_hat))
        perturbed, lr = self.perturbs, self.of([group["lr"] for group in self.base.param_groups])
        self.step += 1
        ok = finite(g) and finite(g_hat)
        self.skipped += not ok
        d = self.along(g, g_hat, perturbed) if ok else {}
        if ok:
            self.descend(d)
        if ok and self.formula.descent == "apart" and perturbed:
            with torch.no_grad():
                for k, x in g_hat.items():
                    self.x[k] -= lr[k] * ALPHA * (x - d[k])
        if perturbed and g:
            self.waiting = signature, ok, lr, g, d, eps, g_hat

    def along(self, g, g_hat, perturbed):
        """What the base optimizer steps along."""
        if self.formula.descent == "stable" and perturbed:
            factor = math.sqrt(ratio(dot(g, g), dot(g_hat, g_hat)))
            return {k: factor * x for k, x in g_hat.items()}
        g = {k: g.get(k, torch.zeros_like(x)) for k, x in g_hat.items()}
        if self.formula.descent == "gsam":
            across = ratio(dot(g, g_hat), dot(g_hat, g_hat))
            return {k: x - ALPHA * (g[k] - across * x) for k, x in g_hat.items()}
        if self.formula.descent == "penalty":
            return {k: (1 - ALPHA) * g[k] + ALPHA * x for k, x in g_hat.items()}
        if self.formula.descent == "apart" and perturbed:
            return g
        if self.formula.descent == "looksam" and perturbed:
            across = ratio(dot(g, g_hat), dot(g, g))
            self.held |= {k: x - across * g[k] for k, x in g_hat.items()}
        elif self.formula.descent == "looksam":
            kept = {k: self.held.get(k, torch.zeros_like(x)) for k, x in g_hat.items()}
            factor = ALPHA * math.sqrt(ratio(dot(g_hat, g_hat), dot(kept, kept)))
            return {k: x + factor * kept[k] for k, x in g_hat.items()}
        return g_hat

    def descend(self, d):
        for k, x in enumerate(self.x):
            x.grad = d.get(k)
        self.base.step()

    def learn_by_closures(self, batch, val_batch, frozen):
        """LETS, Algorithm 1: the squared gap, the diagonal curvature; counts the passes that are made for it."""
        if self.waiting is None:
            return
        (_, ok, lr, _, _, eps, g_hat), self.waiting = self.waiting, None
        at = [x.detach() for x in self.x]
        (train_loss, train), (val_loss, val) = (self.gradient(at, b, (), frozen) for b in (batch, val_batch))
        self.passes += 2
        slope = sum(
            -lr[k] * float(((val[k] - train[k]) * g_hat[k] ** 2 * x).sum()) for k, x in eps.items() if k in g_hat
        )
        self.move_nu(ok, float(val_loss - train_loss) * slope)

    def learn(self, ok, lr, g, d, eps, g_hat, g_next):
        """validation="next": the loss on the next batch, by the secant."""
        if self.formula.learned == "next" and finite(g_next):
            self.move_nu(
                ok, sum(-lr[k] * float((g_next[k] * (x - g[k])).sum()) for k, x in d.items() if k in g and k in g_next)
            )

    def move_nu(self, ok, slope):
        if ok:
            self.nu.grad = torch.tensor(slope, dtype=torch.float64)
            self.nu_base.step()

    def plain(self, *args):
        self.descend(self.gradient([x.detach() for x in self.x], *args)[1])

    def add(self, values, lr, rho):
        first = len(self.x)
        self.x += map(own, values)
        self.groups.append(list(range(first, len(self.x))))
        self.rho.append(rho)
        self.base.add_param_group({"params": self.x[first:], "lr": lr})

    def state(self, k):
        return self.base.state.get(self.x[k], {})

    def set_lr(self, i, lr):
        self.base.param_groups[i]["lr"] = lr


class Twin(Model):
    """Another optimizer of the package, on the reference backend and dense parameters, with gradients given by hand."""

    def __init__(self, formula, base, values, groups, rho):
        super().__init__(formula, base, values, groups, rho)
        cls, options = BASES[base]
        made = [{"params": [self.x[k] for k in g]} for g in groups]
        self.opt = lk.SAM(made, cls, **formula.options(), backend="reference", **options)
        self.base = self.opt.base_optimizer

    def radii(self):
        return self.opt.rho.reshape(-1).tolist()

    def give(self, *args):
        loss, g = self.gradient([x.detach() for x in self.x], *args)
        for k, x in enumerate(self.x):
            x.grad = g.get(k)
            x.requires_grad_(k not in args[2])
        return loss, g

    def first(self, signature, *args):
        loss, _ = self.give(*args)
        self.opt.first_step(zero_grad=True)
        return loss

    def second(self, *args, made=True):
        self.give(*args)
        self.opt.second_step(zero_grad=True)
        counts = self.opt.metrics()
        self.passes, self.skipped = counts["gradients"].item(), counts["skipped_steps"].item()

    def give_up(self):
        self.opt.restore()

    def plain(self, *args):
        self.give(*args)
        self.base.step()
        self.opt.zero_grad()


METHODS["auto"] = Formula(lambda: {"rho": "auto"}, learned="itself", narrow=False, anchored=True)


# ------------------------------------------------------------------------------------------------------------ the moves


def laid(values, where):
    """The same values, otherwise in memory."""
    if where == "channels-last" and values.dim() == 4:
        return values.contiguous(memory_format=torch.channels_last)
    if where == "transposed" and values.dim() > 1:
        return values.mT.contiguous().mT
    if where == "clone":
        return values.clone()
    return values.contiguous()


def as_it_lies(values, like):
    """The values in new memory, with the strides of another tensor."""
    return torch.empty_strided(like.shape, like.stride(), dtype=values.dtype).copy_(values.detach())


LAYOUTS = ("contiguous", "channels-last", "transposed")
ZEROES = ("optimizer", "base", "in-place", "none")
CLOSURES, HANDS = ("closure", "adding", "older"), ("two-steps", "context")
bits_of = st.integers(0, 2**8 - 1).map(lambda word: frozenset(k for k in range(8) if word >> k & 1))
# Mostly every parameter has a gradient in every pass.
absences = st.one_of(st.just(frozenset()), st.just(frozenset()), bits_of)
batches = st.integers(0, 30)
which = st.integers(0, 8)


@dataclass
class Plan:
    """One step: what its passes leave out, what they break, and where they throw."""

    batch: int
    absent: tuple = (frozenset(), frozenset())
    poison: tuple = (None, None)
    throws: int = 9
    zeroes: str = "optimizer"
    calls: int = 0

    def make(self, params, batch=None):
        """One pass, whose gradients are added to what is there."""
        i = self.calls
        self.calls += 1
        absent = self.absent[i] if i < 2 else ()
        loss = loss_at(params, self.batch if batch is None else batch, absent)
        if loss.requires_grad:
            loss.backward()
        if i == self.throws:
            raise Thrown
        if i < 2 and self.poison[i] is not None:
            k, value = self.poison[i]
            with torch.no_grad():
                params[k].grad[(0,) * params[k].dim()] = value
        return loss.detach()


class Machine(RuleBasedStateMachine):
    """Moves of a user, one after the other."""

    method = "sam"

    @initialize(
        base=st.sampled_from(sorted(BASES)),
        backend=st.sampled_from(BACKENDS),
        narrow=st.integers(0, 3).map(lambda n: n == 0),
        flatten=st.booleans(),
        check_finite=st.integers(0, 4).map(bool),
    )
    def begin(self, base, backend, narrow, flatten, check_finite):
        formula = self.formula = METHODS[self.method]
        self.base, self.backend, self.flatten, self.check_finite = base, backend, flatten, check_finite
        self.dtype = torch.float32 if narrow and formula.narrow else torch.float64
        # auto takes the gradient's relative change kappa from sums of squares, which know it to u/kappa^2; kappa > 1e-4
        self.tolerance = 1e-7 if self.method == "auto" else TOLERANCE[self.dtype]
        generator = torch.Generator().manual_seed(7)
        values = [torch.randn(s, generator=generator).to(self.dtype) for s in SHAPES]
        values[4] = laid(values[4], "channels-last")
        self.home = torch.full((4, 6), GUARD, dtype=self.dtype)
        if not flatten:  # which leaves a bucket with holes as it is
            self.home[:, ::2] = values[5]
            values[5] = self.home[:, ::2]
        self.params, self.groups = list(map(torch.nn.Parameter, values)), [[0, 1, 2, 3], [4, 5, 6]]
        self.opt = self.build(0.05, formula.rho)
        kind = Twin if self.method == "auto" else Model
        self.model = kind(formula, base, [p.detach() for p in self.params], self.groups, formula.rho)
        for i in range(2):
            self.model.set_lr(i, 0.05)
        self.moved, self.made_by_closures, self.scheduler = 0, False, None

    def build(self, lr, rho):
        cls, options = BASES[self.base]
        own = {"rho": self.formula.rho if self.formula.learned else rho, **self.formula.options()}
        groups = [{"params": [self.params[k] for k in g]} for g in self.groups]
        rest = {"backend": self.backend, "flatten": self.flatten, "check_finite": self.check_finite}
        return lk.SAM(groups, cls, **own, **rest, lr=lr, **options)

    # ---- what there is

    @property
    def frozen(self):
        return frozenset(k for k, p in enumerate(self.params) if not p.requires_grad)

    @property
    def signature(self):
        """What LETS's waiting step must find as it was: what is trained, how it lies, and in which buffer."""
        lie = [(p.dtype, p.stride()) if p.requires_grad else None for p in self.params]
        return lie, [list(g) for g in self.groups], self.moved if self.flatten else 0

    def point(self, p, memory):
        """Let a parameter lie there; the buffer of those that are trained is then made anew."""
        place = p.data_ptr()
        p.data = memory
        self.moved += p.requires_grad and p.data_ptr() != place

    def bits(self):
        """Everything that a step which does not happen must leave."""
        state = [self.opt.base_optimizer.state.get(p, {}) for p in self.params]
        tensors = [s[name].clone() for s in state for name in sorted(s) if torch.is_tensor(s[name]) and s[name].any()]
        return [*(p.detach().clone() for p in self.params), *tensors, self.opt.rho]

    def near(self, ours, theirs, what):
        a, b = ours.detach().double(), theirs.detach().double()
        assert bool(((a - b).abs() <= self.tolerance * (1 + b.abs())).all()), f"{what}: {a} is not {b}"

    @invariant()
    def the_weights_are_the_models(self):
        if not hasattr(self, "opt"):
            return
        assert now(self.opt).step is None or not now(self.opt).step.is_perturbed
        with torch.no_grad():
            for k, p in enumerate(self.params):
                self.near(p, self.model.x[k], f"parameter {k}")
                self.model.x[k].copy_(p)
                ours, theirs = self.opt.base_optimizer.state.get(p, {}), self.model.state(k)
                for name in ours.keys() | theirs.keys():
                    mine = ours.get(name)
                    if not torch.is_tensor(mine if mine is not None else theirs[name]):
                        continue
                    zero = torch.zeros_like(p)  # where averages begin; a skipped first step may have made them or not
                    other = theirs.get(name, torch.zeros(()) if name == "step" else zero)
                    self.near(zero if mine is None else mine, other, f"{name} of parameter {k}")
                    if name in theirs and mine is not None:
                        theirs[name].copy_(mine)
        assert bool((self.home[:, 1::2] == GUARD).all()), "something was written between the elements"
        self.near(self.opt.rho.reshape(-1), torch.tensor(self.model.radii(), dtype=torch.float64), "rho")

    @invariant()
    def the_counts_are_the_models(self):
        if not hasattr(self, "opt"):
            return
        found = self.opt.metrics()
        assert found["gradients"].item() == self.model.passes
        assert found["skipped_steps"].item() == self.model.skipped
        assert torch.equal(found["rho"], self.opt.rho)

    # ---- steps

    def plan(self, batch, absent, poison=None, throws=9, zeroes="optimizer"):
        """A plan that can be carried out: `poison` is a pass, a parameter and a value."""
        if self.formula.anchored:
            absent = tuple(each - {ANCHOR} for each in absent)
        broken = [None, None]
        if poison is not None and self.check_finite:
            i, k, value = poison
            there = [j for j, p in enumerate(self.params) if p.requires_grad and p.numel()]
            k = there[k % len(there)]
            absent = tuple(each - {k} if j == i else each for j, each in enumerate(absent))
            broken[i] = k, value
        if zeroes == "in-place" and (any(absent) or self.frozen):  # zeros are gradients too
            zeroes = "optimizer"
        return Plan(batch, absent, tuple(broken), throws, zeroes)

    def clear(self, how):
        if how == "base":
            self.opt.base_optimizer.zero_grad()
        elif how == "in-place":
            self.opt.zero_grad(set_to_none=False)
        elif how == "none":
            for p in self.params:
                p.grad = None
        else:
            self.opt.zero_grad()

    def closures(self, plan):
        """One that zeroes and one that adds; each is one piece of code for all steps, as in a training loop."""
        params, opt, clear = self.params, self.opt, self.clear

        def zeroing():
            if plan.zeroes == "optimizer":
                opt.zero_grad()
            else:
                clear(plan.zeroes)
            return plan.make(params)

        def adding():
            return plan.make(params)

        return zeroing, adding

    def on_validation(self, plan):
        def closure():
            self.opt.zero_grad()
            return plan.make(self.params, plan.batch + 50)

        return [closure] if self.formula.learned == "closures" else []

    def take(self, shape, plan, extra=False):
        """One step in the package; what it returns is the first loss, where it was the closure's."""
        opt, (zeroing, adding), val = self.opt, self.closures(plan), self.on_validation(plan)
        if shape == "closure":
            return opt.step(zeroing, *val)
        if shape == "adding":
            opt.zero_grad()
            return opt.step(adding, *val)
        if shape == "older":
            opt.zero_grad()
            plan.make(self.params)
            asks = (
                self.made_by_closures
                or opt.direction.remembers
                or opt.length.remembers
                or waits(opt)
                or not opt.schedule.capturable
            )
            said = {"first_backward": True} if asks else {}  # else one call more would find it out, once
            return opt.step(adding, *val, **said)
        opt.zero_grad()
        with opt.first_pass():
            plan.make(self.params)
        if shape == "two-steps":
            if opt.first_step(zero_grad=True) or extra:
                plan.make(self.params)
            opt.second_step()
        else:
            with opt.perturbed() as needed:
                if needed or extra:
                    opt.zero_grad()
                    plan.make(self.params)
            opt.step()
        if val:
            opt.radius_step(zeroing, *val)
        return None

    def model_first(self, plan):
        return self.model.first(self.signature, plan.batch, plan.absent[0], self.frozen, plan.poison[0])

    def model_second(self, plan, made=True):
        self.model.second(plan.batch, plan.absent[1], self.frozen, plan.poison[1], made=made)
        if self.formula.learned == "closures":
            self.model.learn_by_closures(plan.batch, plan.batch + 50, self.frozen)

    def step(self, shape, plan, extra=False):
        perturbs = self.model.perturbs
        if extra:
            plan.absent = plan.absent[0], frozenset()
        if shape == "older" and not self.present(plan):
            return
        signature = self.signature
        loss = self.model_first(plan)
        made = perturbs or (extra and shape in HANDS)
        self.model_second(plan, made)
        returned = self.take(shape, plan, extra)
        learns = self.formula.learned == "closures" and bool(self.present(plan))
        assert self.signature == signature and plan.calls == made + 1 + 2 * learns
        if shape in ("closure", "adding"):
            self.near(returned, loss, "the first loss")
            self.near(self.opt.metrics()["loss"], loss, "metrics()['loss']")
            self.made_by_closures = True
        else:
            assert returned is None

    def present(self, plan):
        """The parameters that have a gradient in the first pass."""
        return [k for k, p in enumerate(self.params) if p.requires_grad and k not in plan.absent[0]]

    @rule(
        shape=st.sampled_from(CLOSURES),
        batch=batches,
        absent=st.tuples(absences, absences),
        zeroes=st.sampled_from(ZEROES),
    )
    def a_step_by_closures(self, shape, batch, absent, zeroes):
        self.step(shape, self.plan(batch, absent, zeroes=zeroes))

    @rule(
        shape=st.sampled_from(HANDS),
        batch=batches,
        absent=st.tuples(absences, absences),
        extra=st.booleans(),
    )
    def a_step_by_hand(self, shape, batch, absent, extra):
        """`extra`: with a second pass also where none is needed."""
        self.step(shape, self.plan(batch, absent), extra)

    @rule(batch=batches, other=batches, zeroes=st.sampled_from(ZEROES))
    def a_step_after_somebody_elses_backward(self, batch, other, zeroes):
        """Called for every gradient, whatever lies there."""
        loss_at(self.params, other).backward()
        self.step("closure", self.plan(batch, (frozenset(), frozenset()), zeroes=zeroes))

    @rule(
        shape=st.sampled_from((*CLOSURES, *HANDS)),
        batch=batches,
        absent=st.tuples(absences, absences),
        poison=st.tuples(st.integers(0, 1), which, st.sampled_from((math.nan, math.inf, -math.inf))),
    )
    def a_gradient_that_is_not_finite(self, shape, batch, absent, poison):
        """Skips the step: what there is stays to the bit."""
        plan = self.plan(batch, absent, poison)
        if shape == "older" and not self.present(plan):
            return
        if plan.poison == (None, None) or (plan.poison[1] is not None and not self.model.perturbs):
            return
        waits = self.formula.learned == "next" and poison[0] == 1  # the radius learns in this step from the last one
        before, skipped = self.bits(), self.model.skipped
        self.step(shape, plan)
        after = self.bits()
        if waits:
            before, after = before[:-1], after[:-1]
        assert same_bits(before, after)
        assert self.opt.metrics()["skipped_steps"].item() == skipped + 1

    @rule(
        shape=st.sampled_from(CLOSURES), batch=batches, absent=absences, call=st.integers(0, 3), context=st.booleans()
    )
    def an_exception_in_a_pass(self, shape, batch, absent, call, context):
        """Weights and state are those of before; what counts first gradients has counted one."""
        if call > 1:
            self.an_exception_while_learning(shape, self.plan(batch, (absent, frozenset()), throws=call))
            return
        if call == 1 and not self.model.perturbs:
            return
        plan = self.plan(batch, (absent, frozenset()), throws=call)
        if shape == "older" and (call == 0 or not self.present(plan)):
            return
        if call == 1:
            self.model_first(plan)
            self.model.give_up()
        before = self.bits()
        with pytest.raises(Thrown):
            self.take("context" if context and call == 1 else shape, plan)
        after = self.bits()
        if self.formula.learned == "next":  # from the step before
            before, after = before[:-1], after[:-1]
        assert same_bits(before, after) and plan.calls == call + 1

    def an_exception_while_learning(self, shape, plan):
        """The step is taken, and rho learns nothing from it."""
        if self.formula.learned != "closures" or not self.present(plan):
            return
        self.model_first(plan)
        self.model.second(plan.batch, plan.absent[1], self.frozen)
        rho = self.opt.rho
        with pytest.raises(Thrown):
            self.take(shape, plan)
        assert torch.equal(self.opt.rho, rho) and plan.calls == plan.throws + 1
        self.model.waiting = None
        self.made_by_closures |= shape != "older"

    @precondition(lambda self: self.model.perturbs)
    @rule(
        batch=batches,
        absent=st.tuples(absences, absences),
        what=st.sampled_from(("nothing", "refused", "restore", "clone", "relay", "double")),
        ends=st.sampled_from(("second_step", "restore", "closure")),
        k=which,
        layout=st.sampled_from(LAYOUTS),
    )
    def something_between_the_passes(self, batch, absent, what, ends, k, layout):
        """Memory that changes is followed, or the step is refused; the weights come home in both cases."""
        plan, opt = self.plan(batch, absent), self.opt
        if what == "double" and self.dtype is torch.float64:
            what = "clone"
        before = [p.detach().clone() for p in self.params]
        self.model_first(plan)
        opt.zero_grad()
        plan.make(self.params)
        assert opt.first_step(zero_grad=True)
        there = [q for q in self.params if q.requires_grad and q.dim() >= 2 * (what == "relay")] or self.params
        p, refused = there[k % len(there)], None
        strides, place = p.stride(), p.data_ptr()
        if what == "refused":
            assert opt.metrics()["rho"].isfinite().all()
            new = torch.nn.Parameter(torch.zeros(2, dtype=self.dtype))
            for call in (opt.state_dict, opt.first_step, lambda: copy.deepcopy(opt)):
                with pytest.raises(RuntimeError, match="perturbed"):
                    call()
            with pytest.raises(RuntimeError, match="perturbed"):
                opt.add_param_group({"params": [new]})
        elif what == "clone":
            self.point(p, p.data.clone())
        elif what == "relay":
            self.point(p, laid(p.data, layout))
        elif what == "double":
            p.grad = None
            self.point(p, p.data.double())
        if p.dtype is not self.dtype or p.stride() != strides:
            refused = "changed between the passes"
        elif self.flatten and p.numel() and p.data_ptr() != place:
            refused = "taken out of the buffer"
        if what == "restore" or ends != "second_step" or refused:
            self.model.give_up()
            if ends == "closure" and what != "double":  # restores by itself
                self.step("closure", self.plan(batch + 1, absent))
                return
            if refused and ends == "second_step":
                with pytest.raises(RuntimeError, match=refused):
                    opt.second_step()
            else:
                opt.restore()
            if what == "double":
                self.point(p, p.data.float())
            assert same_bits([q.detach().contiguous() for q in self.params], [b.contiguous() for b in before])
            opt.restore()
            return
        plan.make(self.params)
        self.model_second(plan)
        opt.second_step()
        if self.formula.learned == "closures":
            opt.radius_step(self.closures(plan)[0], *self.on_validation(plan))

    @rule()
    def restore(self):
        before = self.bits()
        self.opt.restore()
        assert same_bits(self.bits(), before)

    @rule(shape=st.sampled_from((*CLOSURES, *HANDS)), batch=batches)
    def a_step_with_lr_zero(self, shape, batch):
        """Moves no bit."""
        lrs = [group["lr"] for group in self.opt.param_groups]
        before = [p.detach().clone() for p in self.params]
        for i, group in enumerate(self.opt.param_groups):
            group["lr"] = 0.0
            self.model.set_lr(i, 0.0)
        self.step(shape, self.plan(batch, (frozenset(), frozenset())))
        assert same_bits([p.detach() for p in self.params], before)
        for i, (group, lr) in enumerate(zip(self.opt.param_groups, lrs, strict=True)):
            group["lr"] = lr
            self.model.set_lr(i, lr)

    @rule(batch=batches)
    def a_step_of_the_base_optimizer_alone(self, batch):
        self.model.plain(batch, (), self.frozen)
        self.opt.zero_grad()
        loss_at(self.params, batch).backward()
        self.opt.base_optimizer.step()

    @rule(to_none=st.booleans())
    def gradients_are_zeroed(self, to_none):
        before = self.bits()
        self.opt.zero_grad(set_to_none=to_none or bool(self.frozen))
        assert same_bits(self.bits(), before)

    # ---- groups

    @rule(i=which, lr=st.sampled_from(LRS))
    def another_lr(self, i, lr):
        i %= len(self.groups)
        self.opt.param_groups[i]["lr"] = lr
        self.model.set_lr(i, lr)

    @precondition(lambda self: not self.formula.learned)
    @rule(i=which, rho=st.sampled_from(RADII))
    def another_rho(self, i, rho):
        i %= len(self.groups)
        # LookSAM divides by what the perturbation has changed
        rho = max(rho, 0.05) if self.formula.descent == "looksam" else rho
        self.opt.param_groups[i]["rho"] = rho
        self.model.rho[i] = rho

    @rule(on_base=st.booleans())
    def a_scheduler_steps(self, on_base):
        lrs = [group["lr"] for group in self.opt.param_groups]
        if self.scheduler is None:
            at = self.opt.base_optimizer if on_base else self.opt
            self.scheduler = torch.optim.lr_scheduler.ExponentialLR(at, 0.9)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a scheduler before the first step
            self.scheduler.step()
        for i, lr in enumerate(lrs):
            assert self.opt.param_groups[i]["lr"] == pytest.approx(0.9 * lr, rel=1e-12)  # a few roundings
            self.model.set_lr(i, self.opt.param_groups[i]["lr"])

    @precondition(lambda self: len(self.groups) < 2 + len(MORE))
    @rule(on_base=st.booleans(), lr=st.sampled_from(LRS), rho=st.sampled_from(RADII))
    def another_group(self, on_base, lr, rho):
        shape = MORE[len(self.groups) - 2]
        new = torch.nn.Parameter(constants(90, shape, 0)[1].to(self.dtype))
        group = {"params": [new], "lr": lr}
        if on_base:
            self.opt.base_optimizer.add_param_group(group)
            rho = self.opt.defaults["rho"]
        elif self.formula.learned:
            self.opt.add_param_group(group)
        else:
            rho = max(rho, 0.05) if self.formula.descent == "looksam" else rho
            self.opt.add_param_group({**group, "rho": rho})
        self.model.add([new.detach()], lr, rho)
        self.groups.append([len(self.params)])
        self.params.append(new)
        self.scheduler = None

    @rule(k=which)
    def freeze_or_thaw(self, k):
        k %= len(self.params)
        if k != ANCHOR:
            self.params[k].requires_grad_(not self.params[k].requires_grad)

    # ---- memory

    @rule(k=which, layout=st.sampled_from(("clone", *LAYOUTS)))
    def another_memory(self, k, layout):
        """Is followed, and so is state that lies otherwise."""
        p = self.params[k % len(self.params)]
        if (
            self.model.waiting is not None and self.model.waiting[0][-1] is None
        ):  # a loaded step goes with the old order
            return
        p.grad = None
        self.point(p, laid(p.data, layout))

    @precondition(lambda self: self.dtype is torch.float32)
    @rule()
    def float64_from_now_on(self):
        """A base optimizer's state has to be loaded again, as that of any torch optimizer."""
        for p in self.params:
            p.grad, p.data = None, p.data.double()
        self.dtype = torch.float64
        if any(map(torch.is_tensor, (t for entry in self.opt.state.values() for t in entry.values()))):
            self.opt.load_state_dict(copy.deepcopy(self.opt.state_dict()))
            self.loaded()

    @rule(batch=batches)
    def shared_memory_is_refused(self, batch):
        p, q = (self.params[k] for k in TWINS)
        if not (p.requires_grad and q.requires_grad):
            return
        before, old = self.bits(), q.data.clone()
        self.point(q, p.data)
        with pytest.raises(ValueError, match="share memory"):
            self.take("closure", self.plan(batch, (frozenset(), frozenset())))
        self.point(q, old)
        assert same_bits(self.bits(), before)

    # ---- saving and copying

    def loaded(self):
        """Nothing remembers how earlier steps were taken, nor in which buffer."""
        self.made_by_closures, self.scheduler = False, None
        if self.model.waiting is not None:
            (*same, _), *rest = self.model.waiting
            self.model.waiting = (*same, None), *rest

    @rule()
    def saved_and_loaded(self):
        """An optimizer that was built otherwise goes on."""
        file, before = io.BytesIO(), self.bits()
        torch.save(self.opt.state_dict(), file)
        file.seek(0)
        self.params = [torch.nn.Parameter(as_it_lies(p, p), p.requires_grad) for p in self.params]
        self.opt = self.build(0.3, 0.7)
        self.opt.load_state_dict(torch.load(file, weights_only=True))
        self.loaded()
        assert same_bits(self.bits(), before)

    @rule(batch=batches)
    def a_copy_goes_on(self, batch):
        """The original, which steps once more, does not reach into it."""
        before, (params, opt) = self.bits(), copy.deepcopy((self.params, self.opt))
        self.take("two-steps", self.plan(batch, (frozenset(), frozenset())))
        for p, q in zip(params, self.params, strict=True):
            p.data = as_it_lies(p, q)  # copies have no holes
        self.params, self.opt = params, opt
        self.loaded()
        assert same_bits(self.bits(), before)


@pytest.mark.parametrize("method", METHODS)
def test_any_row_of_moves_leads_where_the_formulas_do(method):
    machine = type(f"Machine[{method}]", (Machine,), {"method": method})
    with warnings.catch_warnings():
        warnings.simplefilter("error", lk.ClosureWarning)
        run_state_machine_as_test(machine, settings=SETTINGS)
