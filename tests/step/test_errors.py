"""Bad input: a clear error of the right type that names the way out, before any weight is touched."""

import math

import pytest
import torch

import lets_kernels as lk
from support.given_gradients import weights
from support.guard_bands import same_bits

SGD = torch.optim.SGD


def parameter(*shape, **options):
    return torch.nn.Parameter(torch.randn(*shape or (3,)), **options)


def expanded():
    return torch.nn.Parameter(torch.randn(1, 4).expand(3, 4))


CONSTRUCTION = {
    "negative-rho": (lambda p: lk.SAM(p, SGD, rho=-0.1, lr=0.1), ValueError, "rho must be .*>= 0.*-0.1"),
    "nan-rho": (lambda p: lk.SAM(p, SGD, rho=math.nan, lr=0.1), ValueError, "rho must be .*nan"),
    "infinite-rho": (lambda p: lk.SAM(p, SGD, rho=math.inf, lr=0.1), ValueError, "rho must be .*inf"),
    "rho-of-a-string": (lambda p: lk.SAM(p, SGD, rho="0.1", lr=0.1), TypeError, "rho"),
    "rho-of-none": (lambda p: lk.SAM(p, SGD, rho=None, lr=0.1), TypeError, "rho"),
    "negative-rho-of-a-group": (lambda p: lk.SAM([{"params": p, "rho": -1.0}], SGD, lr=0.1), ValueError, "rho must"),
    "negative-scheduled-rho": (lambda p: lk.ScheduledRadius(lambda t: -t - 1), ValueError, "rho must"),
    "negative-ramp": (lambda p: lk.ScheduledRadius.linear(0.1, -0.1, 5), ValueError, "rho must"),
    "ramp-of-no-steps": (lambda p: lk.ScheduledRadius.cosine(0.1, 0.2, 0), ValueError, "steps must be at least 1"),
    "learned-rho-of-zero": (lambda p: lk.LETSSAM(p, SGD, 0.0, lr=0.1), ValueError, "rho > 0"),
    "learned-rho-of-nan": (lambda p: lk.LearnedRadius(math.nan), ValueError, "rho > 0"),
    "learned-rho-of-a-group": (
        lambda p: lk.LETSSAM([{"params": p, "rho": 0.0}], SGD, lk.LearnedRadius(per_group=True), lr=0.1),
        ValueError,
        "rho",
    ),
    "different-rho-for-one-learned-radius": (
        lambda p: lk.LETSSAM([{"params": p[:1], "rho": 0.1}, {"params": p[1:], "rho": 0.2}], SGD, lr=0.1),
        ValueError,
        "per_group=True",
    ),
    "one-learned-radius-for-two": (
        lambda p: [lk.SAM(p, SGD, r, lr=0.1) for r in [lk.LearnedRadius()] * 2],
        ValueError,
        "another optimizer",
    ),
    "learned-radius-without-lr": (lambda p: lk.LETSSAM(p, NoLearningRate), ValueError, "'lr'"),
    "unknown-metric": (lambda p: lk.LearnedRadius(metric="loss"), ValueError, "squared_gap, gap, validation_loss"),
    "unknown-curvature": (lambda p: lk.LearnedRadius(curvature="full"), ValueError, "diagonal, secant"),
    "unknown-direction": (lambda p: lk.LearnedRadius(direction="g"), ValueError, "epsilon, algorithm1"),
    "secant-with-a-direction": (
        lambda p: lk.LearnedRadius(curvature="secant", direction="algorithm1"),
        ValueError,
        "diagonal",
    ),
    "interval-of-zero": (lambda p: lk.LearnedRadius(interval=0), ValueError, "interval must be at least 1"),
    "negative-xi": (lambda p: lk.ASAM(p, SGD, xi=-0.1, lr=0.1), ValueError, "xi must be"),
    "infinite-xi": (lambda p: lk.ASAM(p, SGD, xi=math.inf, lr=0.1), ValueError, "xi must be"),
    "nan-xi": (lambda p: lk.ASAM(p, SGD, xi=math.nan, lr=0.1), ValueError, "xi must be"),
    "negative-xi-of-a-group": (lambda p: lk.ASAM([{"params": p, "xi": -1.0}], SGD, lr=0.1), ValueError, "xi must be"),
    "p-below-one": (lambda p: lk.Gradient(p=0.9), ValueError, r"\[1, inf\]"),
    "p-of-nan": (lambda p: lk.Gradient(p=math.nan), ValueError, r"\[1, inf\]"),
    "adaptive-along-the-gradient": (
        lambda p: lk.SAM(p, SGD, adaptive=True, direction=lk.Gradient(), lr=0.1),
        ValueError,
        "adaptive=True goes with a direction that T can scale.*not with Gradient: leave it out",
    ),
    "norm-of-drawn-elements": (
        lambda p: lk.ESAM(p, SGD, drawn_norm=True, lr=0.1),
        ValueError,
        "drawn_norm=True goes with granularity='tensor', not with 'element'",
    ),
    "no-parameters": (lambda p: lk.SAM([], SGD, lr=0.1), ValueError, "empty parameter list"),
    "a-parameter-twice": (lambda p: lk.SAM([{"params": p}, {"params": p}], SGD, lr=0.1), ValueError, "more than one"),
    "float8-parameters": (
        lambda p: lk.SAM([*p, torch.nn.Parameter(torch.ones(3).to(torch.float8_e4m3fn))], SGD, lr=0.1),
        TypeError,
        "float8.*keep it out",
    ),
    "complex32-parameters": (
        lambda p: lk.SAM([torch.nn.Parameter(torch.ones(3, dtype=torch.complex64).to(torch.complex32))], SGD, lr=0.1),
        TypeError,
        "complex32.*complex64",
    ),
    "expanded-parameters": (lambda p: lk.SAM([*p, expanded()], SGD, lr=0.1), ValueError, "clone"),
    "a-base-that-is-none": (lambda p: lk.SAM(p, "SGD", lr=0.1), TypeError, "base_optimizer must be"),
    "a-base-that-is-a-function": (lambda p: lk.SAM(p, lambda p: SGD(p, lr=0.1)), TypeError, "base_optimizer must be"),
    "a-base-with-a-rho-of-its-own": (lambda p: lk.SAM(p, torch.optim.Adadelta), ValueError, "option called rho"),
    "an-instance-with-a-rho-of-its-own": (
        lambda p: lk.SAM(p, torch.optim.Adadelta(p)),
        ValueError,
        "option called rho",
    ),
    "an-instance-and-arguments": (
        lambda p: lk.SAM(p, SGD(p, lr=0.1), momentum=0.9),
        ValueError,
        "momentum.*where it is built",
    ),
    "an-instance-on-others": (lambda p: lk.SAM(p, SGD([parameter()], lr=0.1)), ValueError, "other parameters"),
    "an-unknown-argument": (lambda p: lk.SAM(p, SGD, lr=0.1, mementum=0.9), TypeError, "mementum"),
    "differentiable": (
        lambda p: lk.SAM(p, SGD, lr=0.1, differentiable=True),
        ValueError,
        "differentiable=True.*leave it out",
    ),
    "an-unknown-backend": (lambda p: lk.SAM(p, SGD, backend="gpu", lr=0.1), ValueError, "choose one of.*reference"),
    "a-backend-that-cannot-run": (lambda p: lk.SAM(p, SGD, backend="cuda", lr=0.1), RuntimeError, "does not run here"),
}


class NoLearningRate(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {})


@pytest.mark.parametrize("case", CONSTRUCTION)
def test_a_bad_constructor_is_refused_and_touches_nothing(case):
    make, error, match = CONSTRUCTION[case]
    params = [parameter(2, 3), parameter(4)]
    before = weights(params)
    with pytest.raises(error, match=match):
        make(params)
    assert same_bits(weights(params), before) and all(p.grad is None for p in params)


def test_an_environment_that_asks_for_what_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setenv("LETS_KERNELS_BACKEND", "gpu")
    with pytest.raises(ValueError, match=r"LETS_KERNELS_BACKEND=gpu.*choose one of"):
        lk.SAM([parameter()], SGD, lr=0.1)
    monkeypatch.setenv("LETS_KERNELS_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="LETS_KERNELS_BACKEND=cuda does not run here"):
        lk.SAM([parameter()], SGD, lr=0.1)


def test_backends_say_in_words_what_runs_and_why_the_rest_does_not():
    report = lk.backends()
    assert list(report) == ["cuda", "triton", "cpu", "foreach", "reference"]
    assert report["reference"].startswith("available")
    for words in report.values():
        assert words.startswith(("available: ", "not available: ")) and len(words.split(": ", 1)[1]) > 5
