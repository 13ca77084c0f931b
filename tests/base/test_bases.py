"""Base optimizers that step by themselves: hooks, errors within, what they save, parts of networks."""

import copy
import sys
import warnings

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import lets_kernels as lk
from support.conv_net import Task
from support.given_gradients import snapshot, weights
from support.guard_bands import same_bits
from support.spawned_ranks import spawn


@pytest.fixture
def global_hooks():
    """What hooks of all optimizers have seen."""
    seen = []
    handles = [
        register_optimizer_step_pre_hook(lambda o, *_: seen.append(("pre", type(o).__name__))),
        register_optimizer_step_post_hook(lambda o, *_: seen.append(("post", type(o).__name__))),
    ]
    yield seen
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("base", ["SGD", "AdamW", "RMSprop", "Adagrad"])
@pytest.mark.parametrize("shape", ["closure", "two-steps", "alone"])
def test_hooks_of_all_optimizers_run_once_a_step_fused_or_not(backend, base, shape, global_hooks):
    task = Task(torch.float32, steps=2)
    opt = lk.SAM(task.net.parameters(), getattr(torch.optim, base), lr=0.1, backend=backend.name)
    for batch, _ in task.batches:
        if shape == "closure":
            opt.step(task.closure(batch))
        elif shape == "two-steps":
            task.closure(batch)()
            opt.first_step(zero_grad=True)
            task.closure(batch)()
            opt.second_step()
        else:
            opt.param_groups[0]["lr"] = 0.0
            opt.zero_grad()
            task.closure(batch)()
            opt.step()
    assert global_hooks == [("pre", "SAM"), ("post", "SAM")] * 2


@pytest.mark.parametrize("fails", [False, True])
def test_hooks_stay_registered_and_can_be_removed_or_added_within(backend, fails, global_hooks):
    task = Task(torch.float32, steps=1)
    batch, late = task.batches[0][0], []

    class Base(torch.optim.RMSprop):
        def step(self, closure=None):
            self.handle = register_optimizer_step_post_hook(lambda *_: late.append(1))
            if fails:
                raise KeyError("lost")
            return super().step(closure)

    opt = lk.SAM(task.net.parameters(), Base, lr=0.1, backend=backend.name)
    if fails:
        with pytest.raises(KeyError, match="lost"):
            opt.step(task.closure(batch))
    else:
        opt.step(task.closure(batch))
    opt.base_optimizer.handle.remove()
    before = len(late)
    other = torch.optim.SGD(task.net.parameters(), lr=0.1)
    del global_hooks[:]
    other.step()
    assert global_hooks == [("pre", "SGD"), ("post", "SGD")]
    assert len(late) == before


@pytest.mark.parametrize("check_finite", [False, True])
def test_an_error_within_the_base_optimizers_step_says_what_it_has_left(backend, check_finite):
    class Half(torch.optim.RMSprop):
        fails = True

        def step(self, closure=None):
            if self.fails:
                with torch.no_grad():
                    self.param_groups[0]["params"][0].add_(1.0)
                raise ValueError("half of it")
            return super().step(closure)

    task = Task(torch.float32, steps=1)
    batch = task.batches[0][0]
    opt = lk.SAM(task.net.parameters(), Half, lr=0.1, backend=backend.name, check_finite=check_finite)
    before = weights(task)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with pytest.raises(ValueError, match="half of it") as raised:
            opt.step(task.closure(batch))
    notes = getattr(raised.value, "__notes__", [str(w.message) for w in warned])
    assert any("Half.step() failed within this step" in note and "Go on from a saved state" in note for note in notes)
    after = weights(task)
    assert same_bits(after[1:], before[1:]), "the others are at home"
    opt.base_optimizer.fails = False
    opt.step(task.closure(batch))
    assert not same_bits(weights(task)[1:], before[1:])
    assert opt.metrics()["skipped_steps"] == 0


