"""A program: the training script that a new user writes in the first hour. Prints the losses, the radius, the mistakes.

A small transformer with AdamW, a param group without weight decay, dropout, a scheduler, a checkpoint in the middle,
and `rho="auto"`; then mistakes that people make, each of which has to end in an error that names the way out.
"""

import io
import sys

import torch
from torch import nn

from lets_kernels import ASAM, GSAM, SAM


def network():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
    return nn.Sequential(nn.Linear(8, 16), nn.TransformerEncoder(layer, 1), nn.Flatten(), nn.Linear(64, 3))


def optimizer_of(net):
    decayed = [p for p in net.parameters() if p.dim() > 1]
    others = [p for p in net.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    return SAM(groups, torch.optim.AdamW, rho="auto", lr=3e-3, model=net, same_rng=True)


def train(net, optimizer, scheduler, steps, first=0):
    losses = []
    for step in range(first, first + steps):
        random = torch.Generator().manual_seed(step)
        inputs = torch.randn(32, 4, 8, generator=random)
        targets = inputs.mean((1, 2)).sign().long() + 1

        def closure(inputs=inputs, targets=targets):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(inputs), targets)
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())
        scheduler.step()
    return losses


def trained():
    """The losses, and the radius at the end; saved and loaded in the middle."""
    net = network()
    optimizer = optimizer_of(net)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
    losses = train(net, optimizer, scheduler, 30)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (net, optimizer, scheduler)], file)
    file.seek(0)
    net = network()
    optimizer = optimizer_of(net)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
    for part, state in zip((net, optimizer, scheduler), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    losses += train(net, optimizer, scheduler, 30, first=30)
    return losses, optimizer.rho.item()


def closures():
    """A network with its gradients, and SAM on it."""
    net = nn.Linear(3, 1)
    net(torch.ones(2, 3)).sum().backward()
    return net, SAM(net.parameters(), torch.optim.SGD, lr=0.1)


def misspelt():
    SAM(nn.Linear(3, 1).parameters(), torch.optim.SGD, roh=0.05, lr=0.1)


def no_rate():
    SAM(nn.Linear(3, 1).parameters(), torch.optim.SGD(nn.Linear(3, 1).parameters(), lr=0.1))


def second_first():
    closures()[1].second_step()


def first_twice():
    _, optimizer = closures()
    optimizer.first_step()
    optimizer.first_step()


def perturbed_state():
    _, optimizer = closures()
    optimizer.first_step()
    optimizer.state_dict()


def other_method():
    _, optimizer = closures()
    optimizer.first_step(zero_grad=True)
    optimizer.second_step()
    other = GSAM(nn.Linear(3, 1).parameters(), torch.optim.Adam, lr=0.1)
    other.load_state_dict(optimizer.state_dict())


def negative():
    ASAM(nn.Linear(3, 1).parameters(), torch.optim.SGD, rho=-1.0, lr=0.1)


MISTAKES = (
    misspelt,
    no_rate,
    second_first,
    first_twice,
    perturbed_state,
    other_method,
    negative,
)


def said(mistake):
    """The error's words; None where nothing was said."""
    try:
        mistake()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def main():
    losses, rho = trained()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, rho {rho:.3g}")
    for mistake in MISTAKES:
        print(f"{mistake.__name__}: {said(mistake)}")


if __name__ == "__main__":
    sys.exit(main())
