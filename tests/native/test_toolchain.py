"""What the environment asks of a build: jobs, compilers with a launcher before them, GPUs by number and by name."""

import os
import shlex
import sys
from types import SimpleNamespace

import pytest

from lets_kernels.ops import native
from support import emulated

toolchain = emulated.toolchain
KNOWN = "sm_80 sm_86 sm_90 sm_100 sm_103 sm_120 sm_121"


@pytest.fixture
def nvcc(tmp_path, monkeypatch):
    """A program that answers as nvcc does."""
    monkeypatch.delenv("LETS_KERNELS_CUDA", raising=False)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))

    def answering(version="13.0", known=KNOWN):
        program = tmp_path / "bin" / "nvcc"
        program.parent.mkdir(exist_ok=True)
        program.write_text(
            f'#!/bin/sh\nif [ "$1" = --version ]; then echo "Cuda compilation tools, release {version}, V{version}.1"\n'
            f"else printf '%s\\n' {known}; fi\n"
        )
        program.chmod(0o755)
        return str(program)

    return answering


@pytest.fixture
def compiler():
    return toolchain.Compiler(["g++"], ["baseline"])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("8.0", ["8.0"]),
        ("8.0 9.0a;10.0+PTX", ["8.0", "9.0a", "10.0+PTX"]),
        ("9.0;", ["9.0"]),
        ("Ampere", ["8.0", "8.6+PTX"]),
        ("Ampere+PTX", ["8.0", "8.6+PTX"]),
        ("8.0;Hopper", ["8.0", "9.0+PTX"]),
        ("Blackwell", ["10.0", "10.3", "12.0", "12.1+PTX"]),
        ("", ["8.0", "9.0", "10.0+PTX"]),
    ],
)
def test_gpus_are_listed_as_torch_has_them(nvcc, given, expected, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    assert toolchain.architectures(nvcc()) == expected


def test_names_are_torchs_own():
    """torch has more of them, for GPUs that no CUDA 12 compiles for."""
    text = (toolchain.find_torch().root / "utils" / "cpp_extension.py").read_text()
    for name, architectures in toolchain.NAMED_ARCHITECTURES.items():
        assert f"('{name}', '{architectures}')" in text, f"torch has other GPUs for {name}"


def test_a_gpu_has_code_and_where_asked_ptx():
    found = toolchain.Cuda("nvcc", ["8.0", "9.0a", "10.0+PTX"]).gencodes
    assert found == [
        "arch=compute_80,code=sm_80",
        "arch=compute_90a,code=sm_90a",
        "arch=compute_100,code=sm_100",
        "arch=compute_100,code=compute_100",
    ]


def test_an_older_nvcc_builds_what_it_knows_of_the_default(nvcc, compiler):
    nvcc("12.1", "sm_80 sm_86 sm_90")
    assert toolchain.choose_cuda_build(compiler).architectures == ["8.0", "9.0"]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("Amper", r"TORCH_CUDA_ARCH_LIST: 'Amper' is neither of the form 9\.0.* nor one of .*Ampere.*Blackwell"),
        ("9", r"TORCH_CUDA_ARCH_LIST: '9' is neither"),
        ("Volta", r"does not compile for 7\.0; it knows 8\.0, 8\.6, 9\.0, 10\.0"),
        ("8.0;13.7", r"does not compile for 13\.7"),
    ],
)
def test_gpus_that_cannot_be_built_for_stop_nothing_but_a_build_that_must_have_them(
    nvcc, compiler, given, reason, monkeypatch
):
    nvcc()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    found = toolchain.choose_cuda_build(compiler)
    assert isinstance(found, str)
    monkeypatch.setenv("LETS_KERNELS_CUDA", "1")
    with pytest.raises(SystemExit, match=r"LETS_KERNELS_CUDA=1 cannot be met: .*" + reason):
        toolchain.choose_cuda_build(compiler)
    assert str(found) in toolchain.about(found)[0]


def test_an_nvcc_that_is_too_old_is_named(nvcc, compiler):
    nvcc("11.8")
    assert "is of CUDA 11.8; CUDA 12.1 or later is needed" in toolchain.choose_cuda_build(compiler)


