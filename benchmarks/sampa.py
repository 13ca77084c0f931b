"""A program: what a step of SAMPa takes with its two passes at once, beside one gradient and the step of one process.

    torchrun --nproc-per-node 2 benchmarks/sampa.py [--out FILE]    # about a minute, two cores

The network of examples/sampa_two_devices.py, two ranks with a thread each, gloo. In every round, one after the other:
a gradient, by both ranks at once; a step of one process, the other rank waiting; a step of two. Medians of the clock on
the wall, and of the CPU time of the busier rank: what a step takes where every rank has a core of its own, but for the
time on the wire.
"""

import argparse
import json
import runpy
import time
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from lets_kernels import SAMPa
from lets_kernels.record import environment

EXAMPLE = runpy.run_path(str(Path(__file__).resolve().parents[1] / "examples" / "sampa_two_devices.py"))
BATCHES, ROUNDS, UNTIMED = (64, 512, 2048), 40, 3


def timed(what, alone=False):
    """Seconds until both ranks are through, and this rank's CPU time; with ``alone`` the work is rank 0's."""
    dist.barrier()
    start, cpu = time.perf_counter(), time.process_time()
    if not alone or dist.get_rank() == 0:
        what()
    cpu = time.process_time() - cpu
    dist.barrier()
    return time.perf_counter() - start, cpu


def measure(batch):
    """Medians in ms, of each on the wall and of its CPU time."""
    nets = [EXAMPLE["network"]() for _ in range(3)]
    optimizers = [SAMPa(net.parameters(), torch.optim.SGD, rho=0.1, lr=0.01, momentum=0.9) for net in nets]
    new, old = ((torch.randn(batch, 64), torch.randint(10, (batch,))) for _ in range(2))

    def loss_of(net):
        return lambda batch: cross_entropy(net(batch[0]), batch[1])

    def gradient():
        optimizers[0].zero_grad()
        loss_of(nets[0])(new).backward()

    cases = {
        "gradient": (gradient, False),
        "one": (lambda: EXAMPLE["step_of_one"](optimizers[1], loss_of(nets[1]), new, old), True),
        "two": (lambda: EXAMPLE["step_of_two"](optimizers[2], loss_of(nets[2]), new, old), False),
    }
    rounds = [{name: timed(*case) for name, case in cases.items()} for _ in range(UNTIMED + ROUNDS)]
    found = {"batch": batch}
    for name in cases:
        wall, cpu = (1e3 * median(each[name][i] for each in rounds[UNTIMED:]) for i in (0, 1))
        both = torch.tensor([wall, cpu])
        dist.all_reduce(both, op=dist.ReduceOp.MAX)  # of the ranks
        found |= dict(zip((name, f"{name}_cpu"), (round(ms, 2) for ms in both.tolist()), strict=True))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    rows = [measure(batch) for batch in BATCHES]
    if dist.get_rank() == 0:
        for row in rows:
            print(*(f"{key} {value:g}" for key, value in row.items()))
        if out:
            out.write_text(json.dumps({"environment": environment(), "rounds": ROUNDS, "ms": rows}, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
