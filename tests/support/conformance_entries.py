"""Entries for torch's generated optimizer tests: each method over each base optimizer, described in torch's own terms.

They are derived from those that torch keeps for the base optimizers, so that a configuration, a scheduler or an error
that a later torch adds there is tested here too. What differs is in :func:`entry`.
"""

import copy
import functools
import math

import torch
from torch.testing._internal.common_optimizers import ErrorOptimizerInput, OptimizerInfo, OptimizerInput, optim_db
from torch.testing._internal.common_utils import TestCase

import lets_kernels as lk
from support import family

# Importing torch's test utilities freezes the flags of torch.backends for the whole process; other tests set them.
torch.backends.__allow_nonbracketed_mutation_flag = True

#: What SAM refuses, because it has no meaning there, or cannot do.
REFUSED = ("maximize", "differentiable")


def learned():
    """The loss on the validation batch: it moves rho also where that batch is the training batch."""
    return lk.LearnedRadius(0.05, metric="validation_loss")


METHODS = {
    lk.SAM: [{"rho": 0.1}, {"rho": 0.1, "adaptive": True, "backend": "reference"}],
    lk.ASAM: [{"scale_bias": False}, {"filterwise": True, "flatten": True}],
    lk.LETSSAM: [{"flatten": True}, {"backend": "reference", "check_finite": False}],
    # Of the family, one that makes its first pass beside the weights and one that keeps something for each.
    lk.RSAM: [{"rho": 0.1, "gamma": 0.1}, {"backend": "reference", "flatten": True}],
    lk.VaSSO: [{"rho": 0.1, "theta": 0.4}, {"backend": "reference", "flatten": True}],
}
BASES = {
    lk.SAM: ("SGD", "Adam", "AdamW", "RMSprop"),
    lk.ASAM: ("SGD", "Adam"),
    lk.LETSSAM: ("SGD", "Adam"),
    lk.RSAM: ("SGD",),
    lk.VaSSO: ("SGD",),
}
#: And those that have nothing but a page: with what its first row says, over a base optimizer with every kind of state.
PAGES = [name for name in family.FAMILY if name not in (*family.TUNED, *family.PER_SAMPLE) and family.FAMILY[name].base]
for name in PAGES:
    cls, options = family.FAMILY[name].cls, {**family.FAMILY[name].options, "seed": 1}
    METHODS[cls] = [options, {**options, "backend": "reference", "flatten": True}]
    BASES[cls] = ("AdamW",)


def over(method, base):
    """The method over one base optimizer, as a class that takes parameters and options; torch's tests know no more."""

    def __init__(self, params, **kwargs):
        if method is lk.LETSSAM:
            kwargs.setdefault("rho", learned())
        if method is lk.RSAM:
            kwargs.setdefault("seed", 1)
        method.__init__(self, params, base, **kwargs)

    name = f"{method.__name__}Over{base.__name__}"
    made = type(name, (method,), {"__init__": __init__, "__module__": __name__, "base": base})
    globals()[name] = made  # where pickle looks for it
    return made


def inputs(method, of_base, device, dtype=None):
    """The base optimizer's configurations that are not refused; every second one with options of the method's own."""
    own = [{}, METHODS[method][0], {}, METHODS[method][1]]
    found = []
    for i in of_base(device):
        if not set(i.kwargs) & set(REFUSED):
            more = own[len(found) % 4]
            found.append(OptimizerInput(None, {**i.kwargs, **more}, f"{i.desc} {more}"))
    more = METHODS[method][1]
    return [*found, OptimizerInput(None, {**more, "weight_decay": 0.1}, f"weight_decay {more}")]


def errors(method, of_base, device, dtype):
    """The base optimizer's errors, which must come through, and the method's own."""
    p = torch.nn.Parameter(torch.randn(2, 3, device=device, dtype=dtype))
    through = [
        ErrorOptimizerInput(
            OptimizerInput(e.optimizer_error_input.params or [p], *_rest(e.optimizer_error_input)),
            error_on=e.error_on,
            error_type=e.error_type,
            error_regex=e.error_regex,
        )
        for e in of_base(device, dtype)
    ]
    eighth = torch.nn.Parameter(torch.ones(3, dtype=torch.float8_e5m2, device=device))
    own = [
        ([p], {"rho": -1.0}, ValueError, "rho"),
        ([p], {"rho": math.nan}, ValueError, "rho"),
        ([p], {"rho": "large"}, TypeError, "rho must be a number"),
        ([p], {"maximize": True}, ValueError, "minimised"),
        ([p], {"differentiable": True}, ValueError, "leave it out"),
        ([p], {"backend": "none"}, ValueError, "choose one of"),
        ([torch.nn.Parameter(p.detach().to(torch.complex32))], {}, TypeError, "make it complex64"),
        ([eighth], {}, TypeError, "keep it out"),
        ([torch.nn.Parameter(p.detach()[:, :1].expand(2, 3))], {}, ValueError, "clone"),
        ([{"params": []}], {}, ValueError, "no parameters"),
    ]
    if method is lk.LETSSAM:
        own.append(([p], {"rho": 0.0}, ValueError, "rho > 0"))
    return through + [
        ErrorOptimizerInput(OptimizerInput(params, kwargs, regex), error_type=kind, error_regex=regex)
        for params, kwargs, kind, regex in own
    ]


