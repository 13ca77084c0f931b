"""What ranks need to have imported, once for all of them: they are forked from a process that has, and has run nothing.

That process lives as long as the tests. It is started by :func:`fork_server`.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import sys

import torch.distributed.fsdp
import torch.distributed.tensor.parallel  # noqa: F401
import torch.multiprocessing as mp

import support.family
import support.sharded_training  # noqa: F401

#: How processes are started, for multiprocessing and torch's own.
START = "forkserver"


def fork_server():
    """Start the process, if it is not there yet, with the paths of this one."""
    multiprocessing.set_forkserver_preload([__name__])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # Python 3.11 hands over no path by itself
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def in_processes(function, arguments, count):
    """``function(rank, *arguments)`` in ``count`` processes, to the end of all. Functions of a module only."""
    fork_server()
    mp.start_processes(function, arguments, nprocs=count, start_method=START)
