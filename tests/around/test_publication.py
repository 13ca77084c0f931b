"""Perturbed weights are never published: the optimizer given `model=` has whatever saves, copies or loads it refuse."""

import contextlib
import copy
import gc
import io
import os
import pickle
import re
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict

import lets_kernels as lk
from support import family
from support.family import ALWAYS, BESIDE, ONE_EACH
from support.given_gradients import weights
from support.guard_bands import same_bits

STARTED = r"while the weights are moved away from theta for the first pass.*first_pass\(\).*restore\(\)"
REFUSED = r"while the weights are perturbed: .*second_step\(\).*restore\(\)"


def net():
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    return nn.Sequential(inner, nn.Tanh(), nn.Linear(4, 2))


def backward(model):
    model.zero_grad()
    model(torch.linspace(-1, 1, 15).reshape(5, 3)).square().mean().backward()


def optimizer(model, params=None, cls=lk.SAM, **options):
    params = model.parameters() if params is None else params
    return cls(params, torch.optim.SGD, rho=0.5, model=model, lr=0.1, **options)


@contextlib.contextmanager
def perturbed(model, **options):
    """The model with its weights perturbed, and the optimizer."""
    opt = optimizer(model, **options)
    backward(model)
    opt.first_step(zero_grad=True)
    yield opt
    opt.restore()


def to_file(model):
    torch.save(model, io.BytesIO())


PUBLISHERS = {
    "state_dict": lambda model: model.state_dict(),
    "state_dict-of-a-child": lambda model: model[0].state_dict(),
    "state_dict-of-a-grandchild": lambda model: model[0][1].state_dict(),
    "state_dict-of-a-child-without-weights": lambda model: model[1].state_dict(),
    "torch.distributed.checkpoint": get_model_state_dict,
    "torch.compile": lambda model: torch.compile(model, backend="eager").state_dict(),
    "a-module-around-it": lambda model: nn.ModuleDict({"model": model}).state_dict(),
    "deepcopy": copy.deepcopy,
    "deepcopy-of-a-child": lambda model: copy.deepcopy(model[0]),
    "swa": torch.optim.swa_utils.AveragedModel,
    "pickle": pickle.dumps,
    "torch.save": to_file,
    "load_state_dict": lambda model: model.load_state_dict(net().state_dict()),
    "load_state_dict-of-a-child": lambda model: model[2].load_state_dict(net()[2].state_dict()),
}


@pytest.mark.parametrize("how", PUBLISHERS)
def test_a_perturbed_model_is_not_published(how):
    """Before the step, while it does not stand perturbed, and after it, everything works."""
    model, publish = net(), PUBLISHERS[how]
    publish(model)
    with perturbed(model) as opt:
        before = weights(model)
        with pytest.raises(RuntimeError, match=REFUSED):
            publish(model)
        assert same_bits(weights(model), before)
        opt.restore()
        publish(model)
        backward(model)
        opt.first_step(zero_grad=True)
        backward(model)
        with pytest.raises(RuntimeError, match=REFUSED):
            publish(model)
        opt.second_step()
    publish(model)
    assert bool(torch.isfinite(torch.cat([w.flatten() for w in weights(model)])).all())


@pytest.mark.parametrize("how", PUBLISHERS)
def test_a_model_moved_for_a_first_pass_is_not_published(how):
    """R-SAM's start is no weight of anybody's, from the first step on; on the way out all is well again."""
    model, publish = net(), PUBLISHERS[how]
    opt = family.build("rsam", model)
    before = weights(model)
    with opt.first_pass():
        moved = weights(model)
        assert not same_bits(moved, before)
        with pytest.raises(RuntimeError, match=STARTED):
            publish(model)
        assert same_bits(weights(model), moved)
        backward(model)
    publish(model)
    with opt.first_pass():
        opt.restore()
        publish(model)
    before = weights(model)
    with pytest.raises(RuntimeError, match=STARTED), opt.first_pass():
        publish(model)
    assert same_bits(weights(model), before)


@pytest.mark.parametrize("name", ONE_EACH)
def test_every_method_refuses_in_both_of_its_passes(name):
    model = net()
    opt = family.build(name, model, **ALWAYS.get(name, {}))
    whole = {"state_dict()": opt.state_dict, "copying": lambda: copy.deepcopy(opt), "the model": model.state_dict}
    saved = opt.state_dict()
    whole["load_state_dict()"] = lambda: opt.load_state_dict(saved)
    whole["add_param_group()"] = lambda: opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})

    def refuses(message):
        for what, call in whole.items():
            with pytest.raises(RuntimeError, match=rf"{re.escape(what)}.*{message}"):
                call()

    with opt.first_pass():
        backward(model)
        if name in BESIDE:
            refuses(STARTED)
            for what in (opt.first_step, opt.perturbed().__enter__, opt.first_pass().__enter__, opt.step):
                with pytest.raises(RuntimeError, match=STARTED):
                    what()
            opt.zero_grad()
            backward(model)
        else:
            model.state_dict(), opt.state_dict()
    with opt.perturbed():
        refuses(REFUSED)
    opt.restore()
    model.state_dict(), opt.state_dict()


