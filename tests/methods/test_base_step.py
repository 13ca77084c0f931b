"""SAM along the base optimizer's step: u by formula, on copies, with Muon, and that nothing else changes."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

import lets_kernels as lk
from lets_kernels.base import rehearsal
from support import family
from support.conv_net import Task
from support.core_methods import BASES
from support.given_gradients import SHAPES, Toy, weights
from support.nearness import assert_near

SGD, RHO = torch.optim.SGD, 0.5
#: Ten steps of rounding in float64, as in test_family.py.
TIGHT = 1e-12


class OwnSGD(SGD):
    """SGD by another name, of which no formula is known."""


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, Algorithm 2, with decay; torch has none."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            (b1, b2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                if p.grad is not None:
                    m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                    p.sub_(lr * ((b1 * m + (1 - b1) * p.grad).sign() + group["weight_decay"] * p))
                    m.lerp_(p.grad, 1 - b2)


KINDS = {
    "momentum": (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.3}),
    "nesterov": (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "dampening": (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    "own": (OwnSGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.3}),
    "lion": (Lion, {"lr": 0.01, "weight_decay": 0.3}),
    "amsgrad": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.3}),
    **{
        name: (getattr(torch.optim, name), {})
        for name in (
            "AdamW",
            "NAdam",
            "RAdam",
            "Adamax",
            "Adagrad",
            "RMSprop",
            "Rprop",
            "ASGD",
            "Adafactor",
        )
    },
}


def applied(toy, opt, grads):
    """ε of the step that begins with these gradients; the step is given up, and leaves everything as it was."""
    before, kept = weights(toy), copy.deepcopy(opt.base_optimizer.state_dict())
    toy.set_grads(grads)
    opt.first_step(zero_grad=True)
    eps = [p.detach() - x for p, x in zip(toy.params, before, strict=True)]
    opt.restore()
    assert all(map(torch.equal, weights(toy), before))
    now = opt.base_optimizer.state_dict()
    assert now["param_groups"] == kept["param_groups"] and now["state"].keys() == kept["state"].keys()
    for i, entry in now["state"].items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(kept["state"][i][k])) for k, v in entry.items())
    return eps


def expected(toy, opt, grads, kind, options):
    """−ρ Δθ/‖Δθ‖ of an optimizer of the same class, made anew over copies and given the same state, without decay."""
    copies = [torch.nn.Parameter(p.detach().clone()) for p in toy.params]
    fresh = kind(copies, **options)
    fresh.param_groups[0]["weight_decay"] = 0.0
    for p, c, g in zip(toy.params, copies, grads, strict=True):
        c.grad = None if g is None else g.clone()
        if p in opt.base_optimizer.state:
            fresh.state[c] = copy.deepcopy(opt.base_optimizer.state[p])
    fresh.step()
    moved = [c.detach() - p.detach() for c, p in zip(copies, toy.params, strict=True)]
    norm = torch.cat([x.flatten() for x in moved]).norm()
    return [-RHO * x / norm for x in moved]


@pytest.mark.parametrize("name", KINDS)
def test_it_perturbs_against_the_step_that_the_base_optimizer_would_take(backend, name):
    """At first and after two steps, and where a parameter has no gradient; decay is left out; the state is as before.
    (torch's Adafactor takes no empty parameters.)

    A difference of weights below four, divided by a learning rate of 1e-3, is off by 2^-52/1e-3 = 2e-13.
    """
    kind, options = KINDS[name]
    toy = Toy(torch.float64, [shape for shape in SHAPES if 0 not in shape] if name == "Adafactor" else SHAPES)
    opt = lk.BaseStepSAM(toy.params, kind, rho=RHO, backend=backend.name, **options)
    for i in range(3):
        grads = toy.grads(10 + i)
        grads[3] = None if i == 1 else grads[3]
        eps, wanted = applied(toy, opt, grads), expected(toy, opt, grads, kind, options)
        for x, y in zip(eps, wanted, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-11)
        toy.two_steps(opt, toy.grads(2 * i), toy.grads(2 * i + 1))


@pytest.mark.parametrize("base", [name for name in BASES if name != "momentum"])
def test_ten_steps_with_every_base_as_transcribed(base):
    """With SGD's momentum they are those of test_family.py."""
    task = Task(steps=10)
    run = family.papers.Run(copy.deepcopy(task.net), task.weights(), task.batches, BASES[base][1](**BASES[base][2]), 1)
    family.papers.base_step_sam(run, 0.1)
    opt = family.build("base-step-sam", task, base, rho=0.1)
    family.run(opt, task)
    assert opt.fused is (BASES[base][3] is not None)
    assert_near(task, opt, run.theta, run.base, TIGHT)


def test_without_momentum_it_is_sam_to_the_bit(backend):
    """Groups with other learning rates and radii too: a learning rate is no part of u."""
    ends = []
    for cls in (lk.SAM, lk.BaseStepSAM):
        task = Task(torch.float32)
        p = list(task.net.parameters())
        groups = [{"params": p[:3], "lr": 0.02, "weight_decay": 0.1}, {"params": p[3:], "rho": 0.3}]
        opt = cls(groups, SGD, rho=0.1, backend=backend.name, lr=0.1)
        with backend.watch("perturb_", "grad_norm"):
            task.run(opt)
        ends.append(weights(task))
    assert all(map(torch.equal, *ends))


def test_the_formula_of_sgd_is_its_step_on_copies(backend):
    """Groups of one bucket with momenta of their own, one without, and a parameter that joins late."""
    found = []
    for kind in (SGD, OwnSGD):
        toy = Toy(torch.float64)
        groups = [
            {"params": toy.params[:2], "momentum": 0.5, "nesterov": True},
            {"params": toy.params[2:4], "momentum": 0.0, "lr": 0.03},
            {"params": toy.params[4:], "rho": 0.2},
        ]
        opt = lk.BaseStepSAM(groups, kind, rho=RHO, backend=backend.name, lr=0.1, momentum=0.9)
        eps = []
        for i in range(4):
            grads = [None if j == 1 and i < 2 else g for j, g in enumerate(toy.grads(2 * i))]
            eps += applied(toy, opt, grads)
            toy.two_steps(opt, grads, grads)
        found.append(eps)
    assert max(float((x - y).abs().max()) for x, y in zip(*found, strict=True) if x.numel()) < TIGHT


@pytest.mark.parametrize("kind, most", [(torch.optim.AdamW, 2), (OwnSGD, 16)])
def test_torchs_own_optimizers_step_an_eighth_of_the_parameters_at_a_time(monkeypatch, kind, most):
    """Others may look at all of them at once."""
    toy, sizes, whole = Toy(shapes=((4, 4),) * 16), [], rehearsal._rehearse
    monkeypatch.setattr(rehearsal, "_rehearse", lambda base, each: (sizes.append(len(each)), whole(base, each)))
    applied(toy, lk.BaseStepSAM(toy.params, kind, rho=RHO, lr=0.1), toy.grads(0))
    assert sum(sizes) == 16 and set(sizes) == {most}


@pytest.mark.parametrize("name", ["momentum", "AdamW"])
def test_a_learning_rate_of_zero_perturbs_as_any_other(name):
    """The first step of a warm-up has none. In the first step u does not depend on what came before."""
    kind, options = KINDS[name]
    found = []
    for lr in (0.0, torch.tensor(0.0), 0.25):
        toy = Toy(torch.float64)
        opt = lk.BaseStepSAM(toy.params, kind, rho=RHO, **{**options, "lr": lr})
        found.append(applied(toy, opt, toy.grads(0)))
    for eps in found[:2]:
        assert max(float((x - y).abs().max()) for x, y in zip(eps, found[2], strict=True) if x.numel()) < 1e-14


def test_a_gradient_that_is_not_finite_skips_the_step_even_if_a_sign_hides_it(backend):
    toy = Toy()
    opt = lk.BaseStepSAM(toy.params, Lion, rho=RHO, backend=backend.name, lr=0.1)
    before, grads = weights(toy), toy.grads(0)
    grads[0][0, 0, 0, 0] = torch.inf
    toy.set_grads(grads)
    opt.first_step(zero_grad=True)
    assert all(map(torch.equal, weights(toy), before))
    toy.set_grads(toy.grads(1))
    opt.second_step()
    assert all(map(torch.equal, weights(toy), before)) and int(opt.metrics()["skipped_steps"]) == 1


class Noted(torch.optim.AdamW):
    """Counts its steps in attributes, draws noise, and writes into the gradients, as some optimizers do."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        self.count, self.seen, self.mine = (
            0,
            {"steps": []},
            {p: torch.zeros(()) for p in self.param_groups[0]["params"]},
        )

    def step(self, closure=None):
        self.count += 1
        self.seen["steps"].append(torch.rand(()))
        for p, t in self.mine.items():
            t += p.grad.sum()
            p.grad.mul_(2)
        super().step()


def test_the_base_optimizer_hears_of_one_step_only():
    """Hooks, attributes, torch's random numbers, a scheduler that has wrapped step()."""
    toy, calls = Toy(), []
    opt = lk.BaseStepSAM(toy.params, Noted, rho=RHO, lr=0.1)
    base = opt.base_optimizer
    base.register_step_pre_hook(lambda *_: calls.append("before"))
    base.register_step_post_hook(lambda *_: calls.append("after"))
    scheduler = torch.optim.lr_scheduler.StepLR(base, 1)
    torch.manual_seed(3)
    state, grads = torch.get_rng_state(), toy.grads(0)
    toy.set_grads(grads)
    opt.first_step()
    assert torch.equal(torch.get_rng_state(), state) and not calls and base.count == 0
    assert base.seen == {"steps": []} and not any(map(torch.any, base.mine.values())) and not base.state
    assert all(torch.equal(p.grad, g) for p, g in zip(toy.params, grads, strict=True))
    opt.second_step()
    scheduler.step()
    # AdamW's step within the other's runs the hooks too.
    assert calls == ["before", "before", "after", "after"] and base.count == 1 and len(base.seen["steps"]) == 1


class Bound(torch.optim.AdamW):
    """Takes no weights but those that it knows."""

    def step(self, closure=None):
        if self.param_groups[0]["params"][0].data_ptr() != self.known:
            raise KeyError("other weights")
        super().step()


def test_an_optimizer_that_fails_on_copies_says_so_before_a_weight_moves():
    toy = Toy()
    opt = lk.BaseStepSAM(toy.params, Bound, rho=RHO, lr=0.1)
    opt.base_optimizer.known = toy.params[0].data_ptr()
    before = weights(toy)
    toy.set_grads(toy.grads(0))
    with pytest.raises(RuntimeError, match=r"Bound.step\(\) failed on copies.*KeyError.*direction=Gradient\(\)"):
        opt.first_step()
    assert all(map(torch.equal, weights(toy), before)) and not opt.base_optimizer.state


@pytest.mark.parametrize("name", ["momentum", "AdamW"])
def test_bfloat16_weights_move_as_those_in_float64_but_for_their_rounding(backend, name):
    """Weights below four round by 2^-7 at most. A step of 1e-3 of AdamW would be lost in them, were the copies in 16
    bits too."""
    kind, options = KINDS[name]
    toy, exact = Toy(torch.bfloat16), Toy(torch.float64)
    with torch.no_grad():
        for p, x in zip(exact.params, toy.params, strict=True):
            p.copy_(x)
    ends = []
    for each in (toy, exact):
        opt = lk.BaseStepSAM(each.params, kind, rho=4.0, backend=backend.name, **options)
        each.set_grads([g.to(p.dtype) for g, p in zip(toy.grads(0), each.params, strict=True)])
        opt.first_step()
        ends.append(weights(each))
    assert max(float((x.double() - y).abs().max()) for x, y in zip(*ends, strict=True) if x.numel()) <= 2**-6


def test_a_step_on_copies_is_not_captured():
    assert "copies" in lk.BaseStep().not_capturable()


# ---------------------------------------------------------------------------------------------------------------- Muon

Muon = getattr(torch.optim, "Muon", None)
needs_muon = pytest.mark.skipif(Muon is None, reason="this torch has no Muon")
OPTIONS = {"lr": 0.02, "weight_decay": 0.1}
MATRICES = ((6, 4), (3, 8), (5, 5))


def orthogonalized(m):
    """The orthogonal factor of a matrix, by its singular vectors, as Muon's Newton-Schulz iteration approximates it."""
    u, _, v = torch.linalg.svd(m, full_matrices=False)
    return u @ v


@needs_muon
def test_along_muon_it_is_the_orthogonalized_momentum(backend):
    """Jordan et al. 2024 as torch has it: m ← μm + (1 − μ)g, the orthogonal factor of (1 − μ)g + μm', and a factor of
    √max(1, rows/columns). Five iterations leave singular values between 0.68 and 1.14 for values of one: each matrix is
    off by a third of itself at most, here by 0.19, and the unit vector along g by 0.5 and more.
    """
    toy = Toy(torch.float64, MATRICES)
    opt = lk.BaseStepSAM(toy.params, Muon, rho=RHO, backend=backend.name, **OPTIONS)
    momenta = [torch.zeros_like(p) for p in toy.params]
    for i in range(3):
        grads = toy.grads(2 * i)
        eps = applied(toy, opt, grads)
        moved = [
            orthogonalized(0.05 * g + 0.95 * (0.95 * m + 0.05 * g)) * max(1, g.shape[0] / g.shape[1]) ** 0.5
            for g, m in zip(grads, momenta, strict=True)
        ]
        norm = torch.cat([x.flatten() for x in moved]).norm()
        off = torch.cat([(x - RHO * y / norm).flatten() for x, y in zip(eps, moved, strict=True)]).norm() / RHO
        plain = torch.cat([g.flatten() for g in grads])
        along_g = torch.cat([x.flatten() for x in moved]) / norm - plain / plain.norm()
        assert off < 0.32 < along_g.norm()
        seconds = toy.grads(2 * i + 1)
        toy.two_steps(opt, grads, seconds)
        momenta = [0.95 * m + 0.05 * g for m, g in zip(momenta, seconds, strict=True)]


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()


GENERATOR = torch.Generator().manual_seed(7)
BATCHES = [
    (torch.randn(5, 6, generator=GENERATOR, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0])) for _ in range(4)
]