class Lookahead(torch.optim.Optimizer):
    """As public ones do: a state of another layout."""

    def __init__(self, inner):
        self.inner, self.param_groups, self.state, self.defaults = inner, inner.param_groups, inner.state, {}
        self._optimizer_step_pre_hooks = self._optimizer_step_post_hooks = {}

    def step(self, closure=None):
        self.inner.step()

    def state_dict(self):
        return {"fast_state": {}, "slow_state": {}, "param_groups": []}


def test_a_base_optimizer_whose_state_has_another_layout_is_refused_when_built(backend):
    task = Task(torch.float32, steps=1)
    inner = torch.optim.SGD(task.net.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"Lookahead.state_dict\(\) lacks 'state'.*Lookahead\(SAM"):
        lk.SAM(task.net.parameters(), Lookahead(inner), backend=backend.name)
    around = Lookahead(lk.SAM(task.net.parameters(), torch.optim.SGD, lr=0.1, backend=backend.name))
    before = weights(task)
    batch = task.batches[0][0]
    task.closure(batch)()
    around.inner.first_step(zero_grad=True)
    task.closure(batch)()
    around.step()
    assert not same_bits(weights(task), before)


def _zero(rank, ways):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    task = Task(torch.float64, steps=3)
    model = torch.nn.parallel.DistributedDataParallel(task.net)
    params = list(model.parameters())
    options = {"optimizer_class": torch.optim.SGD, "lr": 0.1, "momentum": 0.9}
    if ways == "refused":
        with pytest.raises(TypeError, match="Put it inside"):
            ZeroRedundancyOptimizer(params, optimizer_class=lk.SAM, base_optimizer=torch.optim.SGD, lr=0.1)
        return []
    opt = lk.SAM(params, ZeroRedundancyOptimizer(params, **options), rho=0.1, model=model)
    for batch, _ in task.batches:

        def closure(batch=batch):
            opt.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
            loss.backward()
            return loss

        opt.step(closure)
    return weights(task)


@pytest.mark.parametrize("ways", ["refused", "inside"])
def test_a_part_of_the_parameters_for_each_rank_goes_inside_and_not_around(ways, tmp_path):
    found = spawn(_zero, 2, tmp_path, ways)
    if ways == "inside":
        task = Task(torch.float64, steps=3)
        alone = lk.SAM(task.net.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)
        task.run(alone)
        for own in found:
            for a, b in zip(own, weights(task), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-12)  # two ranks with one batch: the mean is rounded
    else:
        assert found == [[], []]


# ---- what closures may return


RETURNED = ["tuple", "list", "dict", "vector", "none", "string", "complex", "float", "empty", "huge", "sparse"]


@pytest.mark.parametrize("returns", RETURNED)
def test_what_a_closure_returns_is_handed_through(backend, returns):
    """As torch's SGD does; the loss is seen where there is one."""
    task = Task(torch.float64, steps=1)
    batch = task.batches[0][0]
    opt = lk.SAM(task.net.parameters(), torch.optim.SGD, lr=0.1, backend=backend.name)
    made = []

    def closure():
        opt.zero_grad()
        loss = task.loss(batch)
        loss.backward()
        made.append(
            {
                "tuple": (loss, "logits"),
                "list": [loss],
                "dict": {"loss": loss, "accuracy": 1.0},
                "vector": torch.ones(3),
                "none": None,
                "string": "done",
                "complex": torch.ones((), dtype=torch.complex64),
                "float": loss.item(),
                "empty": (),
                "huge": 10**400,
                "sparse": torch.ones(1).to_sparse(),
            }[returns]
        )
        return made[-1]

    expected = task.loss(batch).item()
    assert opt.step(closure) is made[0]
    assert len(made) == 2
    seen = opt.metrics().get("loss")
    if returns in ("tuple", "list", "dict", "float"):
        assert seen.item() == expected
    else:
        assert seen is None


