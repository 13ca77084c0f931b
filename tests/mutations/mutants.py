"""A program, `make mutants`: does a test go red for every formula that is wrong? Table: mutants_table.py.

Each worker has a copy of the tree, and one mutation at a time in it; C++ is compiled there, for the CPU and its
baseline instruction set only. Tests run in forks of the workers, which have imported torch but nothing of the copy.
Prints a line for each mutation and writes tests/results/mutants.json. The exit status is 1 where a mutation has
survived.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from mutants_table import MUTANTS

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "tests" / "results" / "mutants.json"
LIMIT = 600  # seconds for the tests of one mutation


def _pytest(root, tests, output):
    """In a fork: pytest on the copy, which this process has not seen yet."""
    assert "lets_kernels" not in sys.modules
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(root)
    for name in ("LETS_KERNELS_BACKEND", "TRITON_INTERPRET"):
        os.environ.pop(name, None)
    os.environ |= {"PYTHONPATH": str(root), "LETS_KERNELS_CPU_ISA": "baseline", "OMP_NUM_THREADS": "1"}
    own = [path for path in sys.path if not path.startswith(str(ROOT / "tests"))]
    sys.path[:] = [str(root), *own, str(root / "tests" / "mutations")]  # spawned ranks import this file by its path
    sys.dont_write_bytecode = True
    for name in (
        "mutants",
        "mutants_table",
        "mutants_experiment",
        "mutants_foreach",
        "mutants_groups",
        "mutants_reference",
        "mutants_kernels",
        "mutants_parts",
        "mutants_radii",
        "mutants_sharpness",
    ):
        sys.modules.pop(name, None)
    status = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *shlex.split(tests)]))
    found = getattr(sys.modules.get("lets_kernels"), "__file__", "nothing")
    if status in (0, 1) and not found.startswith(str(root)):
        sys.exit(f"these tests are not of the copy, but of {found}")
    sys.exit(status)


class Copy:
    """The tracked files, and those that git does not ignore, in a folder of their own, with the compiled library."""

    def __init__(self, folder):
        self.root = Path(folder)
        files = self._git("ls-files", "--cached", "--others", "--exclude-standard").splitlines()
        libraries = [str(p.relative_to(ROOT)) for p in (ROOT / "lets_kernels").glob("_C.*.so")]
        for name in (name for name in files + libraries if (ROOT / name).is_file()):
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.root / name)

    @staticmethod
    def _git(*arguments):
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    def _run(self, *command, folder=".", **environment):
        known = {**os.environ, "LETS_KERNELS_CUDA": "0", "CXXFLAGS": "-O1", **environment}
        done = subprocess.run(command, cwd=self.root / folder, env=known, capture_output=True, text=True)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout

    def build_all(self):
        self._run(sys.executable, "setup.py", "-q", "build_ext", "--inplace")

    def build(self):
        """Compile what has changed, for the baseline instruction set, which the tests then ask for, and link it."""
        (folder,) = (path.parent for path in self.root.glob("build/*/build.ninja"))
        objects = [path.name for pattern in ("*.baseline.o", "*.torch.o") for path in folder.glob(pattern)]
        (library,) = (path.name for path in folder.glob("_C.*.so"))
        ninja = (sys.executable, "-m", "ninja")
        self._run(*ninja, "--quiet", *objects, folder=folder)
        *_, link = self._run(*ninja, "-t", "commands", library, folder=folder).splitlines()
        self._run(*shlex.split(link), folder=folder)
        fresh = self.root / "lets_kernels" / f"{library}.new"
        shutil.copy(folder / library, fresh)
        fresh.replace(self.root / "lets_kernels" / library)

    def test(self, tests):
        """What pytest says: True for green, False for a red test. Anything else is an error in the table."""
        output = self.root / "pytest.txt"
        child = multiprocessing.get_context("fork").Process(target=_pytest, args=(self.root, tests, output))
        child.start()
        child.join(LIMIT)
        if child.is_alive():
            child.kill()
            child.join()
        text = output.read_text()
        assert child.exitcode in (0, 1) and "not of the copy" not in text, f"pytest {tests}: {child.exitcode}\n{text}"
        return child.exitcode == 0

    def survives(self, mutant):
        """True if every test of the mutant stays green with the mutation in place; the file is put back."""
        path = self.root / mutant.file
        before = path.read_text()
        assert before.count(mutant.text) == 1, f"{mutant.file}: {mutant.text!r} is not there once"
        path.write_text(before.replace(mutant.text, mutant.replacement))
        try:
            if mutant.compiled:
                self.build()
            return self.test(mutant.tests)
        finally:
            path.write_text(before)


class Worker:
    """What a process of the pool does, in the copy that it has made for itself."""

    copy = None

    @classmethod
    def begin(cls, folder, compiles):
        cls.copy = Copy(Path(folder) / str(os.getpid()))
        if compiles:
            cls.copy.build_all()

    @classmethod
    def test(cls, tests):
        return cls.copy.test(tests)

    @classmethod
    def survives(cls, mutant):
        return cls.copy.survives(mutant)


def facts():
    commit = Copy._git("rev-parse", "HEAD").strip()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit + ("+changes" if Copy._git("status", "--porcelain").strip() else ""),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def report(begun, rows):
    killed = sum(row["killed"] for row in rows)
    return {**begun, "total": len(rows), "killed": killed, "mutants": rows}


def known():
    """The rows of the results file, by what was mutated and what had to go red."""
    rows = json.loads(RESULTS.read_text())["mutants"] if RESULTS.exists() else []
    return {(row["file"], row["text"], row["replacement"], row["tests"]): row for row in rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--only", metavar="TEXT", help="mutations whose file or text has TEXT; nothing is written")
    parser.add_argument("--missing", action="store_true", help="mutations that the results file does not have")
    parser.add_argument("--workers", type=int, default=2, help="how many mutations at a time (2)")
    arguments = parser.parse_args()
    only, old = arguments.only, known() if arguments.missing else {}
    keys = {(m.file, m.text, m.replacement, m.tests) for m in MUTANTS}
    rows = [row for key, row in old.items() if key in keys]
    mutants = [m for m in MUTANTS if only is None or only in m.file or only in m.text]
    mutants = [m for m in mutants if (m.file, m.text, m.replacement, m.tests) not in old]
    begun = facts()
    done = report(begun, rows)
    workers = max(1, min(arguments.workers, len(mutants)))
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        first = folder, any(m.compiled for m in mutants)
        with ProcessPoolExecutor(workers, fork, initializer=Worker.begin, initargs=first) as pool:
            selections = list(dict.fromkeys(m.tests for m in mutants))
            for tests, green in zip(selections, pool.map(Worker.test, selections), strict=True):
                assert green, f"pytest {tests} is red without any mutation"
            results = zip(mutants, pool.map(Worker.survives, mutants), strict=True)
            for n, (mutant, survived) in enumerate(results, start=1):
                killed = not survived
                rows.append({**mutant._asdict(), "killed": killed, "commit": begun["commit"]})
                print(
                    f"{n:3}/{len(mutants)} {'killed  ' if killed else 'SURVIVED'} {mutant.file}: "
                    f"{mutant.text!r} -> {mutant.replacement!r}",
                    flush=True,
                )
                done = report(begun, rows)
                if only is None:  # after each, so that a run that is cut short can go on with --missing
                    RESULTS.parent.mkdir(exist_ok=True)
                    RESULTS.write_text(json.dumps(done, indent=1, ensure_ascii=False) + "\n")
    print(f"{done['killed']} of {done['total']} killed")
    return int(done["killed"] < done["total"])


if __name__ == "__main__":
    sys.exit(main())
