"""`make wheel`: a wheel with every library, in an empty environment, trains. What a source archive holds."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from lets_kernels.ops import native

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = ROOT / "tests" / "support" / "few_steps.py"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        folder,
        ROOT,
    ]
    subprocess.run(command, check=True)
    (found,) = folder.glob("*.whl")
    return found


def test_the_wheel_holds_the_libraries_and_nothing_else_that_is_compiled(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    expected = {f"lets_kernels/_C{suffix}"} | (
        {f"lets_kernels/_cuda{suffix}"} if native.CUDA_LIBRARY.exists() else set()
    )
    assert {n for n in names if n.endswith((".so", ".o", ".a"))} == expected
    assert os.environ.get("LETS_KERNELS_CUDA") != "1" or len(expected) == 2
    assert all(n.startswith(("lets_kernels/", "lets_kernels-")) for n in names)
    assert {"lets_kernels/ops/triton/__init__.py", "lets_kernels/py.typed"} <= set(names)


def test_it_trains_in_an_empty_environment(wheel, tmp_path):
    """The environment has the wheel and, by a path file, what this one has of torch; not this checkout."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    install = ["install", "-q", "--no-deps", "--no-index", str(wheel)]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    subprocess.run([sys.executable, "-m", "pip", "--python", python, *install], env=environment, check=True)
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    (site / "torch.pth").write_text(sysconfig.get_path("purelib") + "\n")
    result = subprocess.run([python, PROGRAM], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    where, backend, cuda = result.stdout.splitlines()
    assert where == str(site / "lets_kernels" / "__init__.py")
    assert backend == "cpu"
    assert "was installed without CUDA kernels" not in cuda or not native.CUDA_LIBRARY.exists()


def test_the_source_archive_holds_what_a_checkout_has(tmp_path):
    """But for the records of single trainings: its own Makefile, tests, documentation and examples work."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is not a checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = {name for name in listed.splitlines() if (ROOT / name).exists()}
    records = {n for n in tracked if n.startswith("benchmarks/experiments/results/") and n.count("/") > 3}
    a_few = {min(n for n in records if n.split("/")[3] == task) for task in {n.split("/")[3] for n in records}}
    assert len(a_few) > 5
    # In a copy, so that neither files that are not tracked nor an old list of files come in.
    for name in (tracked - records) | a_few:
        copy = tmp_path / "tree" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy)
    environment = {**os.environ, "LETS_KERNELS_CPU": "0", "LETS_KERNELS_CUDA": "0"}
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", tmp_path]
    subprocess.run(command, cwd=tmp_path / "tree", env=environment, check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        held = {member.name.partition("/")[2]: member for member in opened.getmembers() if member.isfile()}
        metadata = opened.extractfile(held["PKG-INFO"]).read().decode()
    made = {n for n in held if n == "setup.cfg" or n.startswith(("PKG-INFO", "lets_kernels.egg-info/"))}
    assert set(held) - made == tracked - records
    assert held[".ci/run"].mode & 0o111
    fields = dict(line.split(": ", 1) for line in metadata.partition("\n\n")[0].splitlines())
    assert fields["License-Expression"] == "Apache-2.0" and fields["License-File"] == "LICENSE"
    assert fields["Author"] == "The lets_kernels developers"
