"""An optimizer of the package's own scalars (ν of LETS): stepped by the ops where they can, by itself where not."""

import copy
import io
import pickle
import weakref

import pytest
import torch

import lets_kernels as lk
import lets_kernels.step.step as step_module
from lets_kernels.base.fused import _LION, FUSED, OwnStep
from lets_kernels.ops.declared import OPS
from support.backends import Recorder
from support.conv_net import Task
from support.given_gradients import Toy, snapshot, weights
from support.guard_bands import same_bits

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}, "restore_sgd_"),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, "restore_sgd_"),
    "adam": (torch.optim.Adam, {"lr": 0.03, "maximize": True}, "restore_adamw_"),
    "adamw": (torch.optim.AdamW, {"lr": 0.03, "weight_decay": 0.1}, "restore_adamw_"),
    "amsgrad": (torch.optim.Adam, {"lr": 0.03, "amsgrad": True}, None),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.03}, None),
}


def scalars(name, count=2):
    """Some 0-d float64 parameters, each in a group of its own, and their optimizer."""
    params = [torch.tensor(-1.5 + i, dtype=torch.float64, requires_grad=True) for i in range(count)]
    cls, options, _ = OPTIMIZERS[name]
    optimizer = cls([params[0]], **options)
    for p in params[1:]:
        optimizer.add_param_group({"params": [p], "lr": 0.01})
    return params, optimizer


def give(params, i):
    for k, p in enumerate(params):
        p.grad = torch.tensor(0.7 - 0.3 * i + 0.1 * k, dtype=torch.float64)


def state_of(params, optimizer):
    inner = [optimizer.state.get(p, {}) for p in params]
    return {(k, n): v.clone() for k, s in enumerate(inner) for n, v in s.items() if torch.is_tensor(v)}


@pytest.mark.parametrize("gates", [(1, 1, 1, 1), (1, 0, 1, 1), (0, 1, 1, 0)], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_torch_and_only_those_that_happen_count(backend, name, gates):
    (params, optimizer), (others, other) = scalars(name), scalars(name)
    own, op = OwnStep(), OPTIMIZERS[name][2]
    for i, gate in enumerate(gates):
        give(params, i)
        before = [*weights(params), *state_of(params, optimizer).values()]
        with Recorder() as recorder:
            own(optimizer, torch.tensor(float(gate), dtype=torch.float64), backend.name)
        assert len(recorder.ops) == (len(params) if op and backend.name == "cpu" else 0)
        if gate:
            give(others, i)
            other.step()
        elif i:
            assert same_bits([*weights(params), *state_of(params, optimizer).values()], before)
    # A handful of roundings a step in float64, of values of about one.
    found, expected = state_of(params, optimizer), state_of(others, other)
    assert found.keys() == expected.keys()
    for a, b in [*zip(weights(params), weights(others), strict=True), *((found[k], expected[k]) for k in expected)]:
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-15, check_dtype=True)


def test_a_version_is_counted_and_a_scheduler_sees_a_step(backend, recwarn):
    params, optimizer = scalars("adam")
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    give(params, 0)
    before = [p._version for p in params]
    OwnStep()(optimizer, torch.ones((), dtype=torch.float64), backend.name)
    scheduler.step()
    assert all(p._version > v for p, v in zip(params, before, strict=True))
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]
    assert optimizer.param_groups[0]["lr"] == 0.015


def test_hooks_of_the_optimizer_are_called(backend):
    params, optimizer = scalars("adam")
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    give(params, 0)
    OwnStep()(optimizer, torch.ones((), dtype=torch.float64), backend.name)
    assert calls == [1]


def learner(backend, **options):
    task = Task(torch.float32, steps=4)
    radius = lk.LearnedRadius(0.1, lr=0.05, **options)
    return task, lk.LETSSAM(task.net.parameters(), torch.optim.SGD, radius, backend=backend.name, lr=0.1)


