"""A program: host time and calls of a warm SAM step in two built checkouts, interleaved, a process each.

``python benchmarks/two_trees.py BEFORE AFTER [--out FILE]``, or ``--base REVISION``: a revision against this checkout
as it stands, built for the purpose in a folder that goes away (``make bench-compare BASE=REVISION``). 161 parameters of
four elements, SGD with momentum, the compiled kernels, one thread: what is left is the host's work. Calls are those of
the package's Python functions. ``--elements 158740`` measures with as many weights as ResNet-50 has, kernels included.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parents[1]
PROCESSES, WARM, STEPS = 5, 100, 1500
FEW = 30  # steps, where there are more than a thousand elements in a tensor


def measure(root, elements):
    """Medians in microseconds, and calls and files, of first_step and second_step in this process."""
    sys.path.insert(0, root)
    torch.set_num_threads(1)
    import lets_kernels

    assert lets_kernels.__file__.startswith(root), f"measured {lets_kernels.__file__}, not {root}"
    params = [torch.nn.Parameter(torch.randn(elements)) for _ in range(161)]
    warm, steps = (WARM, STEPS) if elements <= 1000 else (2, FEW)
    opt = lets_kernels.SAM(params, torch.optim.SGD, lr=0.1, momentum=0.9, backend="cpu")
    halves = {
        "first_step": lambda: opt.first_step(zero_grad=True),
        "second_step": lambda: opt.second_step(zero_grad=True),
    }
    times, found = {name: [] for name in halves}, {}
    for i in range(warm + steps + 1):
        for name, half in halves.items():
            for p in params:
                p.grad = torch.randn(elements)
            if i == warm + steps:
                found[name] = calls(half, f"{root}/lets_kernels")
                continue
            begin = time.perf_counter()
            half()
            times[name].append(time.perf_counter() - begin)
    return {name: {"us": round(1e6 * statistics.median(times[name][warm:]), 1), **found[name]} for name in halves}


def calls(function, root):
    seen = []
    sys.setprofile(lambda frame, event, _: seen.append(frame.f_code.co_filename) if event == "call" else None)
    try:
        function()
    finally:
        sys.setprofile(None)
    own = [file for file in seen if file.startswith(root)]
    return {"calls": len(own), "files": len(set(own))}


@contextlib.contextmanager
def built(revision):
    """A folder with this revision and its kernels for the CPU; it is removed again."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / revision.replace("/", "-")
        git = ["git", "-C", str(HERE), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), revision], check=True)
        try:
            print(f"building {revision}", file=sys.stderr, flush=True)
            build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            subprocess.run(build, cwd=tree, env={**os.environ, "LETS_KERNELS_CUDA": "0"}, check=True)
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("trees", nargs="*", help="one: measure it; two: compare them")
    parser.add_argument("--base", help="compare this revision with this checkout")
    parser.add_argument("--elements", type=int, default=4, help="of each of the 161 parameters (default: 4)")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if bool(given.base) == bool(given.trees) or len(given.trees) > 2:
        parser.error("give one tree, two trees, or --base REVISION")
    if given.base:
        with built(given.base) as tree:
            compare([tree, HERE], given)
        return
    trees = [Path(tree).resolve() for tree in given.trees]
    if len(trees) == 1:
        print(json.dumps(measure(str(trees[0]), given.elements)))
    else:
        compare(trees, given)


def compare(trees, given):
    """Each tree in a process of its own, in turn; prints every number, and the medians in words."""
    results = {tree.name: [] for tree in trees}
    for _ in range(PROCESSES):
        for tree in trees:
            command = [sys.executable, __file__, str(tree), "--elements", str(given.elements)]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            results[tree.name].append(json.loads(run.stdout))
    sys.path.insert(0, str(HERE))
    from lets_kernels.record import environment

    size = "four elements" if given.elements == 4 else f"{given.elements} elements"
    question = f"Host time and calls of a warm SAM + SGD step, 161 parameters of {size}, one thread"
    content = {"question": question, "environment": environment(), "results": results}
    text = json.dumps(content, indent=1)
    print(text)
    for name, runs in results.items():
        both = [sum(run[half]["us"] for half in run) for run in runs]
        said = f"{name}: first_step and second_step {statistics.median(both):.1f} us, median of {len(both)} processes"
        print(f"{said} ({min(both):.1f} to {max(both):.1f})", file=sys.stderr)
    if given.out:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
