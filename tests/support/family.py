"""Every method beside SAM, ASAM and LETS: how it is built, its transcription, and a step of it in each call shape.

A method that has a page is in all the lists here, with the arguments of the page's first row and the transcription in
papers.py that is called as it is; a line in FAMILY gives it others.
"""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import lets_kernels as lk
from lets_kernels.methods import catalogue
from lets_kernels.step.carried import numbers
from support import papers
from support.conv_net import TRANSPOSED
from support.core_methods import BASES
from support.inside import progress

SEED = 1
STEPS = 10  # of AE-SAM's c, of schedules of p, of late SAM, of the dynamic mask: the length of training here
SHAPES = ("closure", "two-steps", "context")


@dataclass
class Member:
    """One method with its arguments; `paper` transcribes it, and takes what is in `formula` beside them."""

    cls: type
    options: dict[str, Any]
    paper: Callable[..., None] | None  # None: nobody has transcribed it, which test_family.py finds
    formula: dict[str, Any] = field(default_factory=dict)
    base: bool = True  # False: an optimizer of its own

    @property
    def arguments(self):
        return {**self.options, **self.formula}


AE = {"steps": STEPS, "delta": 0.5}
START = {"gamma": 0.1, "lam": 0.7}
VARIATIONAL = {"lr": 0.05, "data_size": 500.0, "beta2": 0.9, "weight_decay": 0.01}

# Arguments away from those at which a method is another one, and large enough to matter in ten steps.
FAMILY = {
    "rst": Member(lk.RST, {"rho": 0.1, "p": 0.5}, papers.rst),
    "rst-linear": Member(lk.RST, {"rho": 0.1, "p": 1.0, "end": 0.0, "steps": STEPS, "shape": "linear"}, papers.rst),
    "rst-trigonometric": Member(
        lk.RST, {"rho": 0.1, "p": 0.1, "end": 1.0, "steps": STEPS, "shape": "trigonometric"}, papers.rst
    ),
    "looksam": Member(lk.LookSAM, {"rho": 0.1, "k": 3}, papers.looksam),
    "looksam-per-tensor": Member(lk.LookSAM, {"rho": 0.1, "k": 3, "per_tensor": True}, papers.looksam),
    "aesam": Member(lk.AESAM, {"rho": 0.1, **AE}, papers.aesam),
    "aelooksam": Member(lk.AELookSAM, {"rho": 0.1, **AE, "lambda2": 2.0, "alpha": 0.5}, papers.aelooksam),
    "late-sam": Member(lk.LateSAM, {"rho": 0.1, "steps": STEPS, "fraction": 0.8}, papers.late_sam),
    "gsam": Member(lk.GSAM, {"rho": 0.1, "alpha": 0.4}, papers.gsam),
    "rgsam": Member(lk.RGSAM, {"rho": 0.1, "alpha": 0.4, **START}, papers.rgsam, {"transposed": TRANSPOSED}),
    "norm-penalty": Member(lk.GradientNormPenalty, {"rho": 0.1, "alpha": 0.8}, papers.norm_penalty),
    "stable-sam": Member(lk.StableSAM, {"rho": 0.1}, papers.stable_sam),
    "multi-step-sam": Member(lk.MultiStepSAM, {"rho": 0.1, "k": 3}, papers.multi_step_sam),
    "multi-step-sam-growing": Member(
        lk.MultiStepSAM, {"rho": 0.05, "k": 2, "renormalize": False}, papers.multi_step_sam
    ),
    "lookbehind": Member(lk.Lookbehind, {"rho": 0.05, "k": 3, "alpha": 0.6}, papers.lookbehind),
    "sampa": Member(lk.SAMPa, {"rho": 0.1, "lam": 0.3}, papers.sampa),
    "wsam": Member(lk.WSAM, {"rho": 0.1, "gamma": 0.6}, papers.wsam),
    "wsam-coupled": Member(lk.WSAM, {"rho": 0.1, "gamma": 0.4, "decouple": False}, papers.wsam),
    "rsam": Member(lk.RSAM, {"rho": 0.1, **START}, papers.rsam, {"transposed": TRANSPOSED}),
    "rsam-std": Member(lk.RSAM, {"rho": 0.1, **START, "noise_scale": "std"}, papers.rsam, {"transposed": TRANSPOSED}),
    "le-sam": Member(lk.LESAM, {"rho": 0.1, "rho_max": 0.12}, papers.le_sam),
    "usam": Member(lk.USAM, {"rho": 0.1, "lam": 0.3}, papers.usam),
    "lightsam": Member(lk.LightSAM, {"rho": 0.3, "eps": 0.5}, papers.lightsam),
    "random-sam": Member(lk.RandomSAM, {"rho": 0.3}, papers.random_sam),
    "friendly": Member(lk.FriendlySAM, {"rho": 0.1, "sigma": 0.8, "decay": 0.7}, papers.friendly),
    "friendly-text": Member(
        lk.FriendlySAM, {"rho": 0.1, "sigma": 0.8, "decay": 0.7, "update_first": True}, papers.friendly
    ),
    "vasso": Member(lk.VaSSO, {"rho": 0.1, "theta": 0.4}, papers.vasso),
    "fisher-sam": Member(lk.FisherSAM, {"rho": 0.1, "eta": 20.0}, papers.fisher_sam),
    "sparse": Member(lk.SparseSAM, {"rho": 0.1, "sparsity": 0.5}, papers.sparse),
    "sparse-interval": Member(lk.SparseSAM, {"rho": 0.1, "sparsity": 0.8, "interval": 3}, papers.sparse),
    "sparse-dynamic": Member(
        lk.SparseSAM, {"rho": 0.1, "kind": "dynamic", "interval": 2, "steps": STEPS}, papers.sparse
    ),
    "esam": Member(lk.ESAM, {"rho": 0.1, "beta": 0.6, "gamma": 0.5}, papers.esam),
    "esam-tensor": Member(lk.ESAM, {"rho": 0.1, "gamma": 0.3, "granularity": "tensor"}, papers.esam),
    "delta-sam": Member(lk.DeltaSAM, {"rho": 0.1}, papers.delta_sam),
    "bsam": Member(lk.BSAM, {"rho": 0.05, **VARIATIONAL}, papers.bsam, base=False),
}


