"""`make gpu-check` with each of its processes a copy of this one, which has torch: imports are most of a dry run.

    python tests/support/forked.py [options of benchmarks/gpu_check.py]

Everything else is as it is: their command lines are parsed, they have sessions of their own, their output goes where it
would go. What is no module and no short program of Python is started as ever.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Forked:
    """Popen of ``python -m module ...`` and of ``python -c program``."""

    def __init__(self, command, cwd, env, stdin, stdout, stderr, start_new_session):
        assert start_new_session and stdin is subprocess.DEVNULL

        def child():
            os.setsid()
            os.chdir(cwd)
            os.environ.clear()
            os.environ.update(env)
            if stdout is not None:
                assert stderr is subprocess.STDOUT
                os.dup2(stdout.fileno(), 1)
                os.dup2(1, 2)
            sys.argv, sys.path[0] = command[2:], str(cwd)
            code = 1
            try:
                if command[1] == "-c":
                    exec(command[2], {"__name__": "__main__"})
                else:
                    runpy.run_module(command[2], run_name="__main__", alter_sys=True)
                code = 0
            except SystemExit as end:
                code = int(end.code or 0)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # the threads that Python would wait for are not in the copy

        self._process = multiprocessing.get_context("fork").Process(target=child)
        self._process.start()
        self.pid = self._process.pid

    def poll(self):
        return self._process.exitcode

    returncode = property(poll)

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired("a copy of this process", timeout)
        return self.poll()


def popen(command, **options):
    forks = command[0] == sys.executable and command[1] in ("-m", "-c")
    return (Forked if forks else subprocess.Popen)(command, **options)


if __name__ == "__main__":
    sys.path[:1] = [str(ROOT), str(ROOT / "tests")]
    import pytest  # noqa: F401
    import torch._dynamo  # noqa: F401

    from benchmarks import gpu_check
    from benchmarks.gpu import contenders, process  # noqa: F401
    from support import standing_ranks  # noqa: F401

    process.Popen = popen
    raise SystemExit(gpu_check.main())
