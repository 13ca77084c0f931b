"""What rounding leaves of a perturbation of 16-bit weights: measured right, told, and only where there is something."""

import math
import warnings

import pytest
import torch

import lets_kernels as lk
from lets_kernels import PrecisionWarning
from lets_kernels.ops import reference
from lets_kernels.step.precision import INTERVAL
from support import family, oracle
from support.family import ALWAYS, ONE_EACH
from support.given_gradients import Toy

SGD = torch.optim.SGD
FOUND = ("perturbation_cosine", "perturbation_length", "perturbed_fraction")
NARROW = [torch.bfloat16, torch.float16]

# name: (optimizer, its arguments, the oracle's T and p)
METHODS = {
    "sam": (lk.SAM, {}, oracle.identity, 2.0),
    "sam-p1.5": (lk.SAM, {"direction": lk.Gradient(1.5)}, oracle.identity, 1.5),
    "sam-p3": (lk.SAM, {"direction": lk.Gradient(3.0)}, oracle.identity, 3.0),
    "sam-p-inf": (lk.SAM, {"direction": lk.Gradient(math.inf)}, oracle.identity, math.inf),
    "asam": (lk.ASAM, {"xi": 0.02}, oracle.elementwise(0.02), 2.0),
    "asam-filterwise": (lk.ASAM, {"xi": 0.02, "filterwise": True}, oracle.filterwise(0.02), 2.0),
}


def found(opt):
    return {name: value for name, value in opt.metrics().items() if name in FOUND}


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("method", METHODS)
def test_the_measures_are_those_of_the_definition(backend, method, dtype, small, flatten):
    """⟨δ, ε⟩ / ‖δ‖‖ε‖, ‖δ‖ / ‖ε‖ and the share of δ ≠ 0, for δ as the weights show it and ε in float64."""
    cls, arguments, T, p = METHODS[method]
    rho = 0.004 if small else 0.03
    # With p = inf every weight moves by rho; with T = |θ| by a part of itself, so that rounding takes more of it.
    rho = rho / 10 if p == math.inf else 10 * rho if cls is lk.ASAM else rho
    toy = Toy(dtype)
    toy.params[0].data = toy.params[0].data.contiguous(memory_format=torch.channels_last)
    opt = cls(toy.params, SGD, rho=rho, backend=backend.name, flatten=flatten, lr=0.1, **arguments)
    before = {f"{i}.weight": w.detach().double() for i, w in enumerate(toy.params)}
    toy.set_grads(toy.grads(0))
    g = {name: w.grad.double() for name, w in zip(before, toy.params, strict=True)}
    opt.first_step()
    moved = torch.cat([(w.detach().double() - before[k]).flatten() for k, w in zip(before, toy.params, strict=True)])
    unit = oracle.unit(g, T(before), p)
    wanted = rho * torch.cat([unit[k].flatten() for k in before])
    opt.second_step()
    expected = {
        "perturbation_cosine": moved @ wanted / (moved.norm() * wanted.norm()),
        "perturbation_length": moved.norm() / wanted.norm(),
        "perturbed_fraction": (moved != 0).double().mean(),
    }
    # The total and the filters' norms are summed from float32 terms: each off by a few times 2^-24, relatively.
    torch.testing.assert_close(found(opt), expected, rtol=1e-6, atol=0)
    if small and dtype == torch.bfloat16:
        assert 0 < expected["perturbed_fraction"] < 0.9 and expected["perturbation_cosine"] < 0.9999


