"""Exact restore: whatever the weights' bits, the radius and the shapes, what was perturbed comes back bit for bit."""

import itertools

import pytest
import torch

import lets_kernels as lk
from support import family
from support.core_methods import BASES
from support.family import ALWAYS, FAMILY, ONE_EACH
from support.given_gradients import weights
from support.guard_bands import DTYPES, same_bits

RADII = (0.0, 1e-8, 1e-3, 0.05, 1.0, 10.0, 1e30)  # the last one overflows
METHODS = {
    "sam": (lk.SAM, {}),
    "asam": (lk.ASAM, {"xi": 0.0}),
    "asam-filterwise": (lk.ASAM, {"filterwise": True}),
    "letssam": (lk.LETSSAM, {}),
}
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def shapes(generator):
    """Some that are sure to come, in the order that `lay_out` goes by, and random ones of 0 to 5 dimensions."""
    dimensions = torch.randint(0, 6, (6,), generator=generator).tolist()
    drawn = [tuple(torch.randint(1, 6, (n,), generator=generator).tolist()) for n in dimensions]
    return [(), (0, 3), (33,), (5,), (3, 4, 2, 2), (6, 7), *drawn]


def any_bits(shape, dtype, generator):
    """Every pattern is as likely: NaN and infinity, subnormals, numbers of any size, both signs; and some zeros."""
    integer = INTEGERS[dtype.itemsize]
    info = torch.iinfo(integer)
    values = torch.randint(info.min, info.max, shape, generator=generator, dtype=integer)
    flat = values.view(-1)
    flat[::5], flat[1::7] = 0, info.min  # 0.0 and -0.0
    flat[2::9] &= 7  # subnormals
    return values.view(dtype)


def subnormals_and_zeros(shape, dtype, generator):
    """Finite numbers: of ordinary size, subnormal, 0.0 and -0.0."""
    values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    flat, tiny = values.view(-1), torch.finfo(dtype).smallest_normal
    flat[::4] *= tiny
    flat[1::6], flat[2::6] = 0.0, -0.0
    return values


def lay_out(tensors):
    """In turn contiguous, channels-last or transposed, and with gaps between the elements."""
    laid = []
    for i, t in enumerate(tensors):
        if i % 3 == 1 and t.dim() == 4:
            t = t.contiguous(memory_format=torch.channels_last)
        elif i % 3 == 1 and t.dim() > 1:
            t = t.transpose(0, 1).contiguous().transpose(0, 1)
        elif i % 3 == 2 and t.dim() > 0:
            t = torch.stack([t, t], dim=-1)[..., 0]
        laid.append(t)
    return laid


class Exact:
    """Parameters of the given bits in two groups, and gradients of which no square vanishes in float16."""

    def __init__(self, dtype, make, layouts, seed=0):
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype
        tensors = [make(shape, dtype, self.generator) for shape in shapes(self.generator)]
        self.params = [torch.nn.Parameter(t) for t in (lay_out(tensors) if layouts else tensors)]

    def optimizer(self, method, base, rho, backend, **more):
        groups = [{"params": self.params[::2]}, {"params": self.params[1::2]}]
        if method in FAMILY:
            more = {**ALWAYS.get(method, {}), **more, "rho": rho, "backend": backend.name}
            opt = family.build(method, groups, base, **more)
            for group in opt.param_groups:
                group["lr"] = 0.0
            return opt
        cls, arguments = METHODS[method]
        optimizer, _, options, _ = BASES[base]
        options = {**arguments, **options, "lr": 0.0, **more}
        return cls(groups, optimizer, rho=rho, backend=backend.name, **options)

    def backward(self):
        for p in self.params:
            g = torch.randn(p.shape, generator=self.generator, dtype=torch.float64)
            p.grad = (g + g.sign()).to(self.dtype)
        return torch.ones(())

    def first(self, opt):
        """The first pass, where there is one."""
        with opt.first_pass():
            self.backward()

    def step(self, opt):
        self.first(opt)
        opt.first_step(zero_grad=True)
        self.backward()
        while opt.ascents_left:
            opt.first_step(zero_grad=True)
            self.backward()
        opt.second_step(zero_grad=True)
        if opt.radius.learns:
            opt.radius_step(self.backward, self.backward)


def radii(method, backend):
    if method in FAMILY and backend.name == "reference":  # which selects masks and draws slowly
        return (1.0,)
    return RADII if method != "letssam" else RADII[1:]  # a learned radius is above zero


CASES = [(method, dtype) for method in METHODS for dtype in DTYPES]
CASES += [(method, torch.bfloat16) for method in ONE_EACH]


@pytest.mark.parametrize("method, dtype", CASES, ids=str)
def test_weights_of_any_bits_come_back(backend, method, dtype):
    """NaN keeps its payload. With layouts of every kind, and flattened."""
    for (i, rho), layouts in itertools.product(enumerate(radii(method, backend)), (False, True)):
        exact = Exact(dtype, any_bits, layouts, seed=i)
        before = weights(exact.params)
        opt = exact.optimizer(method, "momentum", rho, backend, flatten=bool(i % 2))
        exact.first(opt)
        assert same_bits(weights(exact.params), before)
        with opt.perturbed():
            pairs = zip(exact.params, before, strict=True)
            moved = [not same_bits(p.detach(), x) for p, x in pairs if p.numel() > 30]
            assert all(moved) or method != "sam" or rho < 1  # else NaN may have made the norm NaN
        assert len(moved) > 2 and same_bits(weights(exact.params), before)


STEPS = [(method, base, dtype) for method in METHODS for base in BASES for dtype in DTYPES]
STEPS += [(method, "adamw" if FAMILY[method].base else "momentum", torch.float16) for method in ONE_EACH]


@pytest.mark.parametrize("method, base, dtype", STEPS, ids=str)
def test_steps_of_size_zero_leave_the_bits(backend, method, base, dtype):
    """Fused steps do; a base optimizer that steps by itself adds zeros, which may make 0.0 of its -0.0, and no more."""
    perturbed = False
    for i, rho in enumerate(radii(method, backend)):
        exact = Exact(dtype, subnormals_and_zeros, layouts=False, seed=i)
        before = weights(exact.params)
        opt = exact.optimizer(method, base, rho, backend, flatten=bool(i % 2))
        for _ in range(2):
            exact.step(opt)
            after = weights(exact.params)
            if opt.fused:
                assert same_bits(after, before), rho
            else:
                assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True)), rho
        exact.first(opt)
        with opt.perturbed():
            perturbed |= not same_bits(weights(exact.params), after)
        assert same_bits(weights(exact.params), after)
        assert opt.fused == (BASES[base][3] is not None)
    assert perturbed