def test_a_context_and_a_closure_refuse_as_well_and_end_unperturbed():
    model = net()
    before = weights(model)
    opt = optimizer(model, cls=lk.ASAM)
    backward(model)
    with pytest.raises(RuntimeError, match=REFUSED), opt.perturbed():
        model.state_dict()
    calls = []

    def closure():
        calls.append(1)
        backward(model)
        model.state_dict()
        return torch.zeros(())

    opt.zero_grad()
    with pytest.raises(RuntimeError, match=REFUSED):
        opt.step(closure)
    assert len(calls) == 2 and same_bits(weights(model), before)
    model.state_dict()


def test_without_model_nothing_hangs_on_the_module():
    model = net()
    opt = lk.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    backward(model)
    opt.first_step()
    model.state_dict()


@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_model_is_nobodys(make):
    """Made while nothing was perturbed; what its original is afterwards does not concern it."""
    model = net()
    with perturbed(model) as opt:
        opt.restore()
        copied = make(model)
        assert same_bits(weights(copied), weights(model))
        backward(model)
        opt.first_step()
        with pytest.raises(RuntimeError, match=REFUSED):
            model.state_dict()
        for child in (copied, *copied.children()):
            child.state_dict()
        copied.load_state_dict(net().state_dict())
        make(copied)
        with perturbed(copied), pytest.raises(RuntimeError, match=REFUSED):
            copied.state_dict()


def test_a_pickled_model_loads_without_the_package(tmp_path):
    model = nn.Sequential(nn.Linear(3, 2))
    opt = optimizer(model)
    backward(model)
    opt.first_step()
    opt.second_step()
    torch.save(model, tmp_path / "model")
    code = f"""
import sys, torch
sys.modules["lets_kernels"] = None
model = torch.load({str(tmp_path / "model")!r}, weights_only=False)
model.load_state_dict(model.state_dict())
print(sum(p.numel() for p in model.state_dict().values()))
"""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout == "8\n", result.stderr


@pytest.mark.parametrize("make", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copied_optimizer_guards_the_copied_model(make):
    model = net()
    with perturbed(model) as opt:
        opt.restore()
        copied_model, copied = make((model, opt))
        backward(copied_model)
        copied.first_step()
        model.state_dict()
        with pytest.raises(RuntimeError, match=REFUSED):
            copied_model[0].state_dict()
        copied.restore()
        copied_model.state_dict()


def hooks(model):
    return sum(len(m._state_dict_pre_hooks) + len(m._load_state_dict_pre_hooks) for m in model.modules())


def test_an_optimizer_that_is_gone_refuses_nothing_and_leaves_nothing():
    model = net()
    opt = optimizer(model)
    for _ in range(3):
        backward(model)
        opt.first_step()
        assert hooks(model) == 2 * len(list(model.modules()))
        opt.restore()
        opt.load_state_dict(opt.state_dict())  # builds its tables anew
    backward(model)
    opt.first_step()
    del opt
    gc.collect()
    model.state_dict()
    assert hooks(model) == 0


def test_several_optimizers_of_one_model_each_refuse_for_themselves():
    model = net()
    head, trunk = optimizer(model, model[2].parameters()), optimizer(model, model[0].parameters())
    for opt in (head, trunk):
        backward(model)
        opt.first_step()
        with pytest.raises(RuntimeError, match=REFUSED):
            model.state_dict()
        with pytest.raises(RuntimeError, match=REFUSED):
            copy.deepcopy(model)
        opt.restore()
        model.state_dict()


def test_a_module_that_comes_with_a_new_group_is_covered():
    model = net()
    opt = optimizer(model)
    backward(model)
    opt.first_step()
    opt.second_step()
    model.append(nn.Linear(2, 2))
    opt.add_param_group({"params": model[3].parameters()})
    backward(model)
    opt.first_step()
    with pytest.raises(RuntimeError, match=REFUSED):
        model[3].state_dict()
    opt.restore()


@pytest.mark.parametrize("given", ["wrapper", "module"])
def test_a_model_in_distributed_data_parallel(tmp_path, given):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = net()
        wrapper = nn.parallel.DistributedDataParallel(model)
        opt = optimizer(wrapper if given == "wrapper" else model)
        backward(wrapper)
        opt.first_step()
        for module in (wrapper, wrapper.module, model[0]):
            with pytest.raises(RuntimeError, match=REFUSED):
                module.state_dict()
        with pytest.raises(RuntimeError, match=REFUSED):
            get_model_state_dict(wrapper)
        opt.restore()
        assert wrapper.state_dict().keys() == {f"module.{k}" for k in model.state_dict()}
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.jit")
def test_a_module_with_hooks_can_still_be_scripted_traced_and_exported():
    model = net().eval()
    with perturbed(model) as opt:
        opt.restore()
        x = torch.ones(2, 3)
        for converted in (
            torch.jit.script(model),
            torch.jit.trace(model, x),
            torch.export.export(model, (x,)).module(),
        ):
            assert same_bits(converted(x), model(x))