def of_page(method):
    """A member as its page describes it, without the options of the base optimizer, which BASES gives."""
    scope = {name: getattr(lk, name) for name in lk.__all__}
    options = eval(f"dict({method.rows[0].arguments})", scope)
    if not method.own_base:
        options = {k: v for k, v in options.items() if k not in ("lr", "momentum", "betas")}
    return Member(method.cls, options, getattr(papers, method.key.replace("-", "_"), None), base=not method.own_base)


#: Those with a line of their own above.
TUNED = tuple(FAMILY)
#: Those of tests/support/core_methods.py, and those that have a line above.
ELSEWHERE = {lk.SAM, lk.ASAM, lk.LETSSAM, lk.LETSASAM, *(member.cls for member in FAMILY.values())}
FAMILY |= {method.key: of_page(method) for method in catalogue.methods() if method.cls not in ELSEWHERE}
#: One of each class, for tests that need no more.
ONE_EACH = [name for i, name in enumerate(FAMILY) if FAMILY[name].cls not in [m.cls for m in list(FAMILY.values())[:i]]]
#: Arguments with which those that leave out second passes make them at every step.
ALWAYS = {
    "rst": {"p": 1.0},
    "looksam": {"k": 1},
    "aesam": {"lambda1": -9.0, "lambda2": -9.0},
    "aelooksam": {"lambda1": -9.0, "lambda2": -9.0},
    "late-sam": {"fraction": 1.0},
}
#: What has counted a finite first gradient although its step is given up or skipped later: their docstrings say so.
COUNTED = {
    "friendly": {"direction.updates", "lets_kernels.average"},
    "vasso": {"direction.updates", "lets_kernels.average"},
    "bsam": {"precision"},
    "sampa": {"lets_kernels.ahead"},
    "aesam": {"schedule.mean", "schedule.variance"},
    "aelooksam": {"schedule.mean", "schedule.variance"},
    "lightsam": {"length.sum"},
}


def build(name, source, base="momentum", seed=SEED, **options):
    """A method of the family over a Task's net, a module, or parameters (or groups of them)."""
    member, net = FAMILY[name], getattr(source, "net", source)
    arguments = {"seed": seed, **member.options, **options}
    if isinstance(net, nn.Module):
        arguments = {"model": net, **arguments}
        net = net.parameters()
    if not member.base:
        return member.cls(net, **arguments)
    optimizer, _, base_options, _ = BASES[base]
    return member.cls(net, optimizer, **arguments, **base_options)


@functools.cache
def _small(name, base="momentum"):
    """A member on one parameter, to be looked at; None where it refuses the base optimizer."""
    try:
        return build(name, [torch.nn.Parameter(torch.ones(2))], base)
    except ValueError:
        return None


def takes(name, base):
    """True for a base optimizer that the method goes with; momentum SGD is one for each."""
    return _small(name, base) is not None


def draws(name):
    """True for a method that draws random numbers."""
    return progress(_small(name)).random.used


def plainest(name):
    """The name of the base optimizer with the least state that the method goes with."""
    return "sgd" if takes(name, "sgd") else "momentum"