def test_the_measures_of_groups_are_those_of_their_own_options(backend):
    toy = Toy(torch.bfloat16)
    own = [{"rho": 0.04, "xi": 0.02}, {"rho": 0.4, "xi": 0.5}]
    groups = [{"params": toy.params[i::2], **options} for i, options in enumerate(own)]
    opt = lk.ASAM(groups, SGD, backend=backend.name, lr=0.1)
    before = {f"{i}.weight": w.detach().double() for i, w in enumerate(toy.params)}
    grads = [None if i == 0 else g for i, g in enumerate(toy.grads(0))]
    toy.set_grads(grads)
    g = {k: x.double() for k, x in zip(before, grads, strict=True) if x is not None}
    opt.first_step()
    options = dict(zip(before, [own[i % 2] for i in range(len(before))], strict=True))
    unit = oracle.unit(g, {k: before[k].abs() + options[k]["xi"] for k in g})
    after = dict(zip(before, toy.params, strict=True))
    moved = torch.cat([(after[k].detach().double() - before[k]).flatten() for k in g])
    wanted = torch.cat([(options[k]["rho"] * unit[k]).flatten() for k in g])
    opt.second_step()
    expected = {
        "perturbation_cosine": moved @ wanted / (moved.norm() * wanted.norm()),
        "perturbation_length": moved.norm() / wanted.norm(),
        "perturbed_fraction": (moved != 0).double().mean(),
    }
    torch.testing.assert_close(found(opt), expected, rtol=1e-6, atol=0)  # the total is summed from float32 terms


@pytest.mark.parametrize("name", [name for name in ONE_EACH if name not in family.STILL_AT_FIRST])
def test_the_measures_of_any_method_are_those_of_what_float64_weights_would_do(backend, name):
    """ε is taken from a twin in float64, at the same weights with the same gradients and random numbers."""
    ends = []
    for dtype in (torch.bfloat16, torch.float64):
        toy = Toy(torch.bfloat16)
        grads = [g.to(dtype) for g in toy.grads(0)]
        for p in toy.params:
            p.data = p.data.to(dtype)
        toy.dtype = dtype
        rho = 0.3 if name == "le-sam" else 0.05  # a rise of the loss; the norm is 9.3
        opt = family.build(name, toy.params, rho=rho, backend=backend.name, **ALWAYS.get(name, {}))
        before = torch.cat([w.detach().double().flatten() for w in toy.params])
        with opt.first_pass():
            toy.set_grads(grads)
        opt.first_step()
        ends.append(torch.cat([w.detach().double().flatten() for w in toy.params]) - before)
        if dtype == torch.bfloat16:
            measured = found(opt)
        opt.restore()
    moved, wanted = ends
    expected = {
        "perturbation_cosine": moved @ wanted / (moved.norm() * wanted.norm()),
        "perturbation_length": moved.norm() / wanted.norm(),
    }
    assert 0 < measured["perturbed_fraction"] <= 1
    assert 0.5 < expected["perturbation_cosine"] < 1, "nothing was rounded: nothing was tested"
    if name not in ("esam", "sparse"):  # their share is of the elements that take part
        expected["perturbed_fraction"] = (moved != 0).double().mean()
    # Vectors that a method makes of 16-bit gradients are kept in 16 bits; each element is then off by 2^-9 at most.
    own = name in ("friendly", "vasso", "rsam", "rgsam", "random-sam", "fisher-sam", "bsam", "esam")
    torch.testing.assert_close({k: measured[k] for k in expected}, expected, rtol=2**-8 if own else 1e-6, atol=0)


