"""Lightning's Trainer, and Fabric, take the steps of the plain closure loop: equal to the bit."""

import warnings
from functools import partial

import lightning.fabric
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

import lets_kernels as lk
from support.closure_loop import OTHERS, bits, closure_over, expected, made, plain
from support.given_gradients import weights
from support.guard_bands import same_bits

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
BF16 = partial(torch.autocast, "cpu", torch.bfloat16, cache_enabled=False)


def loader(items):
    return torch.utils.data.DataLoader(items, batch_size=None)


def trainer(**options):
    return pl.Trainer(accelerator="cpu", devices=1, **{**QUIET, "max_epochs": 1, **options})


class Automatic(pl.LightningModule):
    """Automatic optimisation of a task's net; keeps what `optimizer.step` returned."""

    def __init__(self, task, opt, scheduler=None):
        super().__init__()
        self.net, self.returned, self.passes = task.net, [], 0
        self.configured = lambda: {"optimizer": opt, **({"lr_scheduler": scheduler} if scheduler else {})}

    def configure_optimizers(self):
        return self.configured()

    def training_step(self, pair, index):
        self.passes += 1
        (x, y), _ = pair
        return torch.nn.functional.cross_entropy(self.net(x), y)

    def optimizer_step(self, epoch, index, optimizer, closure):
        self.returned.append(optimizer.step(closure=closure))


TWICE = [("sam", None), ("sam", 0.05), ("asam", None), ("rmsprop", 0.05)]


@pytest.mark.parametrize("method, clip", [*TWICE, *((method, None) for method in OTHERS)])
def test_automatic_optimisation_is_the_closure_loop(method, clip):
    """Two passes a step, both clipped; `step` returns the first loss, and Lightning counts one step."""
    task, opt = made(method)
    module, run = Automatic(task, opt), trainer(gradient_clip_val=clip)
    run.fit(module, loader(task.batches))
    wanted, losses = expected(method, clip=clip)
    assert same_bits(bits(task, opt), wanted)
    assert same_bits([x.detach() for x in module.returned], losses)
    assert module.passes == int(opt.metrics()["gradients"]) and run.global_step == 6
    assert module.passes == 12 or method in OTHERS
    assert (clip is None) or not same_bits(wanted, expected(method)[0])


@pytest.mark.parametrize("clip", [None, 0.05])
def test_bf16_mixed_is_the_closure_loop_under_autocast(clip):
    task, opt = made("sam")
    trainer(precision="bf16-mixed", gradient_clip_val=clip).fit(Automatic(task, opt), loader(task.batches))
    wanted, _ = expected("sam", cast=BF16, clip=clip)
    assert same_bits(bits(task, opt), wanted)
    assert not same_bits(wanted, expected("sam", clip=clip)[0])


@pytest.mark.parametrize("average", ["ema", "mean"])
def test_a_scheduler_and_averaged_weights(average):
    """Lightning ends with the average, and it is one of unperturbed weights; torch warns of no order of calls."""
    ema = average == "ema"
    task, opt = made("sam")
    callback = EMAWeightAveraging(decay=0.9) if ema else WeightAveraging()
    scheduler = {"scheduler": torch.optim.lr_scheduler.StepLR(opt, 2, 0.5), "interval": "step"}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lr_scheduler")
        trainer(callbacks=[callback]).fit(Automatic(task, opt, scheduler), loader(task.batches))

    other, by_hand = made("sam")
    averaged = AveragedModel(other.net, avg_fn=get_ema_avg_fn(0.9) if ema else None, use_buffers=True)
    schedule = torch.optim.lr_scheduler.StepLR(by_hand, 2, 0.5)
    plain(other, by_hand, other.batches, after=lambda: (averaged.update_parameters(other.net), schedule.step()))
    assert opt.param_groups[0]["lr"] == by_hand.param_groups[0]["lr"] == pytest.approx(0.0125)
    assert same_bits(weights(task), weights(averaged.module))
    assert not same_bits(weights(task), weights(other))


def test_a_batch_that_training_step_passes_over_takes_no_step():
    class Skipping(Automatic):
        def training_step(self, pair, index):
            return None if index == 2 else super().training_step(pair, index)

    task, opt = made("sam")
    trainer().fit(Skipping(task, opt), loader(task.batches))
    other, by_hand = made("sam")
    plain(other, by_hand, other.batches[:2] + other.batches[3:])
    assert same_bits(bits(task, opt), bits(other, by_hand))


class Manual(Automatic):
    """Manual optimisation in one of the call shapes, on the optimizer as Lightning hands it out."""

    def __init__(self, task, opt, shape="closure", accumulate=1):
        super().__init__(task, opt)
        self.automatic_optimization = False
        self.task, self.shape, self.accumulate, self.pairs = [task], shape, accumulate, []
        self.hooks = 0

    def on_before_optimizer_step(self, optimizer):
        self.hooks += 1

    def training_step(self, pair, index):
        self.pairs.append(pair)
        if len(self.pairs) < self.accumulate:
            return
        train, val = zip(*self.pairs, strict=True)
        self.pairs = []
        opt = self.optimizers()
        assert isinstance(opt, lk.SAM) and opt.param_groups is opt.optimizer.param_groups
        closure = closure_over(self.task[0], opt, train)
        if opt.radius.learns:
            opt.step(closure, val_closure=closure_over(self.task[0], opt, val))
        elif self.shape == "closure":
            opt.step(closure)
        elif self.shape == "context":
            closure()
            with opt.perturbed():
                closure()
            opt.step()
        else:
            closure()
            opt.first_step(zero_grad=True)
            closure()
            opt.step() if self.shape == "first-step" else opt.second_step()
        assert same_bits(opt.rho, opt.optimizer.rho) and opt.metrics().keys() == opt.optimizer.metrics().keys()


