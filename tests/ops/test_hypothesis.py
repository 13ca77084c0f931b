"""Random parameters of every shape, stride, dtype and pattern of gradients: what holds for all of them.

The same examples at every run; LETS_KERNELS_EXAMPLES=n takes n new ones (`make fuzz`).
"""

import math
import os
from dataclasses import dataclass, field, replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import lets_kernels as lk
from support.given_gradients import snapshot
from support.guard_bands import DTYPES, arithmetic, same_bits, storage

EXAMPLES = int(os.environ.get("LETS_KERNELS_EXAMPLES", "0"))
EXTENSION = os.environ.get("LETS_KERNELS_TESTS_WITHOUT_EXTENSION") != "1"
SETTINGS = settings(
    max_examples=EXAMPLES or 200,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

DIRECTIONS = {
    "sam": dict,
    "absolute": lambda: {"adaptive": True},
    "element-wise": lambda: {"direction": lk.Adaptive(0.01)},
    "filter-wise": lambda: {"direction": lk.Adaptive(0.01, filterwise=True)},
    "biases": lambda: {"direction": lk.Adaptive(0.01, filterwise=True, scale_bias=False)},
    "p-1.5": lambda: {"direction": lk.Gradient(1.5)},
    "p-inf": lambda: {"direction": lk.Gradient(math.inf)},
}
# Those of the family that go along something else than the gradient; what they draw, from a seed of their own.
MEMBERS = {
    "friendly": lambda: {"direction": lk.Friendly(0.8, 0.7)},
    "smoothed": lambda: {"direction": lk.Smoothed(0.4)},
    "fisher": lambda: {"direction": lk.Fisher(20.0)},
    "masked": lambda: {"direction": lk.Masked(0.5), "seed": 1},
    "dropped": lambda: {"direction": lk.Dropped(0.6), "seed": 1},
    "gaussian": lambda: {"direction": lk.Gaussian(), "seed": 1},
    "random-start": lambda: {"direction": lk.RandomStart(0.5, 0.7), "seed": 1},
    "surrogate-gap": lambda: {"descent": lk.SurrogateGap(0.4)},
    "reuse": lambda: {"schedule": lk.Every(2), "descent": lk.Reuse(0.5)},
}
# An eps that half precision can hold: torch's own steps divide zero by zero without.
BASES = {
    "sgd": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "adam": (torch.optim.Adam, {"weight_decay": 0.1, "eps": 1e-3}),
    "adamw": (torch.optim.AdamW, {"eps": 1e-3}),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.5, "eps": 1e-3}),
}
STRIDES = ("contiguous", "permuted", "channels-last", "unaligned", "every-second", "inside")


@dataclass(frozen=True)
class Spec:
    """One parameter: how it lies in memory, in which group, and in which of two passes it has a gradient."""

    shape: tuple
    strides: str
    order: tuple
    dtype: torch.dtype
    group: int
    requires_grad: bool
    passes: tuple
    grad_strides: str
    scale: float


@st.composite
def specs(draw):
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=5)))
    return Spec(
        shape,
        draw(st.sampled_from(STRIDES)),
        tuple(draw(st.permutations(range(len(shape))))),
        draw(st.sampled_from(DTYPES)),
        draw(st.integers(0, 2)),
        draw(st.integers(0, 4)) > 0,
        draw(st.sampled_from([(True, True), (True, True), (True, False), (False, True), (False, False)])),
        draw(st.sampled_from(("same", "contiguous", "permuted"))),
        draw(st.sampled_from((1e-3, 1.0, 1.0, 30.0))),
    )


def placed(values, strides, order):
    """The values in memory of the kind asked for, and the whole storage they lie in; NaN is around them."""
    if strides == "permuted":
        inverse = sorted(range(len(order)), key=order.__getitem__)
        home = values.permute(order).contiguous()
        return home.permute(inverse), home
    if strides == "channels-last" and values.dim() in (4, 5):
        kind = torch.channels_last if values.dim() == 4 else torch.channels_last_3d
        home = values.contiguous(memory_format=kind)
        return home, home
    if strides == "every-second" and values.dim():
        home = torch.full((*values.shape[:-1], 2 * values.shape[-1]), torch.nan, dtype=values.dtype)
        home[..., ::2] = values
        return home[..., ::2], home
    if strides == "inside" and values.dim():
        home = torch.full([n + 2 for n in values.shape], torch.nan, dtype=values.dtype)
        inner = home[tuple(slice(1, n + 1) for n in values.shape)]
        inner.copy_(values)
        return inner, home
    offset = int(strides == "unaligned")
    home = torch.full((offset + values.numel() + 3,), torch.nan, dtype=values.dtype)
    home[offset : offset + values.numel()] = values.reshape(-1)
    return home[offset : offset + values.numel()].view(values.shape), home


