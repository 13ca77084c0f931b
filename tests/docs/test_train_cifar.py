"""The whole training script: it learns, and resumes on 1 and 2 ranks as if it had not been interrupted."""

import os
import pickle
import re
import runpy
import socket
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from support.preloaded import in_processes

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "train_cifar.py"


def run(*options):
    """The script in this process, as the command line would run it."""
    before, sys.argv = sys.argv, [str(SCRIPT), *map(str, options)]
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        sys.argv = before


def as_a_rank(rank, port, options):
    """With the environment that torchrun gives its processes."""
    torch.set_num_threads(1)
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in given.items()})
    run(*options)


def run_on(ranks, *options):
    if ranks == 1:
        run(*options)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    in_processes(as_a_rank, (port, options), ranks)


@pytest.fixture
def cifar(tmp_path):
    """A folder like that of CIFAR-10's python version, with few images."""
    random = torch.Generator().manual_seed(0)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        images = torch.randint(256, (16, 3072), generator=random, dtype=torch.uint8)
        labels = torch.randint(10, (16,), generator=random).tolist()
        (tmp_path / name).write_bytes(pickle.dumps({b"data": images.numpy(), b"labels": labels}))
    return tmp_path


@pytest.mark.parametrize("ranks, options", [(1, ("--amp", "bf16")), (2, ("--rho", "auto"))], ids=["bf16", "auto"])
def test_an_interrupted_run_ends_where_one_without_a_break_does(ranks, options, cifar):
    files = [cifar / "runs" / name for name in ("whole.pt", "broken.pt")]
    options = ("--data", cifar, "--epochs", 2, "--width", 4, "--batch", 16, *options)
    run_on(ranks, *options, "--checkpoint", files[0])
    run_on(ranks, *options, "--checkpoint", files[1], "--stop-after", 1)
    half = torch.load(files[1], weights_only=True)
    run_on(ranks, *options, "--checkpoint", files[1])
    whole, broken = (torch.load(file, weights_only=True) for file in files)
    assert half["epoch"] == 1 and whole["epoch"] == broken["epoch"] == 2
    torch.testing.assert_close(broken["model"], whole["model"], rtol=0, atol=0)
    torch.testing.assert_close(broken["optimizer"]["state"], whole["optimizer"]["state"], rtol=0, atol=0)
    assert not torch.equal(half["model"]["0.weight"], whole["model"]["0.weight"])
    assert torch.equal(whole["model"]["1.num_batches_tracked"], torch.tensor(2 * (80 // (16 * ranks))))


def test_it_learns_images_of_its_own(capsys):
    run("--epochs", 2, "--width", 4, "--batch", 64)
    lines = capsys.readouterr().out.splitlines()
    assert [line[:7] for line in lines] == ["epoch 1", "epoch 2"]
    losses = [float(re.search(r"loss (\S+),", line)[1]) for line in lines]
    assert losses[1] < losses[0] - 0.1  # 2.25 and 1.98 as it was written


@pytest.mark.parametrize(
    "options, message",
    [
        (("--rho", "large"), "--rho takes a number or auto, not large"),
        (("--tensorboard", "runs"), "pip install tensorboard"),
    ],
)
def test_what_cannot_be_done_is_said_at_once(options, message, capsys):
    if "--tensorboard" in options and find_spec("tensorboard"):
        pytest.skip("tensorboard is here")
    with pytest.raises(SystemExit, match="2"):
        run(*options)
    assert message in capsys.readouterr().err


def test_a_batch_larger_than_the_data_set_is_refused(cifar):
    with pytest.raises(SystemExit, match="80 images are fewer than one step takes \\(128\\): lower --batch"):
        run("--data", cifar, "--width", 4)
