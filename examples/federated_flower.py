"""FedSAM and MoFedSAM over Flower: a server, and two clients in processes of their own, which talk over localhost.

A client's part of a round is `train_client` of federated.py, the server's is `move`; Flower carries the weights, and
for MoFedSAM Delta behind them. Flower asks for older versions of rich, typer and packaging than the other examples
have, so it needs an environment of its own: `make flower`. `start_server` and `start_client` are Flower's older
functions, which need no other process; a deployment wraps the same strategy and client into a `ServerApp` and a
`ClientApp`.
"""

import copy
import functools
import os
import socket
import subprocess
import sys
from collections.abc import Sequence

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # before flwr is imported, which reads it

import numpy as np
import torch
from federated import STEPS, Batch, Settings, move, split, train_client
from flwr.client import NumPyClient, start_client
from flwr.common import FitRes, Parameters, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import ServerConfig, start_server
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import FedAvg
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel

CLIENTS, ROUNDS, BATCH = 2, 30, 32


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


@functools.cache
def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels to train on, and to test with: the same in every process."""
    images, labels = (torch.tensor(x) for x in load_digits(return_X_y=True))
    train, test = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).split([1437, 360])
    return images[train].float() / 16, labels[train], images[test].float() / 16, labels[test]


def batches(client: int, number: int) -> list[Batch]:
    """What a client sees in a round: drawn from its own samples, in the client's process."""
    images, labels, *_ = data()
    torch.manual_seed(0)
    own = split(labels, CLIENTS)[client]
    torch.manual_seed(1 + CLIENTS * number + client)
    return [(images[i], labels[i]) for i in own[torch.randint(len(own), (STEPS, BATCH))]]


def arrays(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    return [t.detach().numpy() for t in tensors]


@torch.no_grad()
def put(found: Sequence[np.ndarray], net: nn.Module) -> list[Tensor]:
    """Copies weights into a network; returns what comes behind them."""
    tensors = [torch.from_numpy(array.copy()) for array in found]
    own = list(net.state_dict().values())
    for p, value in zip(own, tensors, strict=False):
        p.copy_(value)
    return tensors[len(own) :]


class Client(NumPyClient):
    def __init__(self, number: int, settings: Settings) -> None:
        self.number, self.settings, self.net = number, settings, network()

    def fit(self, parameters: list[np.ndarray], config: dict) -> tuple[list[np.ndarray], int, dict]:
        momentum = put(parameters, self.net)
        train_client(self.net, batches(self.number, int(config["round"])), momentum, self.settings)
        return arrays(self.net.state_dict().values()), STEPS * BATCH, {"client": self.number, "process": os.getpid()}


class FedSAM(FedAvg):
    """FedSAM, and MoFedSAM where beta is not 1: the clients' mean, taken by `move`. Keeps the trained network."""

    def __init__(self, net: nn.Module, settings: Settings) -> None:
        self.net, self.settings, self.processes = net, settings, set[int]()
        self.momentum = [torch.zeros_like(p) for p in net.parameters()]
        super().__init__(
            fraction_evaluate=0.0,
            min_fit_clients=CLIENTS,
            min_available_clients=CLIENTS,
            accept_failures=False,
            initial_parameters=self.parameters(),
            on_fit_config_fn=lambda number: {"round": number},
        )

    def parameters(self) -> Parameters:
        return ndarrays_to_parameters(arrays([*self.net.state_dict().values(), *self.momentum]))

    def aggregate_fit(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, FitRes]],
        failures: list[tuple[ClientProxy, FitRes] | BaseException],
    ) -> tuple[Parameters, dict]:
        if failures or len(results) < CLIENTS:
            raise RuntimeError(f"round {server_round}: {len(results)} of {CLIENTS} clients have answered: {failures}")
        average = AveragedModel(self.net, use_buffers=True)
        for _, result in sorted(results, key=lambda pair: pair[1].metrics["client"]):  # whoever was there first
            local = copy.deepcopy(self.net)
            put(parameters_to_ndarrays(result.parameters), local)
            average.update_parameters(local)
            self.processes.add(int(result.metrics["process"]))
        self.momentum = move(self.net, average, STEPS, self.settings)
        return self.parameters(), {}


def federate(settings: Settings, rounds: int = ROUNDS) -> FedSAM:
    """Starts the clients, and serves them. Returns the strategy, with the trained network in it."""
    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    strategy = FedSAM(network(), settings)
    started = [
        subprocess.Popen([sys.executable, __file__, address, str(number), str(settings.beta)])
        for number in range(CLIENTS)
    ]
    try:
        start_server(
            server_address=address, config=ServerConfig(num_rounds=rounds, round_timeout=60), strategy=strategy
        )
        codes = [each.wait(timeout=60) for each in started]
    finally:
        for each in started:
            each.kill()
    if any(codes):
        raise RuntimeError(f"the clients ended with {codes}")
    return strategy


def main() -> None:
    *_, images, labels = data()
    found = {}
    for name, beta in {"FedSAM": 1.0, "MoFedSAM": 0.4}.items():
        strategy = federate(Settings(beta=beta))
        with torch.no_grad():
            outputs = strategy.net(images)
        right = (outputs.argmax(1) == labels).float().mean()
        found[name] = f"test loss {functional.cross_entropy(outputs, labels):.3f}, test accuracy {right:.3f}"
    print(f"FedSAM: {found['FedSAM']}; MoFedSAM: {found['MoFedSAM']}")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        torch.set_num_threads(1)
        address, number, beta = sys.argv[1:]
        client = Client(int(number), Settings(beta=float(beta)))
        start_client(server_address=address, client=client.to_client(), insecure=True, max_wait_time=60)