@pytest.mark.parametrize(
    ("command", "host"),
    [("g++", "g++"), ("ccache g++", "g++"), ("/usr/bin/sccache /opt/bin/clang++ -m64", "/opt/bin/clang++")],
)
def test_nvcc_gets_the_compiler_and_not_what_launches_it(command, host, tmp_path, monkeypatch):
    monkeypatch.setattr(toolchain, "declared", list)
    compiler = toolchain.Compiler(shlex.split(command), ["baseline"])
    torch = SimpleNamespace(root=tmp_path, version="2.13.0")
    text = toolchain.ninja_text(compiler, toolchain.Cuda("nvcc", ["9.0"]), torch, tmp_path, ".so")
    rules = [line for line in text.splitlines() if line.startswith("  command = nvcc")]
    assert len(rules) == 2
    assert all(f" -ccbin {host} " in line for line in rules)
    assert f"cxx = {command}" in text


def test_a_compiler_behind_a_launcher_is_found(tmp_path, monkeypatch):
    launcher = tmp_path / "ccache"
    launcher.write_text('#!/bin/sh\nexec "$@"\n')
    launcher.chmod(0o755)
    plain = toolchain.find_compiler()
    monkeypatch.setenv("CXX", shlex.join([str(launcher), *plain.command]))
    found = toolchain.find_compiler()
    assert (found.command, found.isas) == ([str(launcher), *plain.command], plain.isas)
    assert found.host == plain.command[0]


def torch_in(environment, version):
    """As much of a torch as is looked at."""
    package = environment / "lib" / "python3.12" / "site-packages" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "version.py").write_text(f"__version__ = '{version}'\n")
    return package


def test_an_isolated_build_finds_the_torch_of_the_environment_that_was_active(tmp_path, monkeypatch):
    """Any recent enough one, of whatever Python: the kernels use its stable ABI."""
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda name: str(tmp_path / "isolated"))
    monkeypatch.setattr(toolchain.site, "getsitepackages", list)
    monkeypatch.setattr(toolchain.site, "getusersitepackages", lambda: str(tmp_path / "user"))
    monkeypatch.delenv("LETS_KERNELS_TORCH", raising=False)
    old, new = torch_in(tmp_path / "old", "2.9.1"), torch_in(tmp_path / "new", "2.10.0+cpu")
    monkeypatch.setenv("PATH", str(tmp_path / "old" / "bin"))
    assert toolchain.find_torch() is None
    monkeypatch.setenv("PATH", os.pathsep.join(["", str(tmp_path / "old" / "bin"), str(tmp_path / "new" / "bin")]))
    assert toolchain.find_torch() == ("2.10.0+cpu", new)
    for said in (tmp_path / "new", new.parent):
        monkeypatch.setenv("LETS_KERNELS_TORCH", str(said))
        assert toolchain.find_torch() == ("2.10.0+cpu", new)
    monkeypatch.setenv("LETS_KERNELS_TORCH", str(old.parent))
    with pytest.raises(SystemExit, match=r"LETS_KERNELS_TORCH=.*: no torch >= 2\.10; name an environment"):
        toolchain.find_torch()


@pytest.mark.parametrize("given", ["auto", "", None])
def test_jobs_follow_cores_and_memory_where_nobody_says(given, monkeypatch):
    monkeypatch.delenv("MAX_JOBS", raising=False)
    if given is not None:
        monkeypatch.setenv("MAX_JOBS", given)
    assert 1 <= toolchain.parallel_jobs() <= (os.cpu_count() or 1)


def test_jobs_can_be_said(monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "7")
    assert toolchain.parallel_jobs() == 7
    monkeypatch.setenv("MAX_JOBS", "many")
    with pytest.raises(SystemExit, match=r"MAX_JOBS='many': must be auto or a whole number"):
        toolchain.parallel_jobs()


def test_the_module_says_for_which_gpus_it_was_built_or_why_for_none():
    assert bool(native._C.CUDA_ARCHITECTURES) == native.CUDA_LIBRARY.exists()
    assert bool(native._C.WITHOUT_CUDA) != native.CUDA_LIBRARY.exists()
    if native.CUDA_LIBRARY.exists() and "TORCH_CUDA_ARCH_LIST" not in os.environ:
        assert set(native._C.CUDA_ARCHITECTURES.split(";")) <= set(toolchain.ARCHITECTURES.split(";"))


def test_whoever_asked_for_no_cuda_kernels_reads_that(monkeypatch, tmp_path):
    """And not that there was no nvcc."""
    monkeypatch.setattr(native, "_C", SimpleNamespace(WITHOUT_CUDA="LETS_KERNELS_CUDA=0"))
    monkeypatch.setattr(native, "CUDA_LIBRARY", tmp_path / "_cuda.so")
    said = native.load_cuda.__wrapped__()
    assert said == "lets_kernels was installed without CUDA kernels: LETS_KERNELS_CUDA=0"
