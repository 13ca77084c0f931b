"""Momentum-SAM: the authors' loop, the base optimizers it goes with, and those that it refuses."""

import copy

import pytest
import torch

import lets_kernels as lk
from support import family
from support.conv_net import Task
from support.given_gradients import Toy, weights

OPTIONS = {"lr": 0.1, "momentum": 0.9}
#: Base optimizers with momentum, and what it is called in their state.
KNOWN = {
    "sgd": (torch.optim.SGD, OPTIONS, "momentum_buffer"),
    "nesterov": (torch.optim.SGD, {**OPTIONS, "nesterov": True}, "momentum_buffer"),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.9}, "momentum_buffer"),
    **{
        name: (getattr(torch.optim, name), {"lr": 0.01}, "exp_avg")
        for name in ("Adam", "AdamW", "NAdam", "RAdam", "Adamax")
    },
}
REFUSED = {
    "SGD": (torch.optim.SGD, {"lr": 0.1}, "momentum=0"),
    "RMSprop": (torch.optim.RMSprop, {}, "momentum=0"),
    "Adam": (torch.optim.Adam, {"betas": (0.0, 0.999)}, r"betas=\(0.0, 0.999\)"),
    "Adagrad": (torch.optim.Adagrad, {}, "Adagrad keeps none"),
    "Rprop": (torch.optim.Rprop, {}, "Rprop keeps none"),
    "ASGD": (torch.optim.ASGD, {}, "ASGD keeps none"),
}


def test_the_printed_loop_which_leaves_the_weights_perturbed(backend):
    """Algorithm 1 as it stands, with w~ between the steps: ours is at w there, and takes the same gradients. Ten steps
    of rounding in float64, as in test_family.py."""
    task, rho, mu, eta = Task(), 0.3, 0.9, 0.05
    shifted = [p.detach().clone() for p in copy.deepcopy(task.net).parameters()]
    net, v = copy.deepcopy(task.net), [torch.zeros_like(x) for x in shifted]

    def unit():
        norm = torch.cat([x.flatten() for x in v]).norm()
        return [x / norm if norm > 0 else torch.zeros_like(x) for x in v]

    for batch, _ in task.batches:
        with torch.no_grad():
            [p.copy_(x) for p, x in zip(net.parameters(), shifted, strict=True)]
        grads = torch.autograd.grad(torch.nn.functional.cross_entropy(net(batch[0]), batch[1]), list(net.parameters()))
        w = [x + rho * u for x, u in zip(shifted, unit(), strict=True)]
        v = [mu * x + g for x, g in zip(v, grads, strict=True)]
        w = [x - eta * y for x, y in zip(w, v, strict=True)]
        shifted = [x - rho * u for x, u in zip(w, unit(), strict=True)]
    opt = lk.MSAM(task.net.parameters(), torch.optim.SGD, rho=rho, backend=backend.name, lr=eta, momentum=mu)
    with backend.watch("perturb_", "grad_norm", "combine_"):
        task.run(opt)
    assert max(float((p - x).abs().max()) for p, x in zip(weights(task), w, strict=True)) < 1e-12
    opt.first_step()
    assert max(float((p - x).abs().max()) for p, x in zip(weights(task), shifted, strict=True)) < 1e-12
    opt.restore()


@pytest.mark.parametrize("name", KNOWN)
def test_it_perturbs_along_minus_the_momentum_of_every_base_that_has_one(backend, name):
    """By rho, over all parameters; not in the first step. The state is only read."""
    kind, options, key = KNOWN[name]
    toy = Toy(torch.float64)
    opt = lk.MSAM(toy.params, kind, rho=0.5, backend=backend.name, **options)
    before = weights(toy)
    opt.first_step()
    assert all(map(torch.equal, weights(toy), before)) and not opt.state
    toy.set_grads(toy.grads(0))
    opt.second_step(zero_grad=True)
    assert not all(map(torch.equal, weights(toy), before))
    v, kept = [opt.state[p][key].clone() for p in toy.params], copy.deepcopy(opt.state_dict()["state"])
    norm, before = torch.cat([x.flatten() for x in v]).norm(), weights(toy)
    opt.first_step()
    # A sum of two numbers below four rounds by 2^-52, the unit vector by some more of what it is.
    for p, x, y in zip(toy.params, before, v, strict=True):
        torch.testing.assert_close(p.detach(), x - 0.5 * y / norm, rtol=0, atol=1e-15)
    found = opt.base_optimizer.state_dict()["state"]
    assert all(torch.equal(torch.as_tensor(found[i][k]), torch.as_tensor(kept[i][k])) for i in kept for k in kept[i])
    opt.restore()
    assert all(map(torch.equal, weights(toy), before))


