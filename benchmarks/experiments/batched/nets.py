"""MLPs trained at once, each with its weights and its radius: all seeds, and in each all rules on the same batches."""

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.experiments.batched.rules import Rule
from benchmarks.experiments.batched.tasks import Task, load

XI = 0.01  # of ASAM's T = |θ| + ξ: the package's default


def initial(sizes: Sequence[int], seeds: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    """Weights [seeds, in, out] and biases [seeds, 1, out], layer by layer, uniform as nn.Linear's."""
    found = []
    for layer, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        generators = [torch.Generator().manual_seed(77 * seed + layer) for seed in seeds]
        for rows in (inputs, 1):  # the bias is drawn after the weights
            drawn = [torch.rand(rows, outputs, generator=generator) for generator in generators]
            found.append((2 * torch.stack(drawn) - 1).to(dtype) / math.sqrt(inputs))
    return found


def outputs(parameters: Sequence[Tensor], inputs: Tensor) -> Tensor:
    """Logits [runs, n, classes] of inputs [runs, n, d]."""
    for weight, bias in zip(parameters[:-2:2], parameters[1:-2:2], strict=True):
        inputs = torch.baddbmm(bias, inputs, weight).relu()
    return torch.baddbmm(parameters[-1], inputs, parameters[-2])


def gradients(parameters: Sequence[Tensor], inputs: Tensor, labels: Tensor, scale: float = 1.0) -> tuple[Tensor, ...]:
    """Those of ``scale`` times each run's mean cross-entropy."""
    leaves = [p.detach().requires_grad_() for p in parameters]
    losses = cross_entropy(outputs(leaves, inputs).transpose(1, 2), labels, reduction="none").mean(1)
    return torch.autograd.grad(scale * losses.sum(), leaves)


def dots(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Run by run, float64 [runs]."""
    return torch.stack([(x * y).flatten(1).sum(1, dtype=torch.float64) for x, y in zip(a, b, strict=True)]).sum(0)


def batches(n: int, size: int, seed: int) -> Iterator[np.ndarray]:
    """Indices: one order after the other, of each as many whole batches as there are."""
    draw = np.random.default_rng(seed + 999)
    while True:
        order = draw.permutation(n)
        yield from (order[at : at + size] for at in range(0, n - size + 1, size))


def train(
    task: Task,
    seeds: Sequence[int],
    rules: Sequence[Rule],
    adaptive: bool = False,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[Tensor], Tensor]:
    """SAM, or ASAM if ``adaptive``, of the loss times ``scale``; the base optimizer gets the gradient without it.

    Returns:
        The parameters [seeds * rules, ...], a seed's rules side by side; test accuracies in per cent [seeds, rules].
    """
    copies, seed_of = len(rules), torch.arange(len(seeds))[:, None]
    data = zip(*(vars(load(task, seed)).values() for seed in seeds), strict=True)
    train_inputs, train_labels, test_inputs, test_labels = map(torch.stack, data)
    train_inputs, test_inputs = train_inputs.to(dtype), test_inputs.to(dtype)
    n, width = train_inputs.shape[1:]
    sizes = (width, *task.hidden, int(train_labels.max()) + 1)
    parameters = [p.repeat_interleave(copies, 0) for p in initial(sizes, seeds, dtype)]
    base = _base(task, parameters)
    for rule in rules:
        rule.begin(len(seeds), task.steps)
    orders = zip(*(batches(n, task.batch_size, seed) for seed in seeds), strict=True)
    before = [p.clone() for p in parameters]
    for step in range(task.steps):
        lr = base.param_groups[0]["lr"] = task.lr * 0.5 * (1 + math.cos(math.pi * step / task.steps))
        chosen = torch.from_numpy(np.stack(next(orders)))
        inputs = train_inputs[seed_of, chosen].repeat_interleave(copies, 0)
        labels = train_labels[seed_of, chosen].repeat_interleave(copies, 0)

        first = gradients(parameters, inputs, labels, scale)
        moved = [p - b for p, b in zip(parameters, before, strict=True)]
        before = [p.clone() for p in parameters]
        rho = torch.stack([rule.rho(step) for rule in rules], 1).flatten()
        perturbed = _perturbed(parameters, first, rho, adaptive)
        second = gradients(perturbed, inputs, labels, scale)

        pairs = ((second, second), (first, second), (first, first), (first, moved), (moved, moved))
        products = torch.stack([dots(*pair) for pair in pairs], 1).view(len(seeds), copies, len(pairs))
        for rule, own in zip(rules, products.unbind(1), strict=True):
            rule.compare(own, lr)
        for p, g in zip(parameters, second, strict=True):
            p.grad = g / scale
        base.step()
    logits = outputs(parameters, test_inputs.repeat_interleave(copies, 0))
    right = logits.argmax(2) == test_labels.repeat_interleave(copies, 0)
    return parameters, 100 * right.double().mean(1).view(len(seeds), copies)


def _base(task: Task, parameters: list[Tensor]) -> torch.optim.Optimizer:
    """Element by element, so that one over all runs is one for each."""
    if task.base == "adamw":
        return torch.optim.AdamW(parameters, lr=task.lr, weight_decay=0.01)
    return torch.optim.SGD(parameters, lr=task.lr, momentum=task.momentum, weight_decay=5e-4)


def _perturbed(parameters: Sequence[Tensor], first: Sequence[Tensor], rho: Tensor, adaptive: bool) -> list[Tensor]:
    """θ + ρ T²g/‖Tg‖, T = 1 or |θ| + ξ; θ where the gradient vanishes."""
    T = [p.abs() + XI if adaptive else torch.ones((), dtype=p.dtype) for p in parameters]
    scaled = [t * g for t, g in zip(T, first, strict=True)]
    norm = dots(scaled, scaled).sqrt()
    factor = torch.where(norm > 0, rho / norm, 0.0).to(parameters[0].dtype)[:, None, None]
    return [torch.addcmul(p, factor * t, s) for p, t, s in zip(parameters, T, scaled, strict=True)]
