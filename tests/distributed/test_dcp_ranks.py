"""Checkpoints of two ranks over gloo: resumed by two ranks to the bit, and by one process as the joined run goes on."""

import copy
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lets_kernels as lk
from lets_kernels.space.shards import local
from lets_kernels.step.carried import numbers
from lets_kernels.step.saving import own_state
from support.family import FAMILY
from support.guard_bands import same_bits
from support.inside import progress, work
from support.moving_radii import auto
from support.preloaded import in_processes

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
STEPS = 3
METHODS = {
    "sam": lambda rho: (lk.SAM, {"rho": rho}),
    "asam": lambda rho: (lk.ASAM, {"rho": rho}),
    "lets-sam": lambda rho: (lk.LETSSAM, {"rho": lk.LearnedRadius(rho, curvature="secant", lr=0.05)}),
    "auto": lambda rho: (lk.SAM, {"rho": auto(rho)}),
    **{name: lambda rho, m=member: (m.cls, {**m.options, "rho": rho}) for name, member in FAMILY.items()},
}
BASES = {
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {"lr": 0.02}),
}
CASES = [
    ("fsdp", "sam", "momentum", False),
    ("fsdp", "asam", "adamw", False),
    ("fsdp", "lets-sam", "momentum", False),
    ("fsdp", "lets-sam", "adamw", False),
    ("fsdp", "lets-sam", "adamw", True),
    ("ddp", "lets-sam", "momentum", False),
    ("fsdp", "auto", "momentum", False),
    ("ddp", "asam", "adamw", True),
    ("fsdp", "friendly", "adamw", False),
    ("fsdp", "aelooksam", "momentum", False),
    ("fsdp", "sparse-interval", "adamw", True),
    ("fsdp", "sparse-dynamic", "momentum", False),
    ("fsdp", "bsam", "momentum", False),
    ("fsdp", "rst", "adamw", True),
    ("ddp", "looksam", "momentum", True),
    ("ddp", "sparse-dynamic", "adamw", False),
    ("ddp", "rsam", "momentum", False),
]
#: Of what is drawn for single elements, the parts of a tensor have numbers that the whole has not.
OTHERWISE = [case for case in CASES if case[0] == "fsdp" and case[1] in ("sparse-dynamic", "bsam")]
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
TAKEN = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def batch(rank, step):
    generator = torch.Generator().manual_seed(100 * rank + step)
    draw = (torch.randn(8, n, generator=generator, dtype=torch.float64) for n in (6, 2))
    return tuple(draw)


def joined(step):
    return tuple(map(torch.cat, zip(batch(0, step), batch(1, step), strict=True)))


def build(kind, method, base, seed, rho):
    """The net, with rows that two ranks cannot halve; as the ranks run it; and its optimizer."""
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.Tanh(), torch.nn.Linear(7, 2)).double()
    if kind == "fsdp":
        for layer in (net[0], net[2]):
            fully_shard(layer)
        fully_shard(net)
    model = DistributedDataParallel(net) if kind == "ddp" else net
    torch.manual_seed(seed + 100 * (dist.get_rank() if dist.is_initialized() else 2))  # from which each draws a seed
    cls, own = METHODS[method](rho)
    optimizer, options = BASES[base]
    if cls is lk.BSAM:
        return model, cls(model.parameters(), model=model, **own)
    return model, cls(model.parameters(), optimizer, model=model, **own, **options)


def train(model, opt, batches, start):
    for step in range(start, start + STEPS):

        def closure(which):
            def run():
                opt.zero_grad()
                x, y = batches(which)
                loss = (model(x) - y).square().mean()
                loss.backward()
                return loss

            return run

        opt.step(closure(step), *([closure(step + 50)] if opt.radius.learns else []))