@pytest.mark.parametrize("through", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_a_radius_that_has_learned_can_be_copied(backend, through):
    task, opt = learner(backend)
    task.run(opt, task.batches[:2], learned=True)
    radius = through(opt.radius)
    assert same_bits(radius.nu, opt.radius.nu)
    give(radius.nu, 0)
    radius._step_nu(radius.optimizer, torch.ones((), dtype=torch.float64), backend.name)
    assert not same_bits(radius.nu, opt.radius.nu)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_state_from_a_gpu_goes_on_here(backend, amsgrad):
    """There the optimizer is `capturable`, which torch refuses on the CPU; the option does not travel."""
    task, opt = learner(backend, amsgrad=amsgrad)
    assert opt.radius._on(torch.device("cuda")) == {"capturable": True}
    assert opt.radius._on(torch.device("cpu")) == {"capturable": False}
    task.run(opt, task.batches[:2], learned=True)
    file, state = io.BytesIO(), copy.deepcopy(opt.state_dict())
    state["lets_kernels"]["radius"]["optimizer"]["param_groups"][0]["capturable"] = True
    torch.save(state, file)
    file.seek(0)
    other_task, other = learner(backend, amsgrad=amsgrad)
    other_task.net.load_state_dict(task.net.state_dict())
    other.load_state_dict(torch.load(file, weights_only=False))
    for t, o in ((task, opt), (other_task, other)):
        t.run(o, t.batches[2:], learned=True)
    assert same_bits(snapshot(opt), snapshot(other))


def test_what_the_user_says_about_capturable_stands():
    radius = lk.LearnedRadius(0.1, capturable=False)
    assert radius._on(torch.device("cuda")) == {"capturable": False}
    assert lk.LearnedRadius(0.1, optimizer=torch.optim.SGD)._on(torch.device("cuda")) == {}


@pytest.mark.parametrize("check_finite", [False, True])
def test_without_a_gate_the_base_optimizer_steps_without_a_guard(backend, monkeypatch, check_finite):
    """On an accelerator the guard costs a copy of weights and state: only where something can close the gate."""
    calls = []
    guarded = step_module.guarded_step
    monkeypatch.setattr(step_module, "guarded_step", lambda *a: calls.append(1) or guarded(*a))
    toy = Toy()
    before = weights(toy)
    opt = lk.SAM(toy.params, torch.optim.RMSprop, backend=backend.name, check_finite=check_finite, lr=0.01)
    toy.steps(opt, 1)
    assert calls == [1] * check_finite
    assert not any(same_bits(a, b) for a, b in zip(weights(toy), before, strict=True) if a.numel())


@pytest.mark.parametrize("fused", dict.fromkeys((*FUSED.values(), _LION)), ids=lambda fused: fused.op)
def test_a_fused_step_has_the_options_and_lists_that_its_op_declares(fused):
    """In the order of the declaration, by their names there, where a pair of betas is two."""
    (op,) = (op for op in OPS if op.name == fused.op)
    names = [a.name for a in op.arguments]
    options = op.arguments[names.index("gate") + 1 :]
    given = [each for name in fused.numbers for each in (("beta1", "beta2") if name == "betas" else (name,))]
    assert [a.name for a in options if a.kind == "PerRun"] == given
    assert [a.name for a in options if a.kind == "bool"] == [name.split("_")[0] for name in fused.flags]
    assert [a.kind for a in options] == ["PerRun"] * len(given) + ["bool"] * len(fused.flags)
    lists = names[names.index("grads") + 1 : names.index("saved")]
    stems = {"momenta": "momentum_buffer", "exp_avgs": "exp_avg", "exp_avg_sqs": "exp_avg_sq", "steps": "step"}
    assert [stems.get(name, name.removesuffix("s")) for name in lists] == [name for name, _ in fused.lists]


def test_a_replaced_state_lives_on_for_no_set_of_runs():
    """Steps of other parameters than the last have found tensors there, too."""
    toy = Toy(shapes=((3,), (4, 2)))
    opt = lk.SAM(toy.params, torch.optim.SGD, lr=0.1, momentum=0.9, backend="cpu")

    def step(*those):
        toy.two_steps(opt, toy.grads(0), [g if i in those else None for i, g in enumerate(toy.grads(1))])

    step(0, 1)
    step(1)
    old = weakref.ref(opt.state[toy.params[1]]["momentum_buffer"])
    opt.state[toy.params[1]]["momentum_buffer"] = torch.zeros(4, 2)
    step(1)
    assert old() is None
