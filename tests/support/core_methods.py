"""The methods and base optimizers under test: how the package builds each, and how the oracle runs it."""

import math

import torch

import lets_kernels as lk
from support import oracle
from support.conv_net import TRANSPOSED

# name: (class, its arguments beside parameters and base optimizer, the oracle's rho, T and p)
METHODS = {
    "sam": (lk.SAM, {"rho": 0.1}, {"rho": 0.1}),
    "sam-adaptive": (lk.SAM, {"rho": 0.5, "adaptive": True}, {"rho": 0.5, "T": oracle.elementwise(0.0)}),
    "sam-p1.5": (lk.SAM, {"rho": 0.1, "direction": lk.Gradient(p=1.5)}, {"rho": 0.1, "p": 1.5}),
    "sam-p3": (lk.SAM, {"rho": 0.1, "direction": lk.Gradient(p=3.0)}, {"rho": 0.1, "p": 3.0}),
    "sam-p-inf": (lk.SAM, {"rho": 0.01, "direction": lk.Gradient(p=math.inf)}, {"rho": 0.01, "p": math.inf}),
    "sam-scheduled": (
        lk.SAM,
        {"rho": lk.ScheduledRadius.linear(0.2, 0.05, 5)},
        {"rho": lambda t: 0.2 - 0.15 * min(t, 5) / 5},
    ),
    "asam": (lk.ASAM, {"rho": 0.5, "xi": 0.02}, {"rho": 0.5, "T": oracle.elementwise(0.02)}),
    "asam-unscaled-biases": (
        lk.ASAM,
        {"rho": 0.5, "xi": 0.02, "scale_bias": False},
        {"rho": 0.5, "T": oracle.elementwise(0.02, scale_bias=False)},
    ),
    "asam-filterwise": (
        lk.ASAM,
        {"rho": 0.3, "xi": 0.02, "filterwise": True},
        {"rho": 0.3, "T": oracle.filterwise(0.02, transposed=TRANSPOSED)},
    ),
    "asam-filterwise-unscaled-biases": (
        lk.ASAM,
        {"rho": 0.3, "xi": 0.02, "filterwise": True, "scale_bias": False},
        {"rho": 0.3, "T": oracle.filterwise(0.02, scale_bias=False, transposed=TRANSPOSED)},
    ),
}


def adamw(**options):
    return oracle.Adam(decoupled=True, **options)


# name: (class, transcription, options, the compiled op of its fused step or None)
BASES = {
    "sgd": (torch.optim.SGD, oracle.SGD, {"lr": 0.1}, "restore_sgd_"),
    "momentum": (torch.optim.SGD, oracle.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}, "restore_sgd_"),
    "nesterov": (torch.optim.SGD, oracle.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, "restore_sgd_"),
    "adam": (torch.optim.Adam, oracle.Adam, {"lr": 0.02, "weight_decay": 0.1}, "restore_adamw_"),
    "adamw": (torch.optim.AdamW, adamw, {"lr": 0.02, "weight_decay": 0.1}, "restore_adamw_"),
    "dampening": (torch.optim.SGD, oracle.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.2}, None),
    "rmsprop": (torch.optim.RMSprop, oracle.RMSprop, {"lr": 0.01}, None),
}

# How LETS may curve, what it may minimise, and what may move nu. The options of SGD move rho visibly in ten steps.
CURVATURES = {
    "secant": ({"curvature": "secant"}, 2.0),
    "diagonal": ({"curvature": "diagonal", "direction": "epsilon"}, 50.0),
    "algorithm1": ({"curvature": "diagonal", "direction": "algorithm1"}, 50.0),
}
METRICS = ("squared_gap", "gap", "validation_loss")


def build(method, task, base="momentum", backend="auto", **options):
    """A method of the table on the task's net."""
    cls, arguments, _ = METHODS[method]
    optimizer, _, base_options, _ = BASES[base]
    arguments = {"model": task.net, "backend": backend, **arguments, **options}
    return cls(task.net.parameters(), optimizer, **arguments, **base_options)


NU = {
    "adam": (torch.optim.Adam, oracle.Adam, lambda lr: {"lr": 0.05}),
    "sgd": (torch.optim.SGD, oracle.SGD, lambda lr: {"lr": lr, "momentum": 0.5}),
}
