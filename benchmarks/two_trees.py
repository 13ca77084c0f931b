"""A program: host time and calls of a warm SAM step in two built checkouts, interleaved, a process each.

``python benchmarks/two_trees.py BEFORE AFTER [--out FILE]``. 161 parameters of four elements, SGD with momentum, the
compiled kernels, one thread: what is left is the host's work. Calls are those of the package's Python functions.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

PROCESSES, WARM, STEPS = 5, 100, 1500


def measure(root):
    """Medians in microseconds, and calls and files, of first_step and second_step in this process."""
    sys.path.insert(0, root)
    torch.set_num_threads(1)
    import lets_kernels

    assert lets_kernels.__file__.startswith(root), f"measured {lets_kernels.__file__}, not {root}"
    params = [torch.nn.Parameter(torch.randn(4)) for _ in range(161)]
    opt = lets_kernels.SAM(params, torch.optim.SGD, lr=0.1, momentum=0.9, backend="cpu")
    halves = {
        "first_step": lambda: opt.first_step(zero_grad=True),
        "second_step": lambda: opt.second_step(zero_grad=True),
    }
    times, found = {name: [] for name in halves}, {}
    for i in range(WARM + STEPS + 1):
        for name, half in halves.items():
            for p in params:
                p.grad = torch.randn(4)
            if i == WARM + STEPS:
                found[name] = calls(half, f"{root}/lets_kernels")
                continue
            begin = time.perf_counter()
            half()
            times[name].append(time.perf_counter() - begin)
    return {name: {"us": round(1e6 * statistics.median(times[name][WARM:]), 1), **found[name]} for name in halves}


def calls(function, root):
    seen = []
    sys.setprofile(lambda frame, event, _: seen.append(frame.f_code.co_filename) if event == "call" else None)
    try:
        function()
    finally:
        sys.setprofile(None)
    own = [file for file in seen if file.startswith(root)]
    return {"calls": len(own), "files": len(set(own))}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("trees", nargs="+", help="one: measure it; two: compare them")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    trees = [str(Path(tree).resolve()) for tree in given.trees]
    if len(trees) == 1:
        print(json.dumps(measure(trees[0])))
        return
    results = {Path(tree).name: [] for tree in trees}
    for _ in range(PROCESSES):
        for tree in trees:
            run = subprocess.run([sys.executable, __file__, tree], capture_output=True, text=True, check=True)
            results[Path(tree).name].append(json.loads(run.stdout))
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from benchmarks.common import environment

    question = "Host time and calls of a warm SAM + SGD step, 161 parameters of four elements, one thread"
    content = {"question": question, "environment": environment(), "results": results}
    text = json.dumps(content, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
