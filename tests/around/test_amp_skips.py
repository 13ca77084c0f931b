"""Loss scaling on steps that the schedule does not perturb: gradients are unscaled once, second pass or none."""

import pytest
import torch

import lets_kernels as lk
from support.conv_net import Task
from support.guard_bands import same_bits

SHAPES = {
    "context": ("context", False),
    "two-steps": ("two-steps", False),
    "two-steps-zeroed": ("two-steps", True),
}
METHODS = {
    "looksam": lambda params, **k: lk.LookSAM(params, torch.optim.SGD, 0.1, k=2, lr=0.1, momentum=0.9, **k),
    "rst": lambda params, **k: lk.RST(params, torch.optim.AdamW, 0.1, p=0.5, seed=1, lr=0.02, **k),
}


def run(method, shape, scale, second, clips=False):
    """Six steps; ``second``: whether the second pass is made where it is not needed."""
    kind, zero_grad = SHAPES[shape]
    task = Task(torch.float32, steps=6)
    opt = METHODS[method](task.net.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1)
    needed = []

    def backward(batch):
        opt.zero_grad()
        inputs, targets = batch
        scaler.scale(torch.nn.functional.cross_entropy(task.net(inputs), targets)).backward()

    for batch, _ in task.batches:
        backward(batch)
        if scale != 1:
            opt.unscale_first(scaler)
        if kind == "context":
            with opt.perturbed() as wanted:
                if wanted or second:
                    backward(batch)
        else:
            wanted = opt.first_step(zero_grad=zero_grad)
            if wanted or second:
                backward(batch)
        needed.append(wanted)
        if clips and (wanted or second):
            if scale != 1:
                scaler.unscale_(opt)
            torch.nn.utils.clip_grad_norm_(task.net.parameters(), 0.05)
        scaler.step(opt)
        scaler.update()
    assert len(set(needed)) == 2  # some steps perturb, some do not
    passes = 12 if second else 6 + sum(needed)
    assert int(opt.metrics()["gradients"]) == passes and int(opt.metrics()["skipped_steps"]) == 0
    return [p.detach().clone() for p in task.net.parameters()]


@pytest.mark.parametrize("second", [True, False], ids=["second-pass", "no-second-pass"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_a_scale_that_is_a_power_of_two_changes_no_bit(method, shape, second):
    assert same_bits(run(method, shape, 1024.0, second), run(method, shape, 1, second))
    assert same_bits(run(method, shape, 1, second), run(method, shape, 1, not second))


@pytest.mark.parametrize("shape", SHAPES)
def test_nor_does_it_with_clipping_in_between(shape):
    assert same_bits(run("looksam", shape, 1024.0, True, clips=True), run("looksam", shape, 1, True, clips=True))
