"""A program, `make matrix`: does what was built run on each torch, and on each Python?

For each Python from 3.10 to 3.14 that is here, a wheel with the CPU kernels is built once, against one torch; and the
same wheel runs a choice of tests on the newest release of each torch from 2.10 on whose package here is a CPU build.
`--cuda-builds` takes the others too: they run on the CPU as well, but bring gigabytes. Environments are kept in
build/matrix. Writes tests/results/matrix.json, where what could not be had says so.
"""

import argparse
import datetime
import glob
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "matrix"
RESULTS = ROOT / "tests" / "results" / "matrix.json"
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
#: Backends and symbols; ops on addresses; refusals; a radius that is learned; every method against its paper's formula.
FILES = (
    "native/test_backends.py",
    "native/test_build.py",
    "ops/test_packed.py",
    "step/test_errors.py",
    "learning/test_hypergradient.py",
    "methods/test_methods.py",
)
#: What the tests need beside torch, pinned in the requirements files.
NEEDED = ("numpy", "expecttest", "pytest", "hypothesis")
BUILD = ("ninja", "pybind11", "setuptools", "wheel")


def said(*command, **options):
    """What a program prints, or None if it fails."""
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT, **options)
    return result.stdout if result.returncode == 0 else None


def interpreter(version):
    """A Python of this version, from PATH or pyenv; None if there is none that runs."""
    folders = glob.glob(str(Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions" / f"{version}.*"))
    for found in (shutil.which(f"python{version}"), *(f"{folder}/bin/python" for folder in sorted(folders))):
        if found and (said(found, "-c", "import platform; print(platform.python_version())") or "").startswith(version):
            return found
    return None


def pins(names):
    """Requirements, as the files for `make` have them."""
    lines = "\n".join((ROOT / f"requirements-{file}.txt").read_text() for file in ("demo", "dev")).splitlines()
    return [line for line in lines if re.split(r"==", line)[0] in names]


def environment(folder, python):
    """Its Python."""
    if not (folder / "bin" / "python").exists():
        subprocess.run([python, "-m", "venv", folder], check=True)
    return folder / "bin" / "python"


def install(python, *what):
    subprocess.run([python, "-m", "pip", "install", "-qq", "--no-warn-conflicts", *what], check=True, cwd=ROOT)


def releases(python):
    """The newest release of each torch from 2.10 on that this Python can have."""
    listed = re.search(r"Available versions: (.*)", said(python, "-m", "pip", "index", "versions", "torch") or "")
    found = {}
    for version in listed[1].split(", ") if listed else ():
        number = tuple(map(int, version.partition("+")[0].split(".")))
        if number >= (2, 10):
            found.setdefault(number[:2], version.partition("+")[0])
    return [found[key] for key in sorted(found)]


def brings(python, version):
    """How many packages of CUDA this torch brings, or None if it cannot be had."""
    report = said(
        python, "-m", "pip", "install", "-qq", "--dry-run", "--ignore-installed", "--report", "-", f"torch=={version}"
    )
    if report is None:
        return None
    names = [package["metadata"]["name"] for package in json.loads(report)["install"]]
    return sum(name.startswith(("nvidia", "cuda")) for name in names)


def built(python, name):
    """A wheel for this Python, built against its torch."""
    folder = WORK / f"wheel-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    install(python, *pins(BUILD))
    settings = {**os.environ, "LETS_KERNELS_CPU": "1", "LETS_KERNELS_CUDA": "0"}
    command = [python, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, ROOT]
    subprocess.run(command, env=settings, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def tested(python, wheel):
    """The tests on the installed wheel: how many passed, and how long it took. The tree itself is not on the path."""
    install(python, *pins(NEEDED))
    install(python, "--no-deps", "--force-reinstall", wheel)
    report = wheel.parent / "report.xml"
    report.unlink(missing_ok=True)
    begin = time.monotonic()
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    settings.pop("PYTHONPATH", None)
    steps = subprocess.run(
        [python, "tests/support/few_steps.py"], cwd=ROOT, env=settings, capture_output=True, text=True
    )
    if steps.returncode or str(ROOT / "lets_kernels") in steps.stdout:
        return {"failed": steps.stdout + steps.stderr}
    options = ["-q", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml", "-o", "pythonpath=tests"]
    command = [python.parent / "pytest", *options, f"--junitxml={report}", *(ROOT / "tests" / file for file in FILES)]
    # From another folder: a program that a test starts would find the tree in its own.
    status = subprocess.run(command, cwd=WORK, env=settings).returncode
    suite = ET.parse(report).getroot().find("testsuite")
    counts = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    found = {"passed": counts.pop("tests") - sum(counts.values()), **counts, "seconds": round(time.monotonic() - begin)}
    return found if status == 0 else {**found, "failed": f"pytest ended with {status}"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuda-builds", action="store_true", help="also run on packages of torch that bring CUDA")
    parser.add_argument("--python", nargs="+", default=PYTHONS, choices=PYTHONS, metavar="3.X", help="only these")
    parser.add_argument("--torch", nargs="+", metavar="2.X.Y", help="only these")
    given = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    runs = {}
    for version in given.python:
        found = interpreter(version)
        if found is None:
            runs[f"Python {version}"] = {"not run": "no such Python here"}
            continue
        bare = environment(WORK / f"python-{version}", found)
        wheel = None
        for torch in releases(bare):
            if given.torch and torch not in given.torch:
                continue
            key, cuda = f"Python {version}, torch {torch}", brings(bare, torch)
            if cuda is None:
                runs[key] = {"not run": "what it needs cannot be had here"}
            elif cuda and not given.cuda_builds:
                runs[key] = {"not run": f"its package here is no CPU build: it brings {cuda} packages of CUDA"}
            else:
                python = environment(WORK / f"python-{version}-torch-{torch}", found)
                install(python, f"torch=={torch}")
                wheel = wheel or built(python, version)
                runs[key] = {"build": "CUDA" if cuda else "CPU", **tested(python, wheel)}
            print(f"== {key}: {runs[key]}", flush=True)
    # What was not run anew stays as it is in the file.
    kept = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else {}
    new = {key: run for key, run in runs.items() if "not run" not in run or "passed" not in kept.get(key, {})}
    summary = {
        "files": FILES,
        "runs": dict(sorted((kept | new).items())),
        "machine": platform.machine(),
        "date": datetime.date.today().isoformat(),
        "commit": (said("git", "describe", "--always", "--dirty") or "unknown").strip(),
    }
    RESULTS.write_text(json.dumps(summary, indent=2) + "\n")
    ran = [run for run in runs.values() if "not run" not in run]
    failed = [key for key, run in runs.items() if "failed" in run]
    print(f"{len(ran)} environments, {len(failed)} failed; {RESULTS.relative_to(ROOT)}")
    return 1 if failed or not ran else 0


if __name__ == "__main__":
    sys.exit(main())
