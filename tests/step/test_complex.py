"""Complex parameters are pairs of real numbers: a step is that of real parameters that hold the pairs, to the bit."""

import io

import pytest
import torch

import lets_kernels as lk
from support import family
from support.core_methods import BASES
from support.family import FAMILY, ONE_EACH
from support.guard_bands import same_bits
from support.inside import held

SHAPES = ((3, 2, 2), (4,), (), (0, 2), (2, 3))
METHODS = {
    "sam": lambda: (lk.SAM, {"rho": 0.3}),
    "sam-p3": lambda: (lk.SAM, {"rho": 0.3, "direction": lk.Gradient(p=3.0)}),
    "asam": lambda: (lk.ASAM, {"rho": 0.5, "scale_bias": False}),
    "lets-secant": lambda: (lk.LETSSAM, {"rho": lk.LearnedRadius(0.3, curvature="secant")}),
    "lets-diagonal": lambda: (lk.LETSSAM, {"rho": lk.LearnedRadius(0.3, lr=0.1)}),
}


class Problem:
    """½ Σ |θ − a|⁴ over parameters that are complex, or the real pairs of them."""

    def __init__(self, complex, dtype=torch.complex64, laid=lambda t: t):
        generator = torch.Generator().manual_seed(3)

        def tensors():
            return [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]

        starts, self.batches = tensors(), [tensors() for _ in range(12)]
        as_held = (lambda t: laid(t)) if complex else torch.view_as_real
        self.params = [torch.nn.Parameter(as_held(t).clone(memory_format=torch.preserve_format)) for t in starts]
        self.complex = complex

    def pairs(self, p):
        return torch.view_as_real(p) if self.complex else p

    def loss(self, i):
        sides = zip(self.params, self.batches[i], strict=True)
        return sum(((self.pairs(p) - torch.view_as_real(a)).square().sum(-1)).square().sum() for p, a in sides) / 40

    def closure(self, opt, i):
        def run():
            opt.zero_grad()
            loss = self.loss(i)
            loss.backward()
            return loss

        return run

    def steps(self, opt, numbers):
        for i in numbers:
            if opt.samples.per_sample:
                self.closure(opt, i)()
                opt.first_step(zero_grad=True)
                self.closure(opt, i)()
                opt.second_step()
                continue
            opt.step(*[self.closure(opt, j) for j in ((i, i + 6) if opt.radius.learns else (i,))])

    def everything(self, opt):
        state = [t for entry in opt.state.values() for _, t in sorted(entry.items()) if torch.is_tensor(t)]
        state += [t for p in self.params for _, t in sorted(held(opt).get(p, {}).items())]
        real = [torch.view_as_real(t) if t.is_complex() else t for t in (*(p.detach() for p in self.params), *state)]
        return [*real, opt.rho, opt.metrics().get("grad_norm", opt.rho)]


def build(method, base, params, backend):
    if method in FAMILY:
        return family.build(method, params, base, backend=backend.name)
    cls, arguments = METHODS[method]()
    optimizer, _, options, _ = BASES[base]
    # As real pairs a vector is a matrix, which only its name keeps a bias.
    names = [f"{i}.{'bias' if len(shape) < 2 else 'weight'}" for i, shape in enumerate(SHAPES)]
    return cls(list(zip(names, params, strict=True)), optimizer, **arguments, backend=backend.name, **options)


CASES = [
    (method, base, dtype)
    for method in METHODS
    for base in ("momentum", "adam", "adamw", "dampening", "rmsprop")
    for dtype in (torch.complex64, torch.complex128)
]
#: The filters of R-SAM's start are rows of a matrix and whole vectors, and as real pairs a vector is a matrix.
CASES += [(name, "momentum", torch.complex64) for name in ONE_EACH if name not in ("rsam", "rgsam")]


@pytest.mark.parametrize("method, base, dtype", CASES, ids=str)
def test_steps_are_those_of_the_real_pairs(backend, method, base, dtype):
    ends = []
    for complex in (True, False):
        problem = Problem(complex, dtype)
        before = [p.detach().clone() for p in problem.params]
        opt = build(method, base, problem.params, backend)
        problem.steps(opt, range(6))
        assert opt.backend == backend.name
        assert not any(torch.equal(p, b) for p, b in zip(problem.params, before, strict=True) if p.numel())
        ends.append(problem.everything(opt))
    if opt.fused:
        assert same_bits(*ends)
    else:  # torch's own arithmetic on complex numbers rounds otherwise: some ulp in six steps
        for ours, expected in zip(*ends, strict=True):
            torch.testing.assert_close(
                ours, expected, rtol=64 * torch.finfo(dtype).eps, atol=64 * torch.finfo(dtype).eps
            )


