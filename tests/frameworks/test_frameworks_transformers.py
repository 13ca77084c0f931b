"""Hugging Face's Trainer, with two passes in `training_step`, takes the steps of the plain loop: equal to the bit."""

import os
from contextlib import nullcontext
from functools import partial

os.environ["HF_HUB_OFFLINE"] = "1"  # before the import, which reads it

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
)

from support.closure_loop import METHODS
from support.given_gradients import snapshot
from support.guard_bands import same_bits

BATCH, BATCHES = 4, 6
BF16 = partial(torch.autocast, "cpu", torch.bfloat16)
CLIP = 0.5


@pytest.fixture(autouse=True)
def alone():
    """Accelerate's state, which Trainer makes, is one for the process."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def made(method):
    """A tiny BERT from its configuration, without dropout, and the optimizer on it."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForSequenceClassification(config)
    return model, METHODS[method](model.parameters())


def examples(seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(20, (BATCH * BATCHES, 6), generator=generator)
    return [{"input_ids": x, "labels": x.sum() % 3} for x in ids]


def batches(seed):
    items = [examples(seed)[i : i + BATCH] for i in range(0, BATCH * BATCHES, BATCH)]
    return [{key: torch.stack([example[key] for example in item]) for key in item[0]} for item in items]


def mean_loss(outputs, labels, num_items_in_batch):
    return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


def gradient(model, inputs, cast=nullcontext, accumulate=1):
    with cast():
        loss = mean_loss(model(inputs["input_ids"]), inputs["labels"], accumulate * BATCH)
    loss.backward()
    return loss.detach()


class TwoPasses(Trainer):
    """Perturbs in `training_step`, once all batches of the step have been seen; Trainer clips and steps."""

    seen = ()

    def training_step(self, model, inputs, num_items_in_batch=None):
        take = partial(super().training_step, model, num_items_in_batch=num_items_in_batch)
        loss = take(inputs)
        self.seen = [*self.seen, inputs]
        if self.accelerator.sync_gradients:
            opt = self.optimizer.optimizer
            with opt.perturbed():
                opt.zero_grad()
                for batch in self.seen:
                    take(batch)
            self.seen = ()
        return loss


class Learn(TrainerCallback):
    """LETS: the radius learns right after the step."""

    def __init__(self):
        self.pairs = iter(list(zip(batches(0), batches(1), strict=True)) * 2)

    def on_optimizer_step(self, args, state, control, model, optimizer, **_):
        learn(model, optimizer.optimizer, *next(self.pairs))


def learn(model, opt, train, val):
    def closure(inputs):
        opt.zero_grad()
        return gradient(model, inputs)

    opt.radius_step(lambda: closure(train), lambda: closure(val))


def trained(model, opt, folder, resume=None, **options):
    given = {"num_train_epochs": 1, "max_grad_norm": CLIP, "lr_scheduler_type": "linear", "save_strategy": "no"}
    args = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        per_device_train_batch_size=BATCH,
        train_sampling_strategy="sequential",
        report_to="none",
        disable_tqdm=True,
        **{**given, **options},
    )
    callbacks = [Learn()] if opt.radius.learns else []
    trainer = TwoPasses(
        model,
        args,
        train_dataset=examples(0),
        optimizers=(opt, None),
        callbacks=callbacks,
        compute_loss_func=mean_loss,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def plain(method, epochs=1, accumulate=1, clip=CLIP, cast=nullcontext, learned=False):
    """Forward, backward, perturb, forward, backward, clip, step: what Trainer is to come to."""
    model, opt = made(method)
    steps = epochs * BATCHES // accumulate
    scheduler = get_scheduler("linear", opt, num_warmup_steps=0, num_training_steps=steps)
    pairs = list(zip(batches(0), batches(1), strict=True)) * epochs
    for start in range(0, len(pairs), accumulate):
        chunk = pairs[start : start + accumulate]
        opt.zero_grad()
        for inputs, _ in chunk:
            gradient(model, inputs, cast, accumulate)
        opt.first_step(zero_grad=True)
        for inputs, _ in chunk:
            gradient(model, inputs, cast, accumulate)
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.second_step()
        if learned:
            learn(model, opt, *chunk[0])
        scheduler.step()
    return snapshot(opt)


@pytest.mark.parametrize("method", ["sam", "asam", "rmsprop"])
def test_trainer_clips_and_steps(method, tmp_path):
    """The learning rate falls to zero under Trainer's schedule; the clipping acts on the gradient of the step."""
    model, opt = made(method)
    trainer = trained(model, opt, tmp_path)
    assert trainer.state.global_step == 6 and opt.param_groups[0]["lr"] == 0
    assert same_bits(snapshot(opt), plain(method))
    assert not same_bits(snapshot(opt), plain(method, clip=None))


def test_gradients_accumulate_over_both_passes(tmp_path):
    model, opt = made("sam")
    trainer = trained(model, opt, tmp_path, gradient_accumulation_steps=2)
    assert trainer.state.global_step == 3
    assert same_bits(snapshot(opt), plain("sam", accumulate=2))


def test_bf16_is_the_plain_loop_under_autocast(tmp_path):
    model, opt = made("sam")
    trained(model, opt, tmp_path, bf16=True)
    assert same_bits(snapshot(opt), plain("sam", cast=BF16))
    assert not same_bits(snapshot(opt), plain("sam"))


@pytest.mark.parametrize("method", ["scheduled", "lets"])
def test_training_resumes_from_trainers_checkpoint_to_the_bit(method, tmp_path):
    """Also the learned radius and its optimizer, and the step that a schedule of the radius has come to."""
    learned = method == "lets"
    clip = None if learned else CLIP  # a clipped second gradient is none that a secant could be taken from
    options = {"max_grad_norm": clip or 0.0, "save_strategy": "epoch", "num_train_epochs": 2}
    model, opt = made(method)
    trained(model, opt, tmp_path, **options)
    model, opt = made(method)
    trainer = trained(model, opt, tmp_path, resume=str(tmp_path / "checkpoint-6"), **options)
    assert trainer.state.global_step == 12
    assert same_bits(snapshot(opt), plain(method, epochs=2, clip=clip, learned=learned))