def by_hand(model, optimizers, rho):
    """SAM in two passes, as one writes it in torch; each optimizer's parameters have a norm of their own."""
    held = [[p for group in opt.param_groups for p in group["params"]] for opt in optimizers]
    for x, y in BATCHES:
        model.zero_grad()
        cross_entropy(model(x), y).backward()
        saved = [[p.detach().clone() for p in params] for params in held]
        with torch.no_grad():
            for params in held:
                total = torch.stack([p.grad.square().sum() for p in params]).sum()
                for p in params:
                    p.add_((rho / total.sqrt()) * p.grad)
        model.zero_grad()
        cross_entropy(model(x), y).backward()
        with torch.no_grad():
            [p.copy_(x) for params, old in zip(held, saved, strict=True) for p, x in zip(params, old, strict=True)]
        for opt in optimizers:
            opt.step()


def split(model):
    """Matrices, and the rest."""
    return [[p for p in model.parameters() if (p.dim() == 2) is matrices] for matrices in (True, False)]


@needs_muon
@pytest.mark.parametrize("shape", family.SHAPES)
def test_sam_takes_muon_as_its_base(shape):
    """With the bits of the loop by hand: Muon steps by itself, along gradients at weights with these bits."""
    ends = []
    for ours in (True, False):
        model = network()
        matrices = split(model)[0]
        if ours:
            opt = lk.SAM(matrices, Muon, rho=0.1, backend="reference", **OPTIONS)
            for batch in BATCHES:
                family.take(opt, model, batch, shape)
            assert not opt.fused and opt.fused_reason == "Muon has no fused step"
        else:
            by_hand(model, [Muon(matrices, **OPTIONS)], 0.1)
        ends.append(matrices)
    assert all(map(torch.equal, *ends))