@pytest.mark.parametrize("laid", [lambda t: t, lambda t: t.mT if t.dim() > 1 else t], ids=["contiguous", "transposed"])
@pytest.mark.parametrize("shape", ["two-steps", "context"])
def test_weights_are_restored_to_the_bit(backend, shape, laid):
    problem = Problem(True, laid=laid)
    for p, a in zip(problem.params, problem.batches[0], strict=True):
        p.grad = laid(a).clone()
    opt = lk.SAM(problem.params, torch.optim.SGD, rho=3.0, lr=0.1, backend=backend.name)
    before = [p.detach().clone() for p in problem.params]
    if shape == "context":
        with opt.perturbed():
            moved = [not torch.equal(p, b) for p, b in zip(problem.params, before, strict=True) if p.numel()]
    else:
        opt.first_step()
        moved = [not torch.equal(p, b) for p, b in zip(problem.params, before, strict=True) if p.numel()]
        opt.restore()
    assert all(moved)
    assert same_bits([torch.view_as_real(p.detach()) for p in problem.params], list(map(torch.view_as_real, before)))


def test_a_filter_is_scaled_by_the_norm_over_its_pairs(backend):
    """ε = ρ T²g/‖Tg‖ with T = ‖filter‖ for filters of three dimensions, in complex arithmetic and float64."""
    generator = torch.Generator().manual_seed(1)
    w = torch.nn.Parameter(torch.randn(3, 2, 2, generator=generator, dtype=torch.complex128))
    w.grad = torch.randn(3, 2, 2, generator=generator, dtype=torch.complex128)
    before = w.detach().clone()
    T = before.abs().square().sum((1, 2)).sqrt().reshape(3, 1, 1) + 0.01
    wanted = 0.5 * T**2 * w.grad / (T * w.grad).abs().square().sum().sqrt()
    opt = lk.ASAM([w], torch.optim.SGD, rho=0.5, xi=0.01, filterwise=True, lr=0.1, backend=backend.name)
    opt.first_step()
    # Sums and products of a dozen float64 numbers.
    torch.testing.assert_close(w.detach() - before, wanted, rtol=1e-13, atol=1e-14)


def test_a_lazily_conjugated_gradient_is_read_as_what_it_is():
    w = torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    w.grad = torch.tensor([1 + 2j, -1j, 3 + 0j]).conj()
    assert w.grad.is_conj()
    opt = lk.SAM([w], torch.optim.SGD, rho=1.0, lr=0.1)
    opt.first_step()
    # ε = g/‖g‖ in float32.
    torch.testing.assert_close(w.detach(), torch.tensor([1 - 2j, 1j, 3 + 0j]) / 15**0.5, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", ["lets-secant", *ONE_EACH])
def test_training_resumes_to_the_bit(backend, method):
    if method in FAMILY and backend.name == "reference":
        pytest.skip("what is saved does not depend on the backend")
    ends, base = [], "adam" if method == "lets-secant" else "momentum"
    for through_a_file in (False, True):
        problem = Problem(True)
        opt = build(method, base, problem.params, backend)
        problem.steps(opt, range(3))
        if through_a_file:
            file = io.BytesIO()
            torch.save(opt.state_dict(), file)
            file.seek(0)
            opt = build(method, base, problem.params, backend)
            opt.load_state_dict(torch.load(file, weights_only=True))
        problem.steps(opt, range(3, 6))
        ends.append(problem.everything(opt))
    assert same_bits(*ends)


def test_one_buffer_for_complex_parameters_is_refused():
    w = torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    w.grad = torch.ones_like(w)
    opt = lk.SAM([w], torch.optim.SGD, rho=1.0, lr=0.1, flatten=True)
    with pytest.raises(ValueError, match="flatten=True goes with real parameters"):
        opt.first_step()
    assert w.eq(0).all()


def test_a_lazily_conjugated_parameter_is_refused():
    """Its memory holds other numbers than it stands for, and kernels write to memory."""
    with pytest.raises(ValueError, match="resolve_conj"):
        lk.SAM([torch.nn.Parameter(torch.ones(3, dtype=torch.complex64).conj())], torch.optim.SGD, lr=0.1)