@dataclass
class Case:
    """Parameters, two passes of gradients a step, and the options of an optimizer over them."""

    found: list
    rho: float
    direction: str
    base: str
    flatten: bool
    seed: int
    homes: list = field(default_factory=list)

    def build(self, backend, lr):
        generator = torch.Generator().manual_seed(self.seed)

        def random(spec):
            return (torch.randn(spec.shape, generator=generator, dtype=torch.float64) * spec.scale).to(spec.dtype)

        self.params, self.homes, groups = [], [], {}
        for spec in self.found:
            values, home = placed(random(spec), spec.strides, spec.order)
            self.params.append(torch.nn.Parameter(values, requires_grad=spec.requires_grad))
            self.homes.append(home)
            groups.setdefault(spec.group, []).append(self.params[-1])
        self.grads = [
            [
                placed(random(s), s.strides if s.grad_strides == "same" else s.grad_strides, s.order)[0]
                if s.passes[i % 2] and s.requires_grad
                else None
                for s in self.found
            ]
            for i in range(4)
        ]
        cls, options = BASES[self.base]
        groups = [{"params": params, "rho": self.rho * (1 + g)} for g, params in groups.items()]
        options = {**(DIRECTIONS | MEMBERS)[self.direction](), **options, "flatten": self.flatten, "backend": backend}
        return lk.SAM(groups, cls, self.rho, lr=lr, **options)

    def give(self, i):
        for p, g in zip(self.params, self.grads[i], strict=True):
            p.grad = None if g is None else g.clone(memory_format=torch.preserve_format)

    def memory(self):
        """The bits of the parameters, and of all the memory that they lie in."""
        return [p.detach().clone() for p in self.params] + [home.clone() for home in self.homes]


def cases_of(directions):
    return st.builds(
        Case,
        st.lists(specs(), min_size=1, max_size=5),
        st.sampled_from((0.0, 1e-4, 0.05, 1.0, 10.0)),
        st.sampled_from(sorted(directions)),
        st.sampled_from(sorted(BASES)),
        st.booleans(),
        st.integers(0, 2**20),
    )


cases, members = cases_of(DIRECTIONS), cases_of(MEMBERS)


def by_two_steps(opt, case, i):
    with opt.first_pass():
        case.give(i)
    opt.first_step(zero_grad=True)
    case.give(i + 1)
    opt.second_step()


def by_context(opt, case, i):
    with opt.first_pass():
        case.give(i)
    with opt.perturbed():
        case.give(i + 1)
    opt.step()


def by_closure(opt, case, i):
    calls = iter((i, i + 1) if opt.direction.needs_gradient else (i + 1,))

    def closure():
        opt.zero_grad()
        case.give(next(calls))
        return 1.0

    opt.step(closure)


@pytest.mark.parametrize("where", ["reference", "cpu"] if EXTENSION else ["reference"])
@SETTINGS
@given(case=cases)
def test_at_lr_zero_every_bit_comes_back(where, case):
    """The weights', and those of the memory between and around them: also after a step that was given up."""
    opt = case.build(where, lr=0.0)
    before = case.memory()
    for i in (0, 2):
        by_two_steps(opt, case, i)
        assert same_bits(case.memory(), before)
    case.give(0)
    opt.first_step()
    opt.restore()
    assert same_bits(case.memory(), before) and opt.metrics()["skipped_steps"].item() == 0


FEW = settings(SETTINGS, max_examples=EXAMPLES or 60)