@pytest.mark.parametrize("which", ["closure", "val_closure"])
def test_a_learned_radius_names_the_closure_that_returns_no_loss(backend, which):
    task = Task(torch.float32, steps=1)
    batch, val_batch = task.batches[0]
    opt = lk.LETSSAM(task.net.parameters(), torch.optim.SGD, lr=0.1, backend=backend.name)
    good, bad = task.closure(batch), lambda: task.closure(val_batch)() * torch.ones(3)
    closures = (bad, good) if which == "closure" else (good, bad)
    with pytest.raises(ValueError, match=rf"^{which} must return the loss.*a tensor of shape \(3,\)"):
        opt.step(*closures)


def test_a_loss_that_is_none_is_refused_where_it_is_given(backend):
    task = Task(torch.float32, steps=1)
    opt = lk.SAM(task.net.parameters(), torch.optim.SGD, lr=0.1, backend=backend.name)
    task.closure(task.batches[0][0])()
    before = weights(task)
    with pytest.raises(ValueError, match=r"loss must be a number.*\(2,\)"):
        opt.first_step(loss=torch.ones(2))
    assert same_bits(weights(task), before)


# ---- learning after the next step has begun; networks of others


def two_steps(opt, task, batch):
    task.closure(batch)()
    opt.first_step(zero_grad=True)
    task.closure(batch)()
    opt.second_step()


@pytest.mark.parametrize("between", ["perturbed", "perturbed-and-restored", "first_step", "first_step-and-restored"])
@pytest.mark.parametrize("curvature", ["diagonal", "secant"])
def test_a_radius_does_not_learn_once_the_next_step_has_begun(backend, curvature, between):
    task = Task(torch.float64, steps=1)
    batch, val_batch = task.batches[0]
    radius = lk.LearnedRadius(0.1, curvature=curvature)
    opt = lk.LETSASAM(task.net.parameters(), torch.optim.SGD, rho=radius, lr=0.1, backend=backend.name)
    two_steps(opt, task, batch)
    task.closure(batch)()
    if between.startswith("perturbed"):
        with opt.perturbed():
            pass
    else:
        opt.first_step()
    if between.endswith("restored"):
        opt.restore()
    rho = opt.rho.clone()
    with pytest.raises(RuntimeError, match=r"radius_step\(\) (while the weights|comes after second_step)"):
        opt.radius_step(task.closure(batch), task.closure(val_batch))
    assert same_bits(opt.rho, rho)
    opt.restore()
    two_steps(opt, task, batch)
    opt.radius_step(task.closure(batch), task.closure(val_batch))
    assert not same_bits(opt.rho, rho)


@pytest.mark.parametrize("averaged", [False, True])
def test_model_that_holds_other_parameters_is_refused(backend, averaged):
    task = Task(torch.float32, steps=1)
    other = torch.optim.swa_utils.AveragedModel(task.net) if averaged else copy.deepcopy(task.net)
    with pytest.raises(ValueError, match="holds none of the parameters"):
        lk.SAM(task.net.parameters(), torch.optim.SGD, lr=0.1, backend=backend.name, model=other)
    whole = torch.nn.ModuleList([task.net, torch.nn.Linear(2, 2)])
    opt = lk.SAM(task.net.parameters(), torch.optim.SGD, lr=0.1, backend=backend.name, model=whole)
    before = snapshot(opt)
    task.run(opt)
    assert not same_bits(snapshot(opt), before)


if sys.version_info >= (3, 11):

    def test_the_note_travels_with_the_error(backend):
        class Bad(torch.optim.RMSprop):
            def step(self, closure=None):
                raise KeyboardInterrupt

        task = Task(torch.float32, steps=1)
        opt = lk.SAM(task.net.parameters(), Bad, lr=0.1, backend=backend.name)
        before = weights(task)
        with pytest.raises(KeyboardInterrupt) as raised:
            opt.step(task.closure(task.batches[0][0]))
        assert len(raised.value.__notes__) == 1
        assert same_bits(weights(task), before)
