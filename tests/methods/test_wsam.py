"""WSAM's decoupled step: beside every base optimizer, in every memory layout, with each group's learning rate."""

import pytest
import torch

import lets_kernels as lk
from lets_kernels.parts.passes import SecondPass

SGD, AdamW, RMSprop = torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop
RHO, GAMMA, ALPHA = 0.1, 0.6, 1.5


def weights(strided=False):
    """Two parameters; if ``strided``, one of them leaves gaps in its memory."""
    generator = torch.Generator().manual_seed(4)
    first, second = (torch.randn(5, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    return [torch.nn.Parameter(first), torch.nn.Parameter(second[:, ::2] if strided else second)]


def backward(params):
    for p in params:
        p.grad = p.detach() ** 3


def transcribed(params, make, steps=3):
    """The base optimizer's own step along g, and -lr alpha (g_hat - g) after it."""
    base = make(params)
    for _ in range(steps):
        backward(params)
        g = [p.grad.clone() for p in params]
        norm = torch.cat([x.flatten() for x in g]).norm()
        g_hat = [(p.detach() + RHO * x / norm) ** 3 for p, x in zip(params, g, strict=True)]
        base.step()
        hats = iter(zip(g_hat, g, strict=True))
        with torch.no_grad():
            for group in base.param_groups:
                for p in group["params"]:
                    hat, x = next(hats)
                    p -= group["lr"] * ALPHA * (hat - x)


def taken(params, opt, steps=3):
    for _ in range(steps):
        backward(params)
        opt.first_step(zero_grad=True)
        backward(params)
        opt.second_step(zero_grad=True)


@pytest.mark.parametrize("strided", [False, True], ids=["dense", "gaps"])
@pytest.mark.parametrize(
    "base, options, fused",
    [
        (SGD, {"momentum": 0.9, "weight_decay": 0.1}, True),
        (AdamW, {}, True),
        (AdamW, {"lr": torch.tensor(0.01, dtype=torch.float64)}, True),
        (AdamW, {"amsgrad": True}, False),
        (RMSprop, {}, False),
    ],
    ids=["sgd", "adamw", "lr-tensor", "amsgrad", "rmsprop"],
)
def test_the_sharpness_moves_the_weights_beside_the_base_optimizer(base, options, fused, strided):
    options = {"lr": 0.01, **options}
    params, twins = weights(strided), weights(strided)
    opt = lk.WSAM(params, base, RHO, GAMMA, **options)
    taken(params, opt)
    transcribed(twins, lambda p: base(p, **options))
    assert opt.fused is (fused and not strided)
    for p, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(p.detach(), twin.detach(), rtol=0, atol=1e-13)  # three steps of weights below 4


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("base", [SGD, RMSprop])
def test_each_group_has_its_own_learning_rate(base, flatten):
    def groups(params):
        return [{"params": params[:1], "lr": 0.02}, {"params": params[1:], "lr": 0.005}]

    params, twins = weights(), weights()
    taken(params, lk.WSAM(groups(params), base, RHO, GAMMA, lr=0.01, flatten=flatten))
    transcribed(twins, lambda p: base(groups(p), lr=0.01))
    for p, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(p.detach(), twin.detach(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("base", [SGD, RMSprop])
def test_a_step_that_is_skipped_moves_nothing(base):
    params, opt = weights(), None
    opt = lk.WSAM(params, base, RHO, GAMMA, lr=0.01)
    taken(params, opt, 1)
    before = [p.detach().clone() for p in params]
    backward(params)
    opt.first_step(zero_grad=True)
    backward(params)
    params[0].grad[0, 0] = torch.nan
    opt.second_step(zero_grad=True)
    assert int(opt.skipped) == 1 and all(map(torch.equal, params, before))


class Plain(torch.optim.Optimizer):
    """An optimizer without a learning rate."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p -= 0.01 * p.grad


def test_a_base_optimizer_without_a_learning_rate_is_refused_before_a_weight_moves():
    params = weights()
    opt, before = lk.WSAM(params, Plain), [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match="groups have no 'lr'"):
        taken(params, opt, 1)
    assert all(map(torch.equal, params, before))
    taken(params, lk.WSAM(params, Plain, decouple=False), 1)


@pytest.mark.parametrize("gamma", [-0.1, 1.0, float("nan")])
def test_what_is_refused(gamma):
    with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\)"):
        lk.WSAM(weights(), SGD, gamma=gamma, lr=0.1)


@pytest.mark.parametrize("which", [0, 1], ids=["a-bucket-that-was-perturbed", "a-bucket-of-the-second-pass-alone"])
def test_an_interrupt_between_the_two_parts_brings_back_no_older_weights(monkeypatch, which):
    """Two dtypes are two buckets. The second one's copy of the weights is that of the step before."""
    first, second = weights()
    params = [first, torch.nn.Parameter(second.detach().float())]
    opt = lk.WSAM(params, SGD, rho=RHO, gamma=GAMMA, lr=0.1)
    taken(params, opt, 1)
    before, follow = [p.detach().clone() for p in params], SecondPass._follow

    def cut_short(self, runs, *rest):
        if runs.bucket.params[0] is params[which]:
            raise KeyboardInterrupt
        follow(self, runs, *rest)

    params[0].grad = params[0].detach() ** 3
    opt.first_step(zero_grad=True)
    backward(params)
    with monkeypatch.context() as patch:
        patch.setattr(SecondPass, "_follow", cut_short)
        with pytest.raises(KeyboardInterrupt):
            opt.second_step(zero_grad=True)
    assert torch.equal(params[0].detach(), before[0]) is (which == 0)  # otherwise its whole step was taken
    # Of what no pass had perturbed there is no copy: it is as before, or the base optimizer's part has moved it.
    stepped = before[1] - 0.1 * before[1] ** 3
    assert torch.equal(params[1].detach(), before[1]) or torch.allclose(params[1].detach(), stepped, rtol=1e-6)
    left, opt.param_groups[0]["lr"] = [p.detach().clone() for p in params], 0.0
    opt.zero_grad()
    params[0].grad = params[0].detach() ** 3
    opt.first_step(zero_grad=True)
    backward(params)
    opt.second_step(zero_grad=True)
    assert all(map(torch.equal, [p.detach() for p in params], left)), "an older copy came back"
