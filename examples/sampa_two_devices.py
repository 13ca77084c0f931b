"""SAMPa with its two passes at once, on two devices: a step takes the time of one gradient and of sending it.

Xie, Pethick & Cevher, NeurIPS 2024: what both passes of a step need is known at its beginning. Rank 0 makes the first
pass, on the new batch ahead of the weights; rank 1 the second, on the batch of the step before at the perturbed
weights; they send each other their gradients, and both take the same step. One process makes the same steps, one
gradient after the other. With a network and batches as small as here, sending takes longer than a gradient; the README
beside this file has times.

    torchrun --nproc-per-node 2 examples/sampa_two_devices.py    # two GPUs, or two processes on the CPU

``asynchronous_step`` is asynchronous SAM (Jo, Lim & Lee, 2025) in the same form.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lets_kernels import SAM, SAMPa

Batch = tuple[Tensor, Tensor]
RHO, STEPS, BATCH = 0.1, 300, 64


@contextmanager
def at_perturbed(optimizer: SAMPa) -> Iterator[None]:
    """The weights at θ + ρ a/‖a‖, where a is the first gradient of the step before; exactly back afterwards.

    The optimizer's own perturbation waits for the other rank's gradient; this one knows all that it needs.
    """
    params = [(p, group["rho"]) for group in optimizer.param_groups for p in group["params"]]
    ahead = [optimizer.state[p].get("lets_kernels.ahead") for p, _ in params]
    before = [p.detach().clone() for p, _ in params]
    with torch.no_grad():
        if ahead[0] is not None:  # none before the first step
            norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(a) for a in ahead]))
            for (p, rho), a in zip(params, ahead, strict=True):
                p.add_(a * torch.where(norm > 0, rho / norm, 0.0))
    try:
        yield
    finally:
        with torch.no_grad():
            for (p, _), x in zip(params, before, strict=True):
                p.copy_(x)


def step_of_two(optimizer: SAMPa, loss: Callable[[Batch], Tensor], new: Batch, old: Batch) -> None:
    """One step by two ranks: rank 0 makes the first pass, on ``new``, and rank 1 the second, on ``old``.

    Both passes must reach the same parameters; the others are left as they are.
    """
    optimizer.zero_grad()
    if dist.get_rank() == 1:
        with at_perturbed(optimizer):
            loss(old).backward()
    with optimizer.first_pass():
        if dist.get_rank() == 0:
            loss(new).backward()
        reached = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        first, second = exchanged(reached)
        give(reached, first)
    optimizer.first_step(zero_grad=True)
    give(reached, second)
    optimizer.second_step(zero_grad=True)


def asynchronous_step(
    optimizer: SAM, loss: Callable[[Batch], Tensor], new: Batch, aside: Batch, older: Tensor | None
) -> Tensor:
    """One step of asynchronous SAM by two ranks: its perturbation goes along a gradient of the step before.

    Rank 0 makes the gradient for the next step's perturbation, at the weights, on ``aside``, which may be a smaller
    batch; rank 1 makes the one of this step, on ``new``, at weights perturbed along ``older``. The optimizer is a plain
    SAM, and every parameter must get a gradient.

    Returns:
        The next step's ``older``, flat; None stands for it in the first step, which does not perturb.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad()
    made = []
    if dist.get_rank() == 0:
        loss(aside).backward()
        made = [p.grad for p in params]
    give(params, torch.cat([torch.zeros_like(p).flatten() for p in params]) if older is None else older)
    optimizer.first_step(zero_grad=True)
    if dist.get_rank() == 0:
        for p, gradient in zip(params, made, strict=True):
            p.grad = gradient
    else:
        loss(new).backward()
    first, second = exchanged(params)
    give(params, second)
    optimizer.second_step(zero_grad=True)
    return first


def exchanged(params: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The gradients of rank 0 and of rank 1, flat, on both ranks."""
    own = torch.cat([p.grad.flatten() for p in params])
    first, second = torch.empty_like(own), torch.empty_like(own)
    dist.all_gather([first, second], own)
    return first, second


def give(params: list[Tensor], gradients: Tensor) -> None:
    """The gradients, one after the other in a flat tensor."""
    for p, part in zip(params, gradients.split([p.numel() for p in params]), strict=True):
        p.grad = part.view_as(p)


def step_of_one(optimizer: SAMPa, loss: Callable[[Batch], Tensor], new: Batch, old: Batch) -> None:
    """The same step by one process."""
    optimizer.zero_grad()
    with optimizer.first_pass():
        loss(new).backward()
    optimizer.first_step(zero_grad=True)
    loss(old).backward()
    optimizer.second_step(zero_grad=True)


def network(width: int = 512) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def main() -> None:
    digits = load_digits()
    inputs, targets = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    two = int(os.environ.get("WORLD_SIZE", "1")) == 2
    cuda = two and torch.cuda.device_count() >= 2
    if two:
        dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", dist.get_rank()) if cuda else torch.device("cpu")
    net = network().to(device)
    optimizer = SAMPa(net.parameters(), torch.optim.SGD, rho=RHO, lr=0.05, momentum=0.9)
    random = torch.Generator().manual_seed(0)

    def draw() -> Batch:
        rows = torch.randint(1280, (BATCH,), generator=random)
        return inputs[rows].to(device), targets[rows].to(device)

    def loss(batch: Batch) -> Tensor:
        return cross_entropy(net(batch[0]), batch[1])

    old, times = draw(), []
    for _ in range(STEPS):
        new, begin = draw(), time.perf_counter()
        (step_of_two if two else step_of_one)(optimizer, loss, new, old)
        if cuda:
            torch.cuda.synchronize(device)
        old = new
        times.append(time.perf_counter() - begin)
    with torch.no_grad():
        accuracy = (net(inputs[1280:].to(device)).argmax(1) == targets[1280:].to(device)).float().mean().item()
    if not two or dist.get_rank() == 0:
        ms = 1e3 * sorted(times)[STEPS // 2]
        print(f"{1 + two} process{'es' if two else ''}: {ms:.2f} ms a step, test accuracy {accuracy:.3f}")
    if two:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
