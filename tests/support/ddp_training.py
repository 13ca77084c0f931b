"""What the ranks of the DistributedDataParallel tests run: a net, its batches, and the methods on it."""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lets_kernels as lk
from lets_kernels import LearnedRadius
from support.family import FAMILY, held
from support.given_gradients import snapshot
from support.inside import replace_samples
from support.moving_radii import auto, following

# name: (class, arguments made anew for every optimizer)
METHODS = {
    "sam": (lk.SAM, lambda: {"rho": 0.05}),
    "asam": (lk.ASAM, lambda: {"rho": 0.5, "filterwise": True}),
    "lets-sam": (lk.LETSSAM, lambda: {"rho": LearnedRadius(0.05, curvature="secant", lr=0.05)}),
    "lets-asam": (lk.LETSASAM, lambda: {"rho": LearnedRadius(0.5, curvature="diagonal", lr=0.05)}),
    **{name: (member.cls, lambda own=member.options: dict(own)) for name, member in FAMILY.items()},
    "p-1": (lk.SAM, lambda: {"rho": 0.05, "direction": lk.Gradient(p=1.0)}),
    "sometimes": (lk.SAM, lambda: {"direction": lk.RandomStart(0.1), "schedule": lk.Bernoulli(0.5)}),
    "auto": (lk.SAM, lambda: {"rho": auto()}),
    "auto-gsam-per-group": (lk.GSAM, lambda: {"rho": auto(per_group=True)}),
    "next": (lk.ASAM, lambda: {"rho": following(0.5)}),
    "lets-gsam": (lk.GSAM, lambda: {"rho": LearnedRadius(0.05, curvature="secant", lr=0.05)}),
    "lets-friendly": (lk.FriendlySAM, lambda: {"rho": LearnedRadius(0.05, curvature="diagonal", lr=0.05)}),
}
#: All but those of SAM, ASAM and LETS.
BESIDE_SAM = list(METHODS)[4:]
BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "adam": (torch.optim.Adam, {"lr": 0.01}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.003}),
}
LEARNERS = {
    "secant": {"curvature": "secant"},
    "diagonal": {"curvature": "diagonal"},
    "algorithm1": {"curvature": "diagonal", "direction": "algorithm1"},
    "reuse": {"curvature": "secant", "reuse_train_gradient": True},
}
KINDS = ["sam", *LEARNERS]
SYNC = {"one-perturbation": True, "one-a-rank": False}

VALIDATION = 10_000  # the number of a step's validation batch, from that of the step


def net(dtype=torch.float32):
    """Filters, a matrix and biases."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        layers = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))
    return layers.to(dtype)


def batch(rank, step, dtype=torch.float32):
    """Inputs of one rank at one step, and their classes."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(4, 2, 4, 4, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(3, (4,), generator=generator)


def joined(step, dtype=torch.float32):
    """What two ranks see together."""
    return tuple(torch.cat(parts) for parts in zip(batch(0, step, dtype), batch(1, step, dtype), strict=True))


def closure(model, data, factor=1.0, samples=None):
    """torch's convention, or that of ``samples``; ``factor`` may be a list, with one for each call."""
    factors = iter(factor) if isinstance(factor, list) else None

    def run():
        model.zero_grad()
        loss = nn.functional.cross_entropy(model(data[0]), data[1]) * (factor if factors is None else next(factors))
        loss.backward()
        return loss

    def by_sample(subset=None):
        x, y = data if subset is None else (data[0][subset], data[1][subset])
        outputs = model(x)
        losses = nn.functional.cross_entropy(outputs, y, reduction="none")
        losses = losses * (factor if factors is None else next(factors))
        return (losses, outputs) if isinstance(samples, lk.WeightedSamples) else losses

    return by_sample if samples is not None and samples.per_sample else run


class ChosenByParts(lk.SelectedSamples):
    """In one process, what each rank chooses that has one of the equal parts of the batch."""

    count = 2

    def subset(self, before, after):
        size, own = len(before) // self.count, lk.SelectedSamples(self.gamma)
        pairs = zip(before.split(size), after.split(size), strict=True)
        return torch.cat([i * size + own.subset(*pair) for i, pair in enumerate(pairs)])


class WeightedByParts(lk.WeightedSamples):
    """In one process, what each rank weights that has one of the equal parts of the batch."""

    count = 2

    def weights(self, *returned):
        norms, own = self.norms(*returned), lk.WeightedSamples(self.power, norms=lambda part: part)
        return torch.cat([own.weights(part) / self.count for part in norms.split(len(norms) // self.count)])


def by_parts(opt, count=2):
    """Let an optimizer in one process look at samples as ranks do."""
    if isinstance(opt.samples, lk.SelectedSamples):
        replace_samples(opt, ChosenByParts(opt.samples.gamma))
    elif isinstance(opt.samples, lk.WeightedSamples):
        replace_samples(opt, WeightedByParts(opt.samples.power))
    opt.samples.count = count
    return opt


def optimizer(model, /, method="sam", base="momentum", **options):
    cls, arguments = METHODS[method]
    kind, settings = BASES[base]
    options = {"model": model, **arguments(), **options}
    if cls is lk.BSAM:  # its own base optimizer
        return cls(model.parameters(), **options)
    return cls(model.parameters(), kind, **options, **settings)


def base_of(method, start):
    """The name of the first of BASES that the method goes with, from one of them on."""
    for base in [*BASES, *BASES][start % len(BASES) :]:
        try:
            optimizer(nn.Linear(2, 2), method, base)
            return base
        except ValueError:
            pass
    raise AssertionError(f"{method} goes with none of {list(BASES)}")


def build(model, /, kind, sync=True, **options):
    """SAM, ASAM with one of the learners, or another method, on SGD without weight decay."""
    if kind in FAMILY:
        return optimizer(model, kind, "sgd", sync_perturbation=sync, **{"seed": 3, **options})
    if kind == "sam":
        return optimizer(model, "sam", "sgd", sync_perturbation=sync, **options)
    radius = LearnedRadius(0.3, lr=0.05, **LEARNERS[kind])
    return optimizer(model, "lets-asam", "sgd", rho=radius, sync_perturbation=sync, **options)


def ended(opt):
    """All that a step may change: as ``snapshot``, the count of skipped steps, and what the parts keep and count."""
    own = [value for name, value in held(opt).items() if not name.startswith("weights.")]
    return [*snapshot(opt), opt.metrics()["skipped_steps"], *own]


def train(opt, model, batches, steps, start=0, take=None):
    """Steps with closures; ``batches(step)`` gives the batch, ``take`` is one of the call shapes below."""
    for step in range(start, start + steps):
        closures = [closure(model, batches(step), samples=opt.samples)]
        if opt.radius.learns:
            closures.append(closure(model, batches(step + VALIDATION)))
        (take or by_closure)(opt, *closures)


def by_closure(opt, *closures):
    opt.step(*closures)


def by_two_steps(opt, first, val=None):
    with opt.first_pass():
        loss = first()
    opt.first_step(zero_grad=True, loss=loss)
    first()
    while opt.ascents_left:
        opt.first_step(zero_grad=True)
        first()
    opt.second_step(zero_grad=True)
    if val is not None:
        opt.radius_step(first, val)


def by_context(opt, first, val=None):
    with opt.first_pass():
        loss = first()
    with opt.perturbed(loss=loss):
        first()
    opt.step()
    if val is not None:
        opt.radius_step(first, val)


SHAPES = {"closure": by_closure, "two-steps": by_two_steps, "context": by_context}


def replica(dtype=torch.float32, layers=None, **options):
    return DistributedDataParallel(net(dtype) if layers is None else layers, **options)
