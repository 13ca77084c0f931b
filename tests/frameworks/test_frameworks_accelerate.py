"""A loop under Accelerate takes the steps of the plain closure loop: equal to the bit."""

from functools import partial

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState

from support.closure_loop import OTHERS, bits, expected, made
from support.given_gradients import weights
from support.guard_bands import same_bits

BF16 = partial(torch.autocast, "cpu", torch.bfloat16)


@pytest.fixture
def accelerate():
    """Makes accelerators; their state is one for the process, and is forgotten before and after."""

    def make(**options):
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        return Accelerator(cpu=True, **options)

    yield make
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


class Loop:
    """A task's net, its optimizer and a scheduler in Accelerate's hands."""

    def __init__(self, accelerator, method, scheduled=False):
        self.accelerator = accelerator
        self.task, self.opt = made(method)
        schedule = torch.optim.lr_scheduler.StepLR(self.opt, 2, 0.5 if scheduled else 1.0)
        self.net, self.theirs, self.schedule = accelerator.prepare(self.task.net, self.opt, schedule)

    def closure(self, batches, clip=None):
        def run():
            self.theirs.zero_grad()
            total = torch.zeros(())
            for x, y in batches:
                loss = torch.nn.functional.cross_entropy(self.net(x), y) / len(batches)
                self.accelerator.backward(loss)
                total += loss.detach()
            if clip is not None:
                self.accelerator.clip_grad_norm_(self.net.parameters(), clip)
            return total

        return run

    def run(self, shape="closure", accumulate=1, clip=None):
        for start in range(0, len(self.task.batches), accumulate):
            train, val = zip(*self.task.batches[start : start + accumulate], strict=True)
            closure = self.closure(train, clip)
            if self.opt.radius.learns:
                self.opt.step(closure, self.closure(val, clip))
            elif shape == "closure":
                self.theirs.step(closure)
            else:
                closure()
                if shape == "context":
                    with self.opt.perturbed():
                        closure()
                else:
                    self.opt.first_step(zero_grad=True)
                    closure()
                self.theirs.step()
            self.schedule.step()
        return bits(self.task, self.opt)


SAME = [("sam", None), ("sam", 0.05), ("asam", None), ("rmsprop", None)]
SHAPES = ("closure", "context", "first-step")


@pytest.mark.parametrize(
    "method, clip, shape",
    [*((*pair, shape) for shape in SHAPES for pair in SAME), *((method, None, "closure") for method in OTHERS)],
)
def test_prepared_and_stepped_through_their_optimizer(accelerate, method, clip, shape):
    """`prepare` saves and loads the state at once. Its optimizer hands on `step`, with or without a closure."""
    loop = Loop(accelerate(), method)
    assert isinstance(loop.theirs, AcceleratedOptimizer)
    assert same_bits(loop.run(shape, clip=clip), expected(method, clip=clip)[0])


@pytest.mark.parametrize("method", ["sam", "lets"])
def test_gradients_accumulate_in_the_closure(accelerate, method):
    loop = Loop(accelerate(), method)
    assert same_bits(loop.run(accumulate=2), expected(method, accumulate=2)[0])


def test_bf16_is_the_closure_loop_under_autocast(accelerate):
    found = Loop(accelerate(mixed_precision="bf16"), "sam").run()
    wanted, _ = expected("sam", cast=BF16)
    assert same_bits(found, wanted) and not same_bits(wanted, expected("sam")[0])


def test_a_prepared_scheduler_drives_the_steps(accelerate):
    loop = Loop(accelerate(), "sam", scheduled=True)
    found = loop.run()
    task, opt = made("sam")
    for i, (batch, _) in enumerate(task.batches):
        opt.param_groups[0]["lr"] = 0.1 * 0.5 ** (i // 2)
        opt.step(task.closure(batch))
    assert loop.opt.param_groups[0]["lr"] == 0.0125
    assert same_bits(found, bits(task, opt))


@pytest.mark.parametrize("method", ["scheduled", "asam", "lets", *OTHERS])
def test_training_resumes_from_accelerates_checkpoint_to_the_bit(accelerate, method, tmp_path):
    """Also the learned radius, its optimizer and the counters."""
    accelerator = accelerate()
    Loop(accelerator, method).run()
    accelerator.save_state(tmp_path / "state")
    accelerator = accelerate()
    loop = Loop(accelerator, method)
    accelerator.load_state(tmp_path / "state")
    assert same_bits(loop.run(), expected(method, epochs=2)[0])


@pytest.mark.parametrize("begun", [False, True])
def test_a_closure_under_their_loss_scaler_is_refused(accelerate, begun):
    """fp16 needs a GPU there, so their optimizer is built by hand. No step is taken along scaled gradients."""
    accelerate()
    task, opt = made("sam")
    scaler = torch.amp.GradScaler("cpu")
    theirs = AcceleratedOptimizer(opt, device_placement=False, scaler=scaler)
    before = weights(task)

    def closure():
        loss = task.loss(task.batches[0][0])
        scaler.scale(loss).backward()
        return loss

    closure()
    if not begun:
        opt.zero_grad()
    with pytest.raises(RuntimeError, match=r"opt\.step\(closure, scaler=scaler\)"):
        theirs.step(closure)
    assert same_bits(weights(task), before)
