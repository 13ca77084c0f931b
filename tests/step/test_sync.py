"""No step waits for the device: on the meta device there is no value to wait for, so any synchronisation raises."""

import pytest
import torch
from torch import nn

import lets_kernels as lk
from support import family
from support.core_methods import BASES
from support.family import FAMILY, ONE_EACH
from support.inside import progress

METHODS = {
    "sam": (lk.SAM, {}),
    "sam-p3": (lk.SAM, {"direction": lk.Gradient(p=3.0)}),
    "asam": (lk.ASAM, {}),
    "asam-filterwise": (lk.ASAM, {"filterwise": True}),
    "flattened": (lk.ASAM, {"flatten": True}),
}
LEARNED = {
    "secant": {"curvature": "secant"},
    "diagonal": {},
    "algorithm1": {"direction": "algorithm1"},
    "validation-loss": {"metric": "validation_loss"},
    "reuse": {"reuse_train_gradient": True},
    "sgd-per-group": {"optimizer": torch.optim.SGD, "per_group": True},
    "rmsprop": {"optimizer": torch.optim.RMSprop},
    "amsgrad": {"amsgrad": True},
}


def meta_net():
    with torch.device("meta"):
        return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2))


#: These say in their docstrings that they wait: AE-SAM for the norm, a selection to leave out what is not finite.
WAITING = (lk.AESAM, lk.AELookSAM, lk.SparseSAM)
FREE = [name for name in ONE_EACH if FAMILY[name].cls not in WAITING]


def closure_of(net):
    def closure():
        net.zero_grad()
        loss = net(torch.empty(4, 2, 6, 6, device="meta")).square().mean()
        loss.backward()
        return loss

    return closure


def test_the_guard_itself_raises():
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.zeros((), device="meta").item()


@pytest.mark.parametrize("base", ["momentum", "adamw", "rmsprop"])
@pytest.mark.parametrize("method", METHODS)
def test_no_step_synchronises(method, base):
    cls, options = METHODS[method]
    optimizer, _, base_options, _ = BASES[base]
    net = meta_net()
    opt = cls(net.parameters(), optimizer, **options, **base_options)
    for _ in range(3):
        opt.step(closure_of(net))
    assert {"grad_norm", "skipped_steps", "loss_gap"} <= set(opt.metrics()) and torch.is_tensor(opt.rho)
    opt.zero_grad()
    closure_of(net)()
    with opt.perturbed():
        closure_of(net)()
    opt.step()


def meta_step(opt, net, shape):
    batch = torch.empty(4, 2, 6, 6, device="meta"), torch.empty(4, dtype=torch.int64, device="meta")
    family.take(opt, net, batch, shape)


@pytest.mark.parametrize("name", FREE)
def test_no_step_of_any_method_synchronises(name):
    """And what they draw from is counted on the device, where a replay of a captured step goes on counting."""
    net = meta_net()
    opt = family.build(name, net)
    for shape in family.SHAPES:
        meta_step(opt, net, shape)
    assert {"perturbed_grad_norm", "skipped_steps"} <= set(opt.metrics())
    drawn = progress(opt).random.at(torch.device("meta"), 0)
    assert drawn.device.type == "meta" and drawn is progress(opt).random.at(torch.device("meta"), 0)


@pytest.mark.parametrize("name", ["aesam", "aelooksam", "sparse"])
def test_the_methods_that_wait_are_seen_to_wait(name):
    net = meta_net()
    opt = family.build(name, net)
    with pytest.raises((RuntimeError, NotImplementedError)):
        meta_step(opt, net, "closure")


def test_a_radius_on_the_device_is_never_read():
    net = meta_net()
    opt = lk.SAM(net.parameters(), torch.optim.SGD, lr=0.1)
    opt.add_param_group({"params": [nn.Parameter(torch.empty(3, device="meta"))], "rho": 0.2})
    opt.param_groups[0]["rho"] = torch.full((1,), 0.1, device="meta")
    opt.step(closure_of(net))
    assert opt.rho.device.type == "meta" and opt.rho.shape == (2,) and opt.rho.dtype == torch.float64


@pytest.mark.parametrize("learning", LEARNED)
@pytest.mark.parametrize("preset", [lk.LETSSAM, lk.LETSASAM])
def test_no_learning_synchronises(preset, learning):
    net = meta_net()
    opt = preset(net.parameters(), torch.optim.SGD, lk.LearnedRadius(0.1, **LEARNED[learning]), lr=0.1, momentum=0.9)
    for _ in range(3):
        opt.step(closure_of(net), closure_of(net))
    assert opt.rho.device.type == "meta" and "rho_grad" in opt.metrics()
