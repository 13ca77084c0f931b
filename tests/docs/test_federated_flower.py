"""examples/federated_flower.py: a server and two clients, in three processes, train as federated.py does in one.

Flower cannot be installed beside the other frameworks, so this runs where `make flower` has made its environment.
"""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-flower" / "bin" / "python"
pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="Flower has an environment of its own: make flower")
ROUNDS = 3

BESIDE = """
import json, os, sys
import torch
import federated, federated_flower as flower

beta, rounds = float(sys.argv[1]), int(sys.argv[2])
settings = flower.Settings(beta=beta)
found = flower.federate(settings, rounds)
expected = flower.network()
start = [p.detach().clone() for p in expected.parameters()]
drawn = [[flower.batches(client, number) for client in range(flower.CLIENTS)] for number in range(1, rounds + 1)]
federated.federate(expected, drawn, settings)
pairs = list(zip(found.net.parameters(), expected.parameters()))
print(json.dumps({
    "same": all(torch.equal(p, q) for p, q in pairs),
    "moved": all(bool((p != x).any()) for (p, _), x in zip(pairs, start)),
    "clients": len(found.processes - {os.getpid()}),
}))
"""


def run(*arguments):
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "examples")))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0"}
    done = subprocess.run(
        [str(PYTHON), *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("beta", [1.0, 0.4], ids=["fedsam", "mofedsam"])
def test_three_processes_train_as_one_does_to_the_bit(beta):
    """The same batches, and the clients' weights added in the same order; float32 on one thread."""
    assert json.loads(run("-c", BESIDE, str(beta), str(ROUNDS))) == {"same": True, "moved": True, "clients": 2}


def test_it_learns():
    """A network that has learnt nothing is right on one digit in ten."""
    line = r"FedSAM: test loss \S+, test accuracy (\S+); MoFedSAM: test loss \S+, test accuracy (\S+)"
    found = re.fullmatch(line, run(str(ROOT / "examples" / "federated_flower.py")))
    assert found and all(float(accuracy) > 0.8 for accuracy in found.groups())
