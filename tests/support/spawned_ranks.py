"""Several processes on this machine, over gloo, and what each of them returns."""

import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from support.preloaded import in_processes

#: Where ranks wait for each other in vain they fail, and say where.
PATIENCE = timedelta(seconds=60)


def spawn(function, world, folder, *args):
    """``function(rank, *args)`` in ``world`` processes; their results, rank by rank. Functions of a module only."""
    in_processes(_enter, (function, world, str(folder), args), world)
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _enter(rank, function, world, folder, args):
    torch.set_num_threads(1)
    os.environ.pop("LETS_KERNELS_BACKEND", None)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=PATIENCE)
    try:
        torch.save(function(rank, *args), Path(folder) / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def outcomes(cases):
    """What each of the functions returns, by name; one that raises leaves its traceback, and the others still run."""
    found = {}
    for name, case in cases.items():
        torch.manual_seed(0)
        try:
            found[name] = case()
        except Exception:
            found[name] = traceback.format_exc()
    return found


def result(found, name):
    """One outcome, or the failure with the traceback of its rank."""
    if isinstance(found[name], str):
        raise AssertionError(found[name])
    return found[name]


class Calls:
    """Counts the all-reduces that lets_kernels asks for (not those of FSDP or of DTensor), with their sizes."""

    def __init__(self):
        self.sizes = []
        self._plain = dist.all_reduce

    def __enter__(self):
        def counting(tensor, *args, **kwargs):
            if sys._getframe(1).f_globals["__name__"].startswith("lets_kernels"):
                self.sizes.append(tensor.numel())
            return self._plain(tensor, *args, **kwargs)

        dist.all_reduce = counting
        return self

    def __exit__(self, *_):
        dist.all_reduce = self._plain
