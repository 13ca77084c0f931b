"""docs/migration.md: old and new code, both from the page, end at the same weights, and differ where the page says so.

The old libraries are stood in for by the classes below, which take the same steps, written from their formulas.
"""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import lets_kernels as lk
from support.docs_blocks import after, before, blocks
from support.given_gradients import weights
from support.guard_bands import same_bits

PAGE = Path(__file__).resolve().parents[2] / "docs" / "migration.md"
((_, SETTING),) = blocks(PAGE, "python")
DIFFS = dict(zip(("common", "library", "asam", "gsam"), (text for _, text in blocks(PAGE, "diff")), strict=True))
COMMON, LIBRARY, AUTHORS_ASAM, AUTHORS_GSAM = DIFFS.values()
EPS = 1e-12


def norm(tensors):
    return torch.cat([t.flatten() for t in tensors]).norm()


class CommonSAM(torch.optim.Optimizer):
    """theta + rho T^2 g / (|Tg| + 1e-12) with T = |theta| or 1, and back by the saved weights."""

    def __init__(self, params, base, rho=0.05, adaptive=False, **options):
        super().__init__(params, {"rho": rho, "adaptive": adaptive, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    def parts(self):
        """Parameter, T and rho of all that have a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    yield p, p.abs() if group["adaptive"] else torch.ones_like(p), group["rho"]

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        total = norm([t * p.grad for p, t, _ in self.parts()]) + EPS
        for p, t, rho in [*self.parts()]:
            self.state[p]["saved"] = p.clone()
            p += rho * t * t * p.grad / total
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        for p, _, _ in self.parts():
            p.copy_(self.state[p]["saved"])
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    def step(self, closure):
        self.first_step(zero_grad=True)
        with torch.enable_grad():
            closure()
        self.second_step()


class AuthorsASAM:
    """T = |theta| + eta for what is called a weight, else 1; theta + rho T^2 g / |Tg|, undone by subtraction."""

    def __init__(self, optimizer, model, rho=0.5, eta=0.01):
        self.optimizer, self.model, self.rho, self.eta, self.moved = optimizer, model, rho, eta, {}

    @torch.no_grad()
    def ascent_step(self):
        named = [(p, p.abs() + self.eta if "weight" in name else 1.0) for name, p in self.model.named_parameters()]
        total = norm([t * p.grad for p, t in named]) + 1e-16
        self.moved = {p: self.rho * t * t * p.grad / total for p, t in named}
        for p, eps in self.moved.items():
            p += eps
        self.optimizer.zero_grad()

    @torch.no_grad()
    def descent_step(self):
        for p, eps in self.moved.items():
            p -= eps
        self.optimizer.step()
        self.optimizer.zero_grad()


class AuthorsGSAM:
    """g_hat - alpha (g - (g.g_hat / |g_hat|^2) g_hat), with a rho that is asked for, and once in the constructor."""

    def __init__(self, params, base, model, gsam_alpha, rho_scheduler):
        self.params, self.base, self.model, self.alpha = [*params], base, model, gsam_alpha
        self.rho_scheduler = rho_scheduler
        self.update_rho_t()

    def update_rho_t(self):
        self.rho = self.rho_scheduler.step()

    def set_closure(self, loss_fn, inputs, targets):
        def passes():
            self.base.zero_grad()
            outputs = self.model(inputs)
            loss = loss_fn(outputs, targets)
            loss.backward()
            return outputs, loss.detach()

        self.passes = passes

    def step(self):
        outputs, loss = self.passes()
        g = [p.grad.clone() for p in self.params]
        eps = [self.rho * each / (norm(g) + EPS) for each in g]
        with torch.no_grad():
            torch._foreach_add_(self.params, eps)
        switch(self.model, off=True)
        self.passes()
        switch(self.model, off=False)
        g_hat = [p.grad for p in self.params]
        along = sum((a * b).sum() for a, b in zip(g, g_hat, strict=True)) / norm(g_hat) ** 2
        with torch.no_grad():
            torch._foreach_sub_(self.params, eps)
            for p, first, second in zip(self.params, g, g_hat, strict=True):
                p.grad = second - self.alpha * (first - along * second)
        self.base.step()
        return outputs, loss


class ProportionScheduler:
    def __init__(self, scheduler, max_lr, min_lr, max_value, min_value):
        self.scheduler, self.lrs, self.values = scheduler, (max_lr, min_lr), (max_value, min_value)

    def step(self):
        share = (self.scheduler.get_last_lr()[0] - self.lrs[1]) / (self.lrs[0] - self.lrs[1])
        return self.values[1] + (self.values[0] - self.values[1]) * share


def switch(model, off):
    """Batch norm leaves its statistics alone if their momentum is 0."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.momentum = 0.0 if off else 0.1


STANDINS = {
    "sam": {"SAM": CommonSAM},
    "bypass_bn": {
        "disable_running_stats": lambda model: switch(model, off=True),
        "enable_running_stats": lambda model: switch(model, off=False),
    },
    "pytorch_optimizer": {"SAM": CommonSAM},
    "asam": {"ASAM": AuthorsASAM},
    "gsam": {"GSAM": AuthorsGSAM, "ProportionScheduler": ProportionScheduler},
}


@pytest.fixture(autouse=True)
def old_libraries(monkeypatch):
    for name, contents in STANDINS.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)


def run(code, **changed):
    """What a loop of the page leaves behind, from the page's own setting."""
    names = {}
    exec(SETTING, names)
    names |= changed
    exec(code, names)
    return SimpleNamespace(**names)


def apart(one, other):
    return max((a - b).abs().max().item() for a, b in zip(weights(one.model), weights(other.model), strict=True))


# 20 steps in float64, each rounded some ten times at 2^-53, on losses that amplify a difference by less than 100.
CLOSE = 1e-12


@pytest.mark.parametrize("diff", DIFFS.values(), ids=DIFFS.keys())
def test_old_and_new_code_of_the_page_end_at_the_same_weights(diff):
    start, old, new = run(""), run(before(diff)), run(after(diff))
    assert apart(old, new) < CLOSE
    assert apart(start, new) > 1e-2


@pytest.mark.parametrize("diff", [COMMON, AUTHORS_GSAM], ids=["common", "gsam"])
def test_running_statistics_agree_where_the_old_code_switches_them_off(diff):
    old, new = (run(code).model[1] for code in (before(diff), after(diff)))
    assert torch.allclose(old.running_mean, new.running_mean, rtol=1e-12, atol=1e-13)
    assert torch.allclose(old.running_var, new.running_var, rtol=1e-12, atol=1e-13)


def test_they_count_both_passes_where_nothing_switches_them_off():
    without = after(COMMON).replace(", model=model", "")
    assert run(after(COMMON)).model[1].num_batches_tracked == 20
    assert run(without).model[1].num_batches_tracked == 40


def test_adaptive_agrees_too():
    code = [side(COMMON).replace("adaptive=False", "adaptive=True") for side in (before, after)]
    assert apart(*map(run, code)) < CLOSE < 1e-6 < apart(run(code[1]), run(after(COMMON)))


def test_biases_that_are_scaled_train_otherwise():
    scaled = after(AUTHORS_ASAM).replace("scale_bias=False", "scale_bias=True")
    assert apart(run(scaled), run(after(AUTHORS_ASAM))) > 1e-6


def test_subtracting_moves_the_weights_and_restoring_does_not():
    old, new = (side(AUTHORS_ASAM).replace("lr=0.1", "lr=0.0") for side in (before, after))
    start = weights(run("").model)
    assert not same_bits(weights(run(old).model), start)
    assert same_bits(weights(run(new).model), start)


def test_a_gradient_that_is_not_finite_stays_in_the_weights_there_and_is_skipped_here():
    exec(SETTING, names := {})
    data = [*names["data"]]
    data[10] = (data[10][0] * float("nan"), data[10][1])
    old, new = (run(side(COMMON), data=data) for side in (before, after))
    assert not weights(old.model)[0].isfinite().any()
    assert all(w.isfinite().all() for w in weights(new.model)) and int(new.optimizer.skipped) == 1


def test_the_call_before_the_step_is_one_pass_too_many():
    code = after(LIBRARY).replace("    def closure():\n", "    def closure():\n        calls.append(0)\n")
    assert code.count("calls") == 1
    run(code, calls=(calls := []))
    assert len(calls) == 2 * 20
    run(code.replace("    optimizer.step(closure)", "    closure()\n    optimizer.step(closure)"), calls=(calls := []))
    assert len(calls) == 3 * 20


@pytest.mark.parametrize(("method", "name", "here"), [(lk.GSAM, "gsam_alpha", "alpha"), (lk.ASAM, "eta", "xi")])
def test_a_name_of_the_old_code_is_an_error_that_says_the_new_one(method, name, here):
    with pytest.raises(TypeError, match=f"called {here} here"):
        method([torch.nn.Parameter(torch.ones(2))], torch.optim.SGD, lr=0.1, **{name: 0.1})