@pytest.mark.parametrize("shape", ["closure", "context", "first-step", "two-steps"])
def test_manual_optimisation_in_every_call_shape(shape):
    """On Lightning's own optimizer, whose `step()` counts and runs hooks; `second_step` it does not know."""
    task, opt = made("asam")
    run, module = trainer(), Manual(task, opt, shape)
    run.fit(module, loader(task.batches))
    assert same_bits(bits(task, opt), expected("asam")[0])
    assert opt.state_dict()["lets_kernels"]["step"] == 6 and "grad_norm" in opt.metrics()
    assert run.global_step == (0 if shape == "two-steps" else 6)
    assert module.hooks == {"closure": 12, "two-steps": 0}.get(shape, 6)


@pytest.mark.parametrize("method", ["sam", "lets"])
def test_manual_optimisation_accumulates_in_the_closure(method):
    task, opt = made(method)
    trainer().fit(Manual(task, opt, accumulate=2), loader(task.batches))
    assert same_bits(bits(task, opt), expected(method, accumulate=2)[0])


@pytest.mark.parametrize("method, kind", [("scheduled", Automatic), ("asam", Automatic), ("lets", Manual)])
def test_training_resumes_from_lightnings_checkpoint_to_the_bit(method, kind, tmp_path):
    """Also the learned radius, its optimizer and the counters; read with torch's safe loader."""
    task, opt = made(method)
    first = trainer(default_root_dir=tmp_path)
    first.fit(kind(task, opt), loader(task.batches))
    first.save_checkpoint(tmp_path / "last.ckpt")
    task, opt = made(method)
    rho = opt.rho.clone()
    again = trainer(default_root_dir=tmp_path, max_epochs=2)
    again.fit(kind(task, opt), loader(task.batches), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert again.global_step == 12
    assert same_bits(bits(task, opt), expected(method, epochs=2)[0])
    assert same_bits(opt.rho, rho) is (method == "asam")


def refused(module, task, match, **options):
    before = weights(task)
    with pytest.raises(RuntimeError, match=match):
        trainer(**options).fit(module, loader(task.batches))
    assert same_bits(weights(task), before)


def test_accumulation_under_automatic_optimisation_is_refused():
    """The second pass could not see the earlier batches again."""
    task, opt = made("sam")
    refused(Automatic(task, opt), task, "manual optimisation.*accumulate_grad_batches=1", accumulate_grad_batches=2)


class ManuallyScaled(Manual):
    def training_step(self, pair, index):
        def closure():
            loss = super(Manual, self).training_step(pair, index)
            self.manual_backward(loss)
            return loss

        self.optimizers().step(closure)


@pytest.mark.parametrize("kind", [Automatic, ManuallyScaled])
def test_16_mixed_is_refused(kind):
    """Its loss scaler calls the closure itself, once, and then `step()`: a step without a perturbation."""
    task, opt = made("sam")
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    refused(kind(task, opt), task, "bf16-mixed.*manual optimisation", plugins=[plugin])


@pytest.mark.parametrize("shape", ["closure", "context", "two-steps"])
@pytest.mark.parametrize("method", ["sam", "asam"])
def test_fabric_takes_the_same_steps(method, shape):
    task, opt = made(method)
    fabric = lightning.fabric.Fabric(accelerator="cpu", devices=1)
    net, theirs = fabric.setup(task.net, opt)
    assert isinstance(theirs, lk.SAM) and theirs is not opt
    for (x, y), _ in task.batches:

        def closure(x=x, y=y):
            theirs.zero_grad()
            loss = torch.nn.functional.cross_entropy(net(x), y)
            fabric.backward(loss)
            return loss

        if shape == "closure":
            theirs.step(closure)
            continue
        closure()
        if shape == "context":
            with theirs.perturbed():
                closure()
            theirs.step()
        else:
            theirs.first_step(zero_grad=True)
            closure()
            theirs.second_step(zero_grad=True)
    assert same_bits(bits(task, opt), expected(method)[0])
    assert opt.state_dict()["lets_kernels"]["step"] == 6


class Named:
    """A mixin in front of the optimizer."""


class Mixed(Named, lk.SAM):
    pass


class WithGetattr(lk.SAM):
    def __getattr__(self, name):
        raise AttributeError(name)


class Further(WithGetattr):
    pass


@pytest.mark.parametrize("kind", [Mixed, WithGetattr, Further])
def test_what_merely_inherits_from_the_optimizer_keeps_its_methods(kind):
    task, _ = made("sam")
    opt = kind(task.net.parameters(), torch.optim.SGD, rho=0.3, lr=0.1, momentum=0.9)
    plain(task, opt, task.batches)
    assert same_bits(bits(task, opt), expected("sam")[0])