def everything(model, opt):
    """Weights, state, radius and counts by name: whole on the first rank, and what each holds of the weights."""
    weights, optim = get_state_dict(model, opt, options=FULL)
    found = {**weights, "rho": opt.rho, "step": torch.tensor(progress(opt).step)}
    own = numbers(own_state(work(opt)))
    found.update({f"own {name}": torch.as_tensor(value) for name, value in own.items()})
    for name, entry in optim.get("state", {}).items():
        found.update({f"{name} {key}": value for key, value in entry.items()})
    for name, p in model.named_parameters() if dist.is_initialized() else ():
        found[f"part of {name}"] = local(p)
    return {name: value.detach().clone() for name, value in found.items()}


def place(folder, case):
    return f"{folder}/{'-'.join(map(str, case))}"


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=90)
    )
    try:
        for case in CASES:
            kind, method, base, flat = case
            options = StateDictOptions(flatten_optimizer_state_dict=flat)
            path = place(folder, case)
            model, opt = build(kind, method, base, 5, 0.1)
            train(model, opt, lambda step: batch(rank, step), 0)
            saved = get_state_dict(model, opt, options=options)
            dcp.save(dict(zip(("model", "optim"), saved, strict=True)), checkpoint_id=path)
            full = copy.deepcopy(get_state_dict(model, opt, options=FULL))
            rho, stored = opt.rho, everything(model, opt)
            train(model, opt, lambda step: batch(rank, step), STEPS)
            ends = [everything(model, opt)]

            other, resumed = build(kind, method, base, 9, 0.7)
            state = dict(zip(("model", "optim"), get_state_dict(other, resumed, options=options), strict=True))
            dcp.load(state, checkpoint_id=path)
            set_state_dict(
                other, resumed, model_state_dict=state["model"], optim_state_dict=state["optim"], options=options
            )
            train(other, resumed, lambda step: batch(rank, step), STEPS)
            ends.append(everything(other, resumed))

            other, resumed = build(kind, method, base, 11, 0.6)
            set_model_state_dict(other, full[0], options=TAKEN)
            set_optimizer_state_dict(other, resumed, full[1], options=TAKEN)
            train(other, resumed, lambda step: batch(rank, step), STEPS)
            ends.append(everything(other, resumed))
            torch.save((rho, stored, ends), f"{path}/ends-{rank}")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The folder of the checkpoints and of what both ranks found; all cases in one pair of processes."""
    folder = tmp_path_factory.mktemp("ranks")
    in_processes(worker, (str(folder),), 2)
    return folder


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_two_ranks_resume_to_the_bit(ranks, case):
    """From the sharded checkpoint, and from the first rank's full state, sent to both."""
    for rank in (0, 1):
        *_, (whole, resumed, sent) = torch.load(f"{place(ranks, case)}/ends-{rank}", weights_only=True)
        assert whole.keys() == resumed.keys() == sent.keys() and int(whole["step"]) == 2 * STEPS
        for name, value in whole.items():
            assert same_bits(value, resumed[name]), name
            assert same_bits(value, sent[name]), name


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_one_process_goes_on_from_the_checkpoint_of_two_ranks(ranks, case):
    _, method, base, flat = case
    rho, stored, (whole, *_) = torch.load(f"{place(ranks, case)}/ends-0", weights_only=True)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, opt = build("alone", method, base, 9, 0.7)
    state = dict(zip(("model", "optim"), get_state_dict(model, opt, options=options), strict=True))
    dcp.load(state, checkpoint_id=place(ranks, case))
    set_state_dict(model, opt, model_state_dict=state["model"], optim_state_dict=state["optim"], options=options)
    assert same_bits(opt.rho, rho)
    for name, value in everything(model, opt).items():
        assert same_bits(value, stored[name]), name
    if case in OTHERWISE:
        return
    train(model, opt, joined, STEPS)
    found = everything(model, opt)
    assert found.keys() == {name for name in whole if not name.startswith("part of ")}
    for name, value in found.items():  # halves that are averaged, in float64: rounding alone, far below 1e-6
        torch.testing.assert_close(value, whole[name], rtol=1e-6, atol=1e-9, msg=name)
    assert (float(opt.rho) != float(rho)) is opt.radius.moves
