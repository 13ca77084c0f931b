"""How long an experiment would take: arithmetic that is counted, over a speed that is assumed."""

from collections.abc import Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from lets_kernels.experiment.campaign import Run
from lets_kernels.experiment.methods import method
from lets_kernels.experiment.recipes import Recipe
from lets_kernels.experiment.task import Task

#: Tera floating point operations a second that a GPU is assumed to reach in training: ours, not measured.
SPEED = 50.0
#: A gradient is a forward pass and a backward pass of twice its arithmetic.
PASSES = 3


def gradient(task: Task, tokens: int = 0) -> float:
    """Floating point operations of one sample's gradient, counted by torch in a forward pass of one sample.

    Of a text with so many tokens, in proportion to those of the sample: attention is a small part of it.
    """
    batch = task.test.batch([0], None)
    with torch.random.fork_rng(), FlopCounterMode(display=False) as counter, torch.no_grad():
        task.loss(task.network().eval(), batch)
    longer = tokens / batch.inputs[0].shape[1] if tokens else 1.0
    return PASSES * longer * counter.get_total_flops()


def hours(recipe: Recipe, runs: Sequence[Run], per_gradient: float, speed: float) -> float:
    """Of these runs of a recipe, one after another, without loading and testing."""
    gradients = sum(method(run.method).gradients for run in runs if run.recipe is recipe)
    return gradients * recipe.epochs * recipe.data.samples * per_gradient / (speed * 1e12) / 3600
