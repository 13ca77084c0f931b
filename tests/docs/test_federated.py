"""examples/federated.py: FedSAM and MoFedSAM take the steps of Qu et al. (ICML 2022), transcribed in float64."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from support.given_gradients import weights

federated = SimpleNamespace(**runpy.run_path(str(Path(__file__).resolve().parents[2] / "examples" / "federated.py")))

CLIENTS, STEPS, BATCH, WIDTH, CLASSES = 5, 3, 8, 4, 3


def rounds(taking_part):
    """Batches for the clients of each round; client i sees mostly class i."""
    drawn = []
    for clients in taking_part:
        drawn.append([[_batch(client) for _ in range(STEPS)] for client in clients])
    return drawn


def _batch(client):
    targets = torch.where(torch.rand(BATCH) < 0.7, client % CLASSES, torch.randint(CLASSES, (BATCH,)))
    return torch.randn(BATCH, WIDTH, dtype=torch.float64) + targets[:, None], targets


def gradient(weight, inputs, targets):
    """Of the mean cross-entropy of a linear classifier; the last column of `weight` is the bias."""
    padded = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=torch.float64)], 1)
    scores = (padded @ weight.T).exp()
    wrong = scores / scores.sum(1, keepdim=True) - torch.eye(CLASSES, dtype=torch.float64)[targets]
    return wrong.T @ padded / len(inputs)


def transcription(weight, drawn, lr, rho, beta, global_lr):
    """Round by round, with the sums written out; beta = 1 is FedSAM."""
    delta = torch.zeros_like(weight)
    for clients in drawn:
        moved = []
        for batches in clients:
            local = weight.clone()
            for inputs, targets in batches:
                g = gradient(local, inputs, targets)
                g_hat = gradient(local + rho * g / g.norm(), inputs, targets)
                local = local - lr * (beta * g_hat + (1 - beta) * delta)
            moved.append(local - weight)
        mean = torch.stack(moved).mean(0)
        weight, delta = weight + global_lr * mean, -mean / (lr * STEPS)
    return weight


@pytest.mark.parametrize("beta", [1.0, 0.3])
@pytest.mark.parametrize("global_lr", [1.0, 0.6])
def test_rounds_are_those_of_the_paper(beta, global_lr):
    drawn = rounds([(0, 1, 2), (3, 1, 4), (2, 4, 0), (1, 3, 2)])
    net = torch.nn.Linear(WIDTH, CLASSES).double()
    weight, bias = weights(net)
    settings = federated.Settings(lr=0.2, rho=0.3, beta=beta, global_lr=global_lr)
    expected = transcription(torch.cat([weight, bias[:, None]], 1), drawn, 0.2, 0.3, beta, global_lr)
    federated.federate(net, drawn, settings)
    weight, bias = weights(net)
    # 36 steps in float64, each rounded some ten times at 2^-53, on a convex loss that does not amplify them.
    assert torch.allclose(torch.cat([weight, bias[:, None]], 1), expected, rtol=1e-12, atol=1e-13)


def test_clients_start_alike_and_none_sees_the_other():
    """The order of the clients in a round does not matter, but for the rounding of their mean."""
    drawn = rounds([(0, 1, 2), (2, 0, 4)])
    nets = [torch.nn.Linear(WIDTH, CLASSES).double() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    federated.federate(nets[0], drawn, federated.Settings(beta=0.5))
    federated.federate(nets[1], [clients[::-1] for clients in drawn], federated.Settings(beta=0.5))
    for one, other in zip(*map(weights, nets), strict=True):
        assert torch.allclose(one, other, rtol=1e-13, atol=1e-14)


def test_running_statistics_are_the_mean_of_the_clients():
    drawn = rounds([(0, 1)])
    net = torch.nn.Sequential(torch.nn.BatchNorm1d(WIDTH), torch.nn.Linear(WIDTH, CLASSES)).double()
    federated.federate(net, drawn, federated.Settings())
    expected = torch.zeros(2, WIDTH, dtype=torch.float64)
    for batches in drawn[0]:
        own = torch.zeros(WIDTH, dtype=torch.float64)
        spread = torch.ones(WIDTH, dtype=torch.float64)
        for inputs, _ in batches:  # once a step: the second pass of SAM does not count
            own, spread = 0.9 * own + 0.1 * inputs.mean(0), 0.9 * spread + 0.1 * inputs.var(0)
        expected += torch.stack([own, spread]) / 2
    assert torch.allclose(torch.stack([net[0].running_mean, net[0].running_var]), expected, rtol=1e-13, atol=1e-14)
    assert net[0].num_batches_tracked == STEPS


def test_the_split_gives_every_sample_to_one_client_unevenly():
    labels = torch.arange(500) % 10
    parts = federated.split(labels, 8)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(500))
    shares = torch.stack([torch.bincount(labels[part], minlength=10) for part in parts])
    assert shares.float().std(0).min() > 2  # of 50 / 8 = 6.25 in the mean