@pytest.mark.parametrize("where", ["reference", "cpu"] if EXTENSION else ["reference"])
@FEW
@given(case=members)
def test_at_lr_zero_every_bit_comes_back_in_any_method(where, case):
    opt = case.build(where, lr=0.0)
    before = case.memory()
    for i in (0, 2):
        by_two_steps(opt, case, i)
        assert same_bits(case.memory(), before)
    with opt.first_pass():
        case.give(0)
    assert same_bits(case.memory(), before)
    opt.first_step()
    opt.restore()
    assert same_bits(case.memory(), before)


@FEW
@given(case=members)
def test_the_call_shapes_of_any_method_agree_to_the_bit(case):
    ends = []
    for shape in (by_two_steps, by_context, by_closure):
        opt = case.build("auto", lr=0.1)
        for i in (0, 2):
            shape(opt, case, i)
        ends.append(snapshot(opt) + case.memory())
    assert same_bits(ends[0], ends[1]) and same_bits(ends[0], ends[2])


@SETTINGS
@given(case=cases)
def test_the_call_shapes_agree_to_the_bit(case):
    ends = []
    for shape in (by_two_steps, by_context, by_closure):
        opt = case.build("auto", lr=0.1)
        for i in (0, 2):
            shape(opt, case, i)
        ends.append(snapshot(opt) + case.memory())
    assert same_bits(ends[0], ends[1]) and same_bits(ends[0], ends[2])


@pytest.mark.skipif(not EXTENSION, reason="LETS_KERNELS_TESTS_WITHOUT_EXTENSION=1")
@SETTINGS
@given(case=cases)
def test_the_compiled_kernels_are_the_reference(case):
    """Perturbed, to the roundings that the order of the sums and the power leave open; stepped, to the bit for SGD and
    for what steps by itself, and to the roundings of Adam's operations. Filters' norms are rounded once more."""
    perturbed, after = [], []
    for backend in ("cpu", "reference"):
        opt = case.build(backend, lr=0.1)
        start = [p.detach().clone() for p in case.params]
        case.give(0)
        with opt.perturbed():
            perturbed.append([p.detach().clone() for p in case.params])
            case.give(1)
        opt.step()
        after.append([p.detach().clone() for p in case.params])
    for old, ours, theirs in zip(start, *perturbed, strict=True):
        assert_near(old, ours, theirs, 24)
    for old, ours, theirs in zip(start, *after, strict=True):
        if case.base.startswith("adam"):
            assert_near(old, ours, theirs, 16)
        else:
            assert same_bits(ours, theirs)


@SETTINGS
@given(case=cases)
def test_how_parameters_and_gradients_lie_in_memory_changes_no_perturbation(case):
    """The same values in plain tensors are perturbed in the same way, to the roundings that the sums' order leaves."""
    dense = [replace(spec, strides="contiguous", grad_strides="same") for spec in case.found]
    ends = []
    for each in (case, replace(case, found=dense)):
        opt = each.build("auto", lr=0.1)
        start = [p.detach().clone() for p in each.params]
        each.give(0)
        with opt.perturbed():
            ends.append([p.detach().clone() for p in each.params])
    for old, ours, theirs in zip(start, *ends, strict=True):
        assert_near(old, ours, theirs, 24)


def assert_near(old, ours, theirs, roundings):
    """What was added to the weights agrees to some roundings of the arithmetic; the sum and its storage round too.
    Half precision may overflow, in both alike."""
    finite = theirs.isfinite()
    assert torch.equal(ours.isfinite(), finite)
    a, b, old = (x.double()[finite] for x in (ours, theirs, old))
    bound = 2 * storage(theirs.dtype, b) + arithmetic(theirs.dtype) * (b.abs() + roundings * (b - old).abs())
    assert bool(((a - b).abs() <= bound).all())


@SETTINGS
@given(case=cases, at=st.integers(0, 4), shape=st.lists(st.integers(2, 4), min_size=1, max_size=4))
def test_an_expanded_parameter_is_refused_wherever_it_is(case, at, shape):
    case.build("auto", lr=0.1)
    params = [*case.params]
    params.insert(at, torch.nn.Parameter(torch.randn(1, *shape[1:]).expand(shape)))
    before = case.memory()
    with pytest.raises(ValueError, match=r"expanded.*clone"):
        lk.SAM(params, torch.optim.SGD, lr=0.1, flatten=case.flatten)
    assert same_bits(case.memory(), before)