@needs_muon
def test_muon_and_adamw_share_two_passes():
    """Muon takes matrices only: the rest goes to an optimizer of its own, whose step is between the same passes."""
    ends = []
    for ours in (True, False):
        model = network()
        matrices, rest = split(model)
        bases = (matrices, Muon, OPTIONS), (rest, torch.optim.AdamW, {"lr": 0.02, "foreach": False})
        if ours:
            both = [lk.SAM(params, kind, rho=0.1, backend="reference", **options) for params, kind, options in bases]
            for x, y in BATCHES:
                cross_entropy(model(x), y).backward()
                for opt in both:
                    opt.first_step(zero_grad=True)
                cross_entropy(model(x), y).backward()
                for opt in both:
                    opt.second_step(zero_grad=True)
        else:
            by_hand(model, [kind(params, **options) for params, kind, options in bases], 0.1)
        ends.append([*matrices, *rest])
    # AdamW's step is fused with the restore here, and rounds otherwise than torch's; Muon makes of a last bit that
    # differs one of bfloat16, 2^-9 of a matrix whose elements it moves by at most lr.
    assert all((x - y).abs().max() <= 4 * 0.02 * 2**-9 for x, y in zip(*ends, strict=True))


@needs_muon
def test_muon_s_own_direction_trains_and_resumes_to_the_bit():
    """Muon's state is all that there is."""
    ends = []
    for resumes in (False, True):
        model = network()
        opt = lk.BaseStepSAM(split(model)[0], Muon, rho=0.1, **OPTIONS)
        for i, batch in enumerate(BATCHES):
            if resumes and i == 2:
                saved = copy.deepcopy(opt.state_dict())
                opt = lk.BaseStepSAM(split(model)[0], Muon, rho=0.1, **OPTIONS)
                opt.load_state_dict(saved)
            family.take(opt, model, batch)
        ends.append(split(model)[0])
    assert all(map(torch.equal, *ends))