def test_a_parameter_without_momentum_yet_does_not_move(backend):
    toy = Toy(torch.float64)
    opt = lk.MSAM(toy.params, torch.optim.SGD, rho=0.5, backend=backend.name, **OPTIONS)
    some = [g if i % 2 else None for i, g in enumerate(toy.grads(0))]
    opt.first_step()
    toy.set_grads(some)
    opt.second_step(zero_grad=True)
    before = weights(toy)
    opt.first_step()
    moved = [not torch.equal(p.detach(), x) for p, x in zip(toy.params, before, strict=True)]
    assert moved == [g is not None and g.numel() > 0 for g in some]
    length = torch.cat([(p.detach() - x).flatten() for p, x in zip(toy.params, before, strict=True)]).norm()
    assert float(length) == pytest.approx(0.5, rel=1e-12)
    toy.set_grads(toy.grads(1))  # all of them have a gradient now, and are stepped from the weights themselves
    opt.second_step()
    for i, (p, x, g) in enumerate(zip(toy.params, before, toy.grads(1), strict=True)):
        v = g if some[i] is None else 0.9 * some[i] + g
        torch.testing.assert_close(p.detach(), x - 0.1 * v, rtol=1e-14, atol=1e-14)


def test_a_momentum_that_is_zero_perturbs_nothing(backend):
    toy = Toy(torch.float64)
    opt = lk.MSAM(toy.params, torch.optim.SGD, rho=0.5, backend=backend.name, **OPTIONS)
    for _ in range(3):
        before = weights(toy)
        opt.first_step()
        assert all(map(torch.equal, weights(toy), before))
        toy.set_grads([torch.zeros_like(p) for p in toy.params])
        opt.second_step()
        assert all(map(torch.equal, weights(toy), before))


@pytest.mark.parametrize("name", REFUSED)
def test_a_base_without_momentum_is_refused_with_the_way_out(name):
    kind, options, why = REFUSED[name]
    with pytest.raises(ValueError, match=rf"{name} keeps none.*SGD or RMSprop with momentum=0\.9"):
        lk.MSAM(Toy().params, kind, **options)
    with pytest.raises(ValueError, match=why):
        lk.MSAM(Toy().params, kind, **options)


def test_a_group_without_momentum_is_refused_whenever_it_comes():
    toy = Toy()
    groups = [{"params": toy.params[:3]}, {"params": toy.params[3:], "momentum": 0.0}]
    with pytest.raises(ValueError, match="momentum=0"):
        lk.MSAM(groups, torch.optim.SGD, **OPTIONS)
    opt = lk.MSAM(groups[0]["params"], torch.optim.SGD, **OPTIONS)
    with pytest.raises(ValueError, match="momentum=0"):
        opt.add_param_group(groups[1])
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0]["momentum"] = 0.0
    with pytest.raises(ValueError, match="momentum=0"):
        opt.load_state_dict(saved)
    assert opt.param_groups[0]["momentum"] == 0.9 and len(opt.param_groups) == 1


class Own(torch.optim.SGD):
    """Has momentum among its options, and keeps it under another name."""

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            self.state[p]["velocity"] = p.grad.clone()


def test_a_base_that_keeps_its_momentum_elsewhere_is_refused_before_a_weight_moves():
    toy = Toy()
    opt = lk.MSAM(toy.params, Own, rho=0.5, **OPTIONS)
    opt.first_step()
    toy.set_grads(toy.grads(0))
    opt.second_step()
    before = weights(toy)
    with pytest.raises(ValueError, match="Own has taken steps and keeps no momentum_buffer"):
        opt.first_step()
    assert all(map(torch.equal, weights(toy), before))


@pytest.mark.parametrize("base", ["momentum", "adamw"])
def test_rho_0_is_the_base_optimizer_to_the_bit(base):
    """With the restore fused into its step, as in SAM; that step against torch's is of test_family_limits.py."""
    ends = []
    for cls in (lk.MSAM, lk.SAM):
        task = Task(torch.float32)
        kind, _, options, _ = family.BASES[base]
        task.run(cls(task.net.parameters(), kind, rho=0.0, **options))
        ends.append(weights(task))
    assert all(map(torch.equal, *ends))


def test_bfloat16_weights_move_as_those_in_float64_but_for_their_rounding(backend):
    """Weights below four in bfloat16, off by 2^-7 at most; the momentum in bfloat16 is the gradient, exactly."""
    toy = Toy(torch.bfloat16)
    opt = lk.MSAM(toy.params, torch.optim.SGD, rho=2.0, backend=backend.name, **OPTIONS)
    grads = toy.grads(0)
    toy.set_grads(grads)
    opt.first_step(zero_grad=True)
    toy.set_grads(grads)
    opt.second_step(zero_grad=True)
    before, norm = weights(toy), torch.cat([g.double().flatten() for g in grads]).norm()
    opt.first_step()
    for p, x, g in zip(toy.params, before, grads, strict=True):
        assert (
            (p.detach().double() - (x.double() - 2.0 * g.double() / norm)).abs().max() <= 2**-7 if p.numel() else True
        )
    opt.restore()