@pytest.mark.parametrize(
    "rho, count, fraction, cosine",
    [(0.05, "1 M", 0.47, 0.86), (0.01, "25 M", 0.11, 0.46), (0.00158, "1 B", 0.02, 0.19)],
)
def test_how_many_bfloat16_weights_move_at_rho_005(rho, count, fraction, cosine):
    """Weights N(0, 0.02²), as many networks begin: of a million 47 % move, of 25 million 11 %, of a billion 2 %.

    In each weight ε is ρ / √count times a normal number, so a million weights with a smaller ρ stand for more of them.
    """
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter((0.02 * torch.randn(1_000_000, generator=generator)).bfloat16())
    p.grad = torch.randn(1_000_000, generator=generator).bfloat16()
    opt = lk.SAM([p], SGD, rho=rho, lr=0.1)
    opt.first_step()
    opt.second_step()
    # Three standard errors of a share of a million are 0.0015; the figures are rounded to 0.01.
    torch.testing.assert_close(float(found(opt)["perturbed_fraction"]), fraction, rtol=0, atol=0.01, msg=count)
    torch.testing.assert_close(float(found(opt)["perturbation_cosine"]), cosine, rtol=0, atol=0.01, msg=count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_weights_report_nothing_and_warn_of_nothing(dtype):
    toy = Toy(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt = lk.SAM(toy.params, SGD, lr=0.1)
        toy.steps(opt, 2)
    assert found(opt) == {}


@pytest.mark.parametrize("dtype", NARROW)
def test_the_warning_comes_once_and_names_the_dtype_and_the_way_out(dtype):
    toy = Toy(dtype)
    opt = lk.SAM(toy.params, SGD, lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        toy.steps(opt, 3)
    assert [w.category for w in caught] == [PrecisionWarning]
    message = str(caught[0].message)
    assert all(words in message for words in (str(dtype), "float32 parameters under autocast", "perturbation_cosine"))


def test_it_is_measured_at_the_first_perturbed_step_and_at_every_hundredth():
    class NotFirst(lk.Schedule):
        def perturbs(self, step):
            return step != 0

    p = torch.nn.Parameter(torch.full((4,), 1.0, dtype=torch.bfloat16))
    opt = lk.SAM([p], SGD, rho=0.05, schedule=NotFirst(), lr=0.0)
    changes, last = [], None
    for step in range(2 * INTERVAL + 1):
        p.grad = torch.randn(4, dtype=torch.bfloat16)
        opt.first_step(zero_grad=True)
        p.grad = torch.ones(4, dtype=torch.bfloat16)
        opt.second_step()
        now = found(opt).get("perturbation_length")
        if now is not None and (last is None or now != last):
            changes.append(step)
        last = now
    assert changes == [1, INTERVAL, 2 * INTERVAL]


def test_a_zero_perturbation_is_not_a_number_and_weights_made_wide_report_no_more():
    toy = Toy(torch.bfloat16)
    opt = lk.SAM(toy.params, SGD, rho=0.0, lr=0.1)
    toy.steps(opt, 1)
    assert found(opt)["perturbation_cosine"].isnan() and found(opt)["perturbed_fraction"] == 0
    for p in toy.params:
        p.data = p.data.float()
    toy.dtype = torch.float32
    toy.steps(opt, 1)
    assert found(opt) == {}


def test_wide_weights_beside_narrow_ones_do_not_count():
    torch.manual_seed(1)
    wide, narrow = torch.nn.Parameter(torch.randn(50)), torch.nn.Parameter(torch.randn(50).bfloat16())
    opt = lk.SAM([wide, narrow], SGD, rho=0.05, lr=0.1)
    wide.grad, narrow.grad = torch.randn(50), torch.randn(50).bfloat16()
    g, before = narrow.grad.double(), narrow.detach().double()
    total = torch.cat([wide.grad.double(), g]).norm()
    opt.first_step()
    moved = narrow.detach().double() - before
    opt.second_step()
    cosine = moved @ g / (moved.norm() * g.norm())
    torch.testing.assert_close(found(opt)["perturbation_cosine"], cosine, rtol=1e-6, atol=0)
    length = moved.norm() / (0.05 * g.norm() / total)
    torch.testing.assert_close(found(opt)["perturbation_length"], length, rtol=1e-6, atol=0)


def test_one_parameter_at_a_time_is_widened(monkeypatch):
    """The oracle of the measurement is given one parameter, never a bucket."""
    sizes, original = [], reference.perturb_

    def watched(params, *rest):
        sizes.append([p.numel() for p in params])
        return original(params, *rest)

    monkeypatch.setattr(reference, "perturb_", watched)
    toy = Toy(torch.bfloat16)
    opt = lk.SAM(toy.params, SGD, backend="cpu", lr=0.1)
    toy.steps(opt, 2)
    assert sizes == [[p.numel()] for p in toy.params if p.numel()]


def test_it_is_measured_under_another_default_device(backend):
    theta = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    opt = lk.SAM([theta], torch.optim.SGD, rho=1.0, lr=0.1, backend=backend.name)
    theta.grad = torch.ones_like(theta)
    with torch.device("meta"):
        opt.first_step()
    assert opt.restore() is None
    assert 0 < float(opt.metrics()["perturbed_fraction"]) <= 1