def _rest(given):
    return given.kwargs, given.desc


def entry(method, base):
    """An entry for ``optims``: what the base optimizer's says, but for what a perturbation rules out."""
    theirs = next(info for info in optim_db if info.optim_cls is base)
    return OptimizerInfo(
        over(method, base),
        optim_inputs_func=functools.partial(inputs, method, theirs.optim_inputs_func),
        optim_error_inputs_func=functools.partial(errors, method, theirs.optim_error_inputs_func),
        scheduler_inputs=theirs.scheduler_inputs,
        # Handed on to the base optimizer, which uses them where it steps by itself.
        supported_impls=tuple(flag for flag in theirs.supported_impls if flag not in REFUSED),
        not_og_supported_flags=tuple(flag for flag in theirs.not_og_supported_flags if flag not in REFUSED),
        supports_fused_on=theirs.supports_fused_on,
        has_capturable_arg=theirs.has_capturable_arg,
        # A perturbation is of all weights, also of those that a sparse gradient leaves out.
        supports_sparse=False,
        supports_complex=True,
        step_requires_closure=False,
        supports_param_groups=True,
        supports_multiple_devices=True,
    )


ENTRIES = [entry(method, getattr(torch.optim, base)) for method, bases in BASES.items() for base in bases]


# ---- what the tests share

OWN = {"rho", "adaptive", "backend", "flatten", "filterwise", "scale_bias", "check_finite", "gamma", "theta", "seed"}
OWN |= {option for name in PAGES for option in family.FAMILY[name].options}


def configurations(info, device, **more):
    """The entry's configurations, each with tensors of its own."""
    return [copy.deepcopy({**given.kwargs, **more}) for given in info.optim_inputs_func(device)]


def parameters(dtype, *shapes):
    generator = torch.Generator().manual_seed(7)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [torch.nn.Parameter(v) for v in values]


def take(opt, closure):
    return opt.step(closure, closure) if opt.radius.learns else opt.step(closure)


class Linear:
    """A loss whose gradients do not depend on the weights: c_k, the k-th step's coefficients."""

    def __init__(self, params):
        self.params, self.step = params, 0

    def coefficients(self):
        generator = torch.Generator().manual_seed(100 + self.step)
        return [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in self.params]

    def closure(self):
        for p, c in zip(self.params, self.coefficients(), strict=True):
            p.grad = c
        return sum((p * c).sum().double() for p, c in zip(self.params, self.coefficients(), strict=True))

    def run(self, opt, steps=3, schedulers=()):
        for _ in range(steps):
            if hasattr(opt, "base_optimizer"):
                take(opt, self.closure)
            else:
                self.closure()
                opt.step()
            for scheduler in schedulers:
                plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                scheduler.step(*[1.0] * plateau)
            self.step += 1


def base_alone(info, params, kwargs):
    """The base optimizer by itself."""
    return info.optim_cls.base(params, **{k: v for k, v in kwargs.items() if k not in OWN})


def bare(groups):
    """Groups without parameters and without the package's own keys."""
    left_out = ("params", "xi", "lets_kernels", *OWN)
    return [{k: v for k, v in group.items() if k not in left_out} for group in groups]


SHAPES = ((4, 3), (5,), (), (2, 3, 2, 2))


class Conformance(TestCase):
    """What the generated classes have in common."""

    def assert_same_steps(self, opt, other, **tolerances):
        """Weights, state and options of the wrapper are those of the base optimizer that ran by itself."""
        assert bare(opt.param_groups) == bare(other.param_groups)
        pairs = zip(opt.param_groups, other.param_groups, strict=True)
        for ours, theirs in (pair for a, b in pairs for pair in zip(a["params"], b["params"], strict=True)):
            torch.testing.assert_close(ours, theirs, **tolerances)
            found, expected = (
                {k: v for k, v in getattr(o, "base_optimizer", o).state[p].items() if v is not None}
                for o, p in ((opt, ours), (other, theirs))
            )
            torch.testing.assert_close(found, expected, **tolerances)
