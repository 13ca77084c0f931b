"""What two ranks do with sharded parameters beside taking steps; each case returns what test_fsdp.py looks at."""

import io

import torch
from torch import nn

import lets_kernels as lk
from support.sharded_training import SHARDINGS, Net, batch, build, train, whole

#: Methods that keep tensors, draw numbers or begin beside the weights.
KEEPING = ("friendly", "sparse-dynamic", "bsam", "rsam", "aelooksam")


def of_rank(rank):
    return lambda step: batch(rank, step)


def default(**options):
    net = Net()
    SHARDINGS["default"](net)
    return net, build(net, **options)


def not_finite(rank):
    """An infinite gradient on the second rank, in either pass of the third step."""
    found = {}
    for method, base in (("sam", "adamw"), ("sam", "rmsprop"), *((method, "momentum") for method in KEEPING)):
        for spoiled in (0, 1):
            options = {"lambda1": -1e6, "lambda2": -1e6} if method == "aelooksam" else {}  # every step perturbs
            net, opt = default(method=method, base=base, **options)
            train(opt, net, of_rank(rank), steps=2)
            before, calls = whole(opt), []

            def closure():
                opt.zero_grad()
                x, y = batch(rank, 2)
                loss = (net(x) - y).square().mean()
                loss.backward()
                if rank == 1 and len(calls) == spoiled:
                    first = opt.param_groups[0]["params"][0]
                    first.grad.to_local().view(-1)[0] = torch.inf
                calls.append(1)
                return loss

            opt.step(closure)
            found[method, base, spoiled] = before, whole(opt)
    return found


def restored(rank):
    """The weights before a step, inside of it, and after both; at the start of the first pass too, if there is one."""
    found = {}
    for method in ("filterwise", *KEEPING[:-1]):
        net, opt = default(method=method)
        train(opt, net, of_rank(rank), steps=1)
        before, places = of_weights(opt), []
        x, y = batch(rank, 1)
        opt.zero_grad()
        with opt.first_pass():
            if opt.direction.starts:
                places.append(of_weights(opt))
            (net(x) - y).square().mean().backward()
        between = of_weights(opt)
        with opt.perturbed():
            places.append(of_weights(opt))
            (net(x) - y).square().mean().backward()
        found[method] = before, places, between, of_weights(opt)
    return found


def of_weights(opt):
    return {name: value for name, value in whole(opt).items() if name.startswith("weight")}


def round_trip(rank):
    found = {}
    for method, base in (("reuse", "adamw"), *((method, "momentum") for method in KEEPING)):
        net, opt = default(method=method, base=base)
        train(opt, net, of_rank(rank), steps=3)
        stored = io.BytesIO()
        torch.save({"net": net.state_dict(), "opt": opt.state_dict()}, stored)
        train(opt, net, of_rank(rank), steps=3, start=3)

        stored.seek(0)
        state = torch.load(stored, weights_only=True)
        other, resumed = default(method=method, base=base)
        other.load_state_dict(state["net"])
        resumed.load_state_dict(state["opt"])
        train(resumed, other, of_rank(rank), steps=3, start=3)
        found[method] = whole(opt), whole(resumed)
    return found


def mask_of_samples(rank):
    """The Fisher mask by samples of both ranks, and a step with it."""
    net, opt = default(method="sparse")
    steps = iter(range(100, 104))

    def closure():
        opt.zero_grad()
        x, y = batch(rank, next(steps))
        (net(x) - y).square().mean().backward()

    opt.update_mask(closure, samples=4)
    train(opt, net, of_rank(rank), steps=1)
    return whole(opt)


def cut_short(rank):
    """An exception in the layer before the last, when the second pass gets there; then a step like any other."""
    from torch.distributed.fsdp import FSDPModule

    found, reset = {}, FSDPModule.reset_iter_state
    for how in ("reset", "no-reset-in-torch"):
        for sharding in ("default", "kept", "kept-after-backward"):
            net, calls = Net(), []
            SHARDINGS[sharding](net)
            opt = build(net)
            x, y = batch(rank, 0)
            with torch.no_grad():
                before = net(x)

            def closure():
                opt.zero_grad()
                calls.append(1)
                hook = net.head.register_forward_hook(fail) if len(calls) == 2 else None
                try:
                    loss = (net(x) - y).square().mean()
                finally:
                    if hook is not None:
                        hook.remove()
                loss.backward()
                return loss

            if how == "no-reset-in-torch":
                del FSDPModule.reset_iter_state
            try:
                opt.step(closure)
                raise AssertionError("the step went on after the exception")
            except KeyError:
                pass
            finally:
                FSDPModule.reset_iter_state = reset
            with torch.no_grad():
                after = net(x)
            train(opt, net, of_rank(rank), steps=1)
            fresh = Net()
            SHARDINGS[sharding](fresh)
            expected = build(fresh)
            train(expected, fresh, of_rank(rank), steps=1)
            found[sharding, how] = before, after, whole(opt), whole(expected)
    return found


def fail(*_):
    raise KeyError("on purpose")


def added_in_place(rank):
    """The caller's backward adds to gradients that were zeroed in place, the closure does the second pass."""
    net, opt = default()
    calls = []
    for step in range(3):
        x, y = batch(rank, step)

        def backward():
            (net(x) - y).square().mean().backward()

        def closure():
            calls.append(1)
            backward()

        backward()
        opt.step(closure)
        opt.zero_grad(set_to_none=False)
    other, expected = default()
    train(expected, other, of_rank(rank), steps=3)
    weights, wanted = ({k: v for k, v in whole(o).items() if "loss" not in k} for o in (opt, expected))
    return len(calls), weights, wanted


def refused(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor, Partial

    net = Net()
    SHARDINGS["default"](net)
    params = list(net.parameters())
    before = [p.to_local().clone() for p in params]
    first_version = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # which wants an accelerator
    nn.Module.__init__(first_version)
    mesh = init_device_mesh("cpu", (2,))
    sums = nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Partial()]))
    attempts = {
        "unsynchronised": lambda: step(build(net, sync_perturbation=False)),
        "flattened": lambda: step(build(net, flatten=True)),
        "first version": lambda: step(build(net, model=first_version)),
        "no model": lambda: step(lk.SAM(params, torch.optim.SGD, lr=0.1)),
        "partial sum": lambda: lk.SAM([sums], torch.optim.SGD, lr=0.1),
        "no first pass": lambda: alone(build(net)),
    }

    def backward():
        x, y = batch(rank, 0)
        loss = (net(x) - y).square().mean()
        loss.backward()
        return loss

    def step(opt):
        opt.step(backward)

    def alone(opt):
        backward()
        opt.step()

    found = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            found[name] = None, "", False
        except Exception as e:
            untouched = all(map(torch.equal, before, [p.to_local() for p in params]))
            found[name] = type(e).__name__, str(e), untouched
        net.zero_grad()
    return found


CASES = (not_finite, restored, round_trip, mask_of_samples, cut_short, added_in_place, refused)