#: Those that make their first pass beside the weights, and need `first_pass()` around it.
BESIDE = tuple(name for name in FAMILY if _small(name).direction.starts)
#: Those that have one pass a step, at the perturbed weights.
ONE_PASS = tuple(name for name in FAMILY if not _small(name).direction.needs_gradient)
#: Those that go by what the base optimizer keeps: nothing moves before its first step.
BY_STATE = tuple(name for name in ONE_PASS if not _small(name).direction.draws)
#: And those that go by what the step before has found: nothing is perturbed in the first one.
STILL_AT_FIRST = (*BY_STATE, *(name for name in FAMILY if isinstance(_small(name).direction, lk.Ahead)))
#: Those that take several gradients before the last one.
SEVERAL = tuple(name for name in FAMILY if _small(name).direction.ascents > 1)
#: Those whose closure returns the losses of single samples.
PER_SAMPLE = tuple(name for name in FAMILY if _small(name).samples.per_sample)


def closure(opt, net, batch, calls=None):
    """The closure that this optimizer's ``step`` takes; `calls` gets what each call was for."""
    x, y = batch

    def run():
        if calls is not None:
            calls.append(None)
        net.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        return loss

    def samples(subset=None):
        if calls is not None:
            calls.append(subset)
        return losses(opt, net, batch, subset)

    return samples if opt.samples.per_sample else run


def losses(opt, net, batch, subset=None):
    """What the closure of a method that looks at samples returns: their losses, with the outputs for delta-SAM."""
    x, y = batch if subset is None else (batch[0][subset], batch[1][subset])
    outputs = net(x)
    found = nn.functional.cross_entropy(outputs, y, reduction="none")
    return (found, outputs) if isinstance(opt.samples, lk.WeightedSamples) else found


def _first_backward(opt, net, batch):
    """The first pass as a user of the two-step shapes writes it; the losses, where the method looks at them."""
    if not opt.samples.per_sample:
        nn.functional.cross_entropy(net(batch[0]), batch[1]).backward()
        return None
    found = losses(opt, net, batch)
    if isinstance(opt.samples, lk.WeightedSamples):
        (opt.samples.weights(*found) * found[0]).sum().backward()
    else:
        found.mean().backward()
    return found


def _second_backward(opt, net, batch, before):
    if isinstance(opt.samples, lk.SelectedSamples):
        subset = None
        if opt.samples.gamma < 1:
            with torch.no_grad():
                after = losses(opt, net, batch)
            subset = opt.samples.subset(before, after)
        losses(opt, net, batch, subset).mean().backward()
    elif opt.samples.per_sample:
        losses(opt, net, batch)[0].mean().backward()
    else:
        nn.functional.cross_entropy(net(batch[0]), batch[1]).backward()


def take(opt, net, batch, shape="closure", skip=True):
    """One step in one of the SHAPES; `skip` leaves out the second pass where the optimizer says so."""
    if shape == "closure":
        opt.step(closure(opt, net, batch))
        return
    opt.zero_grad()
    before = None
    if opt.direction.needs_gradient:
        with opt.first_pass() if opt.direction.starts else contextlib.nullcontext():
            before = _first_backward(opt, net, batch)
    if shape == "two-steps":
        needed = opt.first_step(zero_grad=True)
        while opt.ascents_left:
            _second_backward(opt, net, batch, before)
            opt.first_step(zero_grad=True)
        if needed or not skip:
            _second_backward(opt, net, batch, before)
        opt.second_step(zero_grad=True)
        return
    for _ in range(opt.direction.ascents):
        with opt.perturbed() as needed:
            if needed or not skip:
                opt.zero_grad()
                _second_backward(opt, net, batch, before)
    opt.step()
    opt.zero_grad()


def run(opt, task, batches=None, shape="closure", skip=True):
    """Steps through the training batches of a Task."""
    for batch, _ in task.batches if batches is None else batches:
        take(opt, task.net, batch, shape, skip)


def held(opt):
    """Copies of all that a step may change: weights, the base optimizer's state, the parts' tensors and numbers."""
    params = [p for group in opt.param_groups for p in group["params"]]
    saved = opt.state_dict()
    found = {f"weights.{i}": p.detach().clone() for i, p in enumerate(params)}
    for i, entry in saved["state"].items():
        found |= {f"{i}.{k}": v.clone() for k, v in entry.items() if torch.is_tensor(v)}
    found |= {f"radius.{k}": torch.as_tensor(v).clone() for k, v in numbers(saved["lets_kernels"]["radius"]).items()}
    for part in ("direction", "schedule", "descent", "length", "random"):
        own = saved["lets_kernels"].get(part, {})  # a length that keeps nothing has no entry
        found |= {f"{part}.{k}": torch.as_tensor(v).clone() for k, v in own.items()}
    return found


def assert_same(a, b):
    """Bitwise equality of two of `held`."""
    assert a.keys() == b.keys()
    different = [k for k in a if not _same(a[k], b[k])]
    assert not different, f"other bits in {different}"


def _same(x, y):
    return x.dtype == y.dtype and x.shape == y.shape and x.numpy(force=True).tobytes() == y.numpy(force=True).tobytes()


def few(name, backend):
    """Steps: one where the reference selects a mask, which it does slowly."""
    return 1 if backend.name == "reference" and FAMILY[name].cls is lk.SparseSAM else 4
