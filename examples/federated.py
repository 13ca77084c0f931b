"""Federated averaging with SAM as the local optimizer: FedSAM, and MoFedSAM with a global momentum.

Qu et al., ICML 2022. In each round some clients start from the global weights w, take K steps of
SAM on data of their own, and w moves by the mean of what they have moved by. MoFedSAM steps locally along
v = beta g_hat + (1 - beta) Delta, where Delta is the mean of all local steps of the last round over -lr, the size of a
gradient; the first round has zero for it. The clients take turns in one process; torch's `AveragedModel` adds them up.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel

from lets_kernels import SAM

ROUNDS, CLIENTS, TAKE_PART, STEPS, BATCH = 20, 10, 5, 5, 32


@dataclass
class Settings:
    """What server and clients agree on. beta = 1 is FedSAM; the paper takes 0.1 for MoFedSAM, in hundreds of rounds."""

    lr: float = 0.3
    rho: float = 0.05
    beta: float = 1.0
    global_lr: float = 1.0


Batch = tuple[Tensor, Tensor]


def train_client(net: nn.Module, batches: Sequence[Batch], momentum: Sequence[Tensor], settings: Settings) -> None:
    """K steps of SAM on one client's batches, each along beta g_hat + (1 - beta) Delta; moves the weights of `net`."""
    optimizer = SAM(net.parameters(), torch.optim.SGD, rho=settings.rho, lr=settings.lr, model=net)
    for inputs, targets in batches:
        optimizer.zero_grad()
        functional.cross_entropy(net(inputs), targets).backward()
        with optimizer.perturbed():
            optimizer.zero_grad()
            functional.cross_entropy(net(inputs), targets).backward()
        if settings.beta != 1:  # out of the context the weights are back at theta, and the gradients still g_hat
            for p, delta in zip(net.parameters(), momentum, strict=True):
                assert p.grad is not None
                p.grad.lerp_(delta, 1 - settings.beta)
        optimizer.step()


@torch.no_grad()
def move(net: nn.Module, clients: AveragedModel, steps: int, settings: Settings) -> list[Tensor]:
    """The server's part: w moves towards the mean of the clients. Returns Delta, a gradient's size, for the next round.

    Running statistics are the mean of theirs.
    """
    momentum = []
    for p, mean in zip(net.parameters(), clients.module.parameters(), strict=True):
        momentum.append((p - mean) / (steps * settings.lr))
        p.lerp_(mean, settings.global_lr)
    for own, mean in zip(net.buffers(), clients.module.buffers(), strict=True):
        own.copy_(mean)
    return momentum


def federate(net: nn.Module, rounds: Sequence[Sequence[Sequence[Batch]]], settings: Settings) -> None:
    """Trains `net`. A round is the clients that take part in it, and a client is its batches: K of them, for all."""
    momentum = [torch.zeros_like(p) for p in net.parameters()]
    for clients in rounds:
        average = AveragedModel(net, use_buffers=True)
        for batches in clients:
            local = copy.deepcopy(net)
            train_client(local, batches, momentum, settings)
            average.update_parameters(local)
        momentum = move(net, average, len(clients[0]), settings)


def split(labels: Tensor, clients: int, concentration: float = 0.6) -> list[Tensor]:
    """The samples of each client: of every class, shares drawn from a Dirichlet distribution, as in the paper."""
    shares = torch.distributions.Dirichlet(torch.full((clients,), concentration)).sample((int(labels.max()) + 1,))
    parts: list[list[Tensor]] = [[] for _ in range(clients)]
    for label, share in enumerate(shares):
        of_class = (labels == label).nonzero().flatten()
        ends = (share.cumsum(0)[:-1] * len(of_class)).long()
        for part, own in zip(parts, of_class.tensor_split(ends), strict=True):
            part.append(own)
    return [torch.cat(part) for part in parts]


def main() -> None:
    images, labels = (torch.tensor(x) for x in load_digits(return_X_y=True))
    images = images.float() / 16
    found = {}
    for name, beta in {"FedSAM": 1.0, "MoFedSAM": 0.4}.items():
        torch.manual_seed(0)
        train, test = torch.randperm(len(images)).split([1437, 360])
        net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        clients = [train[own] for own in split(labels[train], CLIENTS)]
        rounds = []
        for _ in range(ROUNDS):
            chosen = [clients[i] for i in torch.randperm(CLIENTS)[:TAKE_PART]]
            drawn = [own[torch.randint(len(own), (STEPS, BATCH))] for own in chosen]
            rounds.append([[(images[i], labels[i]) for i in batches] for batches in drawn])
        federate(net, rounds, Settings(beta=beta))
        with torch.no_grad():
            outputs = net(images[test])
        right = (outputs.argmax(1) == labels[test]).float().mean()
        found[name] = f"test loss {functional.cross_entropy(outputs, labels[test]):.3f}, test accuracy {right:.3f}"
    print(f"FedSAM: {found['FedSAM']}; MoFedSAM: {found['MoFedSAM']}")


if __name__ == "__main__":
    main()
