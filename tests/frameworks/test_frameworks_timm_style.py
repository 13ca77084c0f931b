"""A loop with timm's conventions takes the steps of the plain one: equal to the bit.

timm itself needs torchvision, of which there is no build for torch without CUDA. What it asks of an optimizer is
written out here: a callable that takes loss and optimizer, goes back, clips and steps; micro-batches of which only the
last updates; schedules that write into the groups; an average of the weights' state after every update.
"""

import copy
import io

import pytest
import torch

from support.closure_loop import bits, made
from support.guard_bands import same_bits

STEPS = 6


class LossScaler:
    """Backward; on the update also clip, step and look after the scale, which is off on the CPU."""

    def __init__(self):
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)

    def __call__(self, loss, optimizer, clip=None, mode="norm", parameters=None, create_graph=False, need_update=True):
        self.scaler.scale(loss).backward(create_graph=create_graph)
        if not need_update:
            return
        if clip is not None:
            self.scaler.unscale_(optimizer)
            clipping(parameters, clip, mode)
        self.scaler.step(optimizer)
        self.scaler.update()


def clipping(parameters, clip, mode):
    norm, value = torch.nn.utils.clip_grad_norm_, torch.nn.utils.clip_grad_value_
    (norm if mode == "norm" else value)(parameters, clip)


class Warmup:
    """Writes the learning rate into the groups, times their own factor, by the number of updates."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]

    def step_update(self, updates):
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * min(1.0, (1 + updates) / 4) * group.get("lr_scale", 1.0)


class Average:
    """The exponential average of everything in the net's state."""

    def __init__(self, net):
        self.module = copy.deepcopy(net)

    @torch.no_grad()
    def update(self, net):
        for mine, theirs in zip(self.module.state_dict().values(), net.state_dict().values(), strict=True):
            if mine.is_floating_point():
                mine.lerp_(theirs, 0.1)
            else:
                mine.copy_(theirs)


def epoch(task, opt, schedule, average, accumulate=1, **scaling):
    """Their epoch, with the micro-batches of an update gone through twice and `first_step` in between."""
    scale = LossScaler()
    second_order = getattr(opt, "is_second_order", False)
    opt.zero_grad()
    for updates, start in enumerate(range(0, len(task.batches), accumulate)):
        schedule.step_update(updates)
        chunk = [batch for batch, _ in task.batches[start : start + accumulate]]
        for last_pass in (False, True):
            for i, batch in enumerate(chunk):
                loss = task.loss(batch) / len(chunk)
                options = {"create_graph": second_order, "parameters": task.net.parameters(), **scaling}
                scale(loss, opt, need_update=last_pass and i + 1 == len(chunk), **options)
            if not last_pass:
                opt.first_step(zero_grad=True)
        opt.zero_grad()
        average.update(task.net)


def plain(task, opt, average, accumulate=1, clip=None, mode="norm"):
    """The same without their parts, in the context's shape."""
    for i, start in enumerate(range(0, len(task.batches), accumulate)):
        chunk = [batch for batch, _ in task.batches[start : start + accumulate]]
        for group, lr in zip(opt.param_groups, (0.1,), strict=True):
            group["lr"] = lr * min(1.0, (1 + i) / 4)

        def closure(chunk=chunk):
            opt.zero_grad()
            for batch in chunk:
                (task.loss(batch) / len(chunk)).backward()

        closure()
        with opt.perturbed():
            closure()
        if clip is not None:
            clipping(task.net.parameters(), clip, mode)
        opt.step()
        average.update(task.net)


def ends(loop, method="sam", **options):
    """Weights, buffers, state, radius and the averaged weights after one epoch of either loop."""
    task, opt = made(method, STEPS)
    average = Average(task.net)
    loop(task, opt, *([Warmup(opt)] if loop is epoch else []), average, **options)
    return [*bits(task, opt), *average.module.state_dict().values()]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("method", ["sam", "scheduled"])
def test_the_loop_takes_the_same_steps(method, accumulate):
    """The loop's own update is the second pass; schedules and averages see weights that are not perturbed."""
    assert same_bits(ends(epoch, method, accumulate=accumulate), ends(plain, method, accumulate=accumulate))


@pytest.mark.parametrize("mode, clip", [("norm", 0.05), ("value", 0.01)])
def test_clipping_acts_on_the_gradient_of_the_step(mode, clip):
    wanted = ends(plain, mode=mode, clip=clip)
    assert same_bits(ends(epoch, mode=mode, clip=clip), wanted)
    assert not same_bits(ends(plain), wanted)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_gradients_with_a_graph_give_the_same_step(monkeypatch):
    """A base optimizer of second order asks for them."""
    task, opt = made("sam", STEPS)
    opt.is_second_order = True
    average, seen = Average(task.net), []
    first_step = opt.first_step

    def looked_at(**options):
        seen.append(all(p.grad.requires_grad for p in task.net.parameters()))
        first_step(**options)

    monkeypatch.setattr(opt, "first_step", looked_at)
    epoch(task, opt, Warmup(opt), average)
    assert seen == [True] * STEPS
    assert same_bits([*bits(task, opt), *average.module.state_dict().values()], ends(plain))


def test_training_resumes_from_their_checkpoint_to_the_bit():
    """Net, optimizer, average in one file, read with torch's safe loader; the first epoch's warm-up starts again."""
    whole, halves = [], []
    for resumed, result in ((False, whole), (True, halves)):
        task, opt = made("scheduled", STEPS)
        average, schedule = Average(task.net), Warmup(opt)
        epoch(task, opt, schedule, average)
        if resumed:
            parts = {"state_dict": task.net, "optimizer": opt, "state_dict_ema": average.module}
            file = io.BytesIO()
            torch.save({name: part.state_dict() for name, part in parts.items()}, file)
            file.seek(0)
            task, opt = made("scheduled", STEPS)
            average, schedule = Average(task.net), Warmup(opt)
            parts = {"state_dict": task.net, "optimizer": opt, "state_dict_ema": average.module}
            for name, state in torch.load(file, weights_only=True).items():
                parts[name].load_state_dict(state)
        epoch(task, opt, schedule, average)
        result += [*bits(task, opt), *average.module.state_dict().values()]
    assert same_bits(whole, halves)
