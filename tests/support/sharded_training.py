"""One training: of a net that ranks share out among themselves, and of the same net in one process."""

import functools

import torch
from torch import nn

import lets_kernels as lk
from support.core_methods import BASES
from support.family import FAMILY, TUNED, draws
from support.moving_radii import auto, following


class Net(nn.Module):
    """Filters along either dimension, and sizes that four ranks cannot share evenly: 5 makes 2, 2, 1 and nothing."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.stem = nn.Conv2d(4, 5, 3, padding=1)
            self.up = nn.ConvTranspose2d(5, 3, 2)
            self.head = nn.Linear(75, 8)
            self.out = nn.Linear(8, 3)
        self.to(dtype)

    def forward(self, x):
        x = torch.tanh(self.up(torch.tanh(self.stem(x))))
        return self.out(torch.tanh(self.head(x.flatten(1))))


def freeze(net):
    net.stem.weight.requires_grad_(False)


def shard(net, **options):
    """Every layer but the last by itself; the last belongs to the root, which keeps it after a forward."""
    from torch.distributed.fsdp import fully_shard

    for layer in (net.stem, net.up, net.head):
        fully_shard(layer, **options)
    return fully_shard(net, **options)


def along_second(net):
    from torch.distributed.tensor import Shard

    shard(net, shard_placement_fn=lambda p: Shard(1) if p.dim() == 4 and p.shape[1] == 4 else None)


def offload(net):
    from torch.distributed.fsdp import CPUOffloadPolicy

    shard(net, offload_policy=CPUOffloadPolicy(pin_memory=False))


def in_bfloat16(net):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    shard(net, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))


def frozen(net):
    freeze(net)
    shard(net)


SHARDINGS = {
    "default": shard,
    "always": functools.partial(shard, reshard_after_forward=True),
    "kept": functools.partial(shard, reshard_after_forward=False),
    "set-to-keep": lambda net: shard(net).set_reshard_after_forward(False),
    "kept-after-backward": lambda net: shard(net).set_reshard_after_backward(False),
    "second-dimension": along_second,
    "offloaded": offload,
    "frozen": frozen,
    "mixed-precision": in_bfloat16,
}


def batch(rank, step, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1000 * rank + step)
    x = torch.randn(4, 4, 4, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    return x.to(dtype), y.to(dtype)


def joined(step, world, dtype=torch.float64):
    """The batches of all ranks as one; its mean loss is the mean of theirs."""
    xs, ys = zip(*(batch(rank, step, dtype) for rank in range(world)), strict=True)
    return torch.cat(xs), torch.cat(ys)


def learned(**options):
    return {"rho": lk.LearnedRadius(0.2, lr=0.05, **options)}


#: Method, and what makes its options (a learned radius belongs to one optimizer).
METHODS = {
    "sam": (lk.SAM, lambda: {"rho": 0.1}),
    "asam": (lk.ASAM, lambda: {"rho": 0.5}),
    "filterwise": (lk.ASAM, lambda: {"rho": 0.5, "filterwise": True}),
    "secant": (lk.LETSSAM, lambda: learned(curvature="secant")),
    "diagonal": (lk.LETSASAM, lambda: {**learned(), "filterwise": True}),
    "algorithm1": (lk.LETSASAM, lambda: learned(direction="algorithm1")),
    "reuse": (lk.LETSSAM, lambda: learned(curvature="secant", reuse_train_gradient=True)),
    "auto": (lk.SAM, lambda: {"rho": auto()}),
    "auto-filterwise": (lk.ASAM, lambda: {"rho": auto(), "filterwise": True}),
    "next": (lk.SAM, lambda: {"rho": following()}),
    "p-1": (lk.SAM, lambda: {"rho": 0.1, "direction": lk.Gradient(p=1.0)}),
    **{name: (member.cls, lambda own=member.options: {**own, "seed": 3}) for name, member in FAMILY.items()},
}
#: Methods that draw for each element: every part of a tensor has numbers of its own, so another sharding has others.
DRAWN = ("rgsam", "rsam", "rsam-std", "random-sam", "sparse-dynamic", "esam", "bsam", "bsam-code")
DRAWN += tuple(name for name in FAMILY if name not in TUNED and draws(name))
#: The other ones beside SAM, ASAM and LETS: the same steps however the weights are spread.
EVERYWHERE = ("p-1", "auto", "auto-filterwise", "next", *(name for name in FAMILY if name not in DRAWN))


def build(net, model=None, method="sam", base="momentum", **options):
    cls, make = METHODS[method]
    optimizer, _, base_options, _ = BASES[base]
    options = {"model": net if model is None else model, **make(), **options}
    if cls is lk.BSAM:
        return cls(net.parameters(), **options)
    return cls(net.parameters(), optimizer, **options, **base_options)


def train(opt, model, batches, steps=4, start=0, shape="closure", evaluate=False):
    """Steps in one of the three call shapes; ``evaluate`` runs forwards without a backward around each pass."""
    for step in range(start, start + steps):

        def closure(which=step):
            opt.zero_grad()
            x, y = batches(which)
            if evaluate:
                with torch.no_grad():
                    model(x)
            loss = (model(x) - y).square().mean()
            loss.backward()
            if evaluate:
                with torch.no_grad():
                    model(x)
            return loss

        def samples(subset=None, which=step):
            x, y = batches(which)
            x, y = (x, y) if subset is None else (x[subset], y[subset])
            outputs = model(x)
            losses = (outputs - y).square().mean(1)
            return (losses, outputs) if isinstance(opt.samples, (lk.WeightedSamples, lk.FunctionalSamples)) else losses

        if opt.samples.per_sample:
            opt.step(samples)
        elif shape == "closure":
            opt.step(closure, *([lambda: closure(step + 500)] if opt.radius.learns else []))
        elif shape == "steps":
            closure()
            opt.first_step(zero_grad=True)
            closure()
            opt.second_step()
        else:
            closure()
            with opt.perturbed():
                closure()
            opt.step()


def whole(opt):
    """The parameters, the base optimizer's state, what parts keep, the radius and the metrics, each in one piece."""

    def gather(t):
        return t.full_tensor() if hasattr(t, "full_tensor") else t

    params = [p for group in opt.param_groups for p in group["params"]]
    found = {f"weight {i}": gather(p).detach().clone() for i, p in enumerate(params)}
    for i, p in enumerate(params):
        own = {k.removeprefix("lets_kernels."): v for k, v in opt.state[p].items() if torch.is_tensor(v)}
        found |= {f"{k} {i}": gather(v).clone() for k, v in own.items()}
    found |= {f"schedule {k}": torch.tensor(v) for k, v in opt.schedule.state_dict().items()}
    metrics = {k: torch.as_tensor(v).double() for k, v in opt.metrics().items() if "loss" not in k}
    return {**found, "rho": opt.rho, **metrics}


def assert_close(found, expected, bound):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=bound, atol=bound, msg=lambda m: f"{name}: {m}")


def distance(found, expected):
    """The largest difference between two sets of weights."""
    return max(float((found[k] - expected[k]).abs().max()) for k in expected if k.startswith("weight"))
