"""The choice of backend: by argument, by environment, by what runs here; errors that say why; the command line."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import lets_kernels
from lets_kernels import __main__ as command
from lets_kernels import ops
from lets_kernels.step import fallback
from support.inside import space

CUDA, CPU, XPU = torch.device("cuda", 0), torch.device("cpu"), torch.device("xpu", 0)


def optimizer(**options):
    return lets_kernels.SAM([torch.zeros(3, requires_grad=True)], torch.optim.SGD, lr=0.1, **options)


def test_every_backend_says_what_it_is_or_why_it_does_not_run():
    found = lets_kernels.backends()
    assert tuple(found) == ("cuda", "triton", "cpu", "foreach", "reference")
    assert found["reference"].startswith("available: ")
    assert found["cpu"].startswith("available: compiled C++, instruction set ")
    assert all(reason.startswith(("available: ", "not available: ")) for reason in found.values())


@pytest.mark.parametrize("name", ["cpu", "foreach", "reference"])
def test_a_backend_is_taken_by_argument_and_by_environment(name, monkeypatch):
    def taken(opt):
        opt.param_groups[0]["params"][0].grad = torch.ones(3)
        opt.first_step()
        opt.second_step()
        return [b.backend for b in space(opt).buckets]

    assert taken(optimizer(backend=name)) == [name]
    monkeypatch.setenv("LETS_KERNELS_BACKEND", name)
    assert taken(optimizer()) == [name]
    monkeypatch.delenv("LETS_KERNELS_BACKEND")
    assert taken(optimizer()) == ["cpu"]


def test_an_argument_beats_the_environment(monkeypatch):
    monkeypatch.setenv("LETS_KERNELS_BACKEND", "nonsense")
    optimizer(backend="reference")
    with pytest.raises(ValueError, match=r"LETS_KERNELS_BACKEND=nonsense: choose one of auto, cuda"):
        optimizer()


def test_unknown_and_impossible_backends_say_why():
    with pytest.raises(ValueError, match="choose one of auto, cuda, triton, cpu, foreach, reference"):
        optimizer(backend="cpp")
    with pytest.raises(RuntimeError, match=r"backend='cuda' does not run here: .*backend='auto'"):
        optimizer(backend="cuda")
    with pytest.raises(RuntimeError, match="no kernels for parameters on meta"):
        ops.choose("cpu", torch.device("meta"))


WITHOUT = (
    "import sys; sys.modules['lets_kernels._C'] = None\n"
    "import torch, lets_kernels\n"
    "def trained(**options):\n"
    "    p = torch.ones(3, requires_grad=True)\n"
    "    opt = lets_kernels.SAM([p], torch.optim.SGD, lr=0.1, **options)\n"
    "    def closure():\n"
    "        opt.zero_grad(); loss = (p ** 2).sum(); loss.backward(); return loss\n"
    "    opt.step(closure)\n"
    "    assert p[0] < 1\n"
    "    print(opt.backend)\n"
)


def without_the_extension(program, **environment):
    """The program in a process in which lets_kernels._C cannot be imported, as after an install without a compiler."""
    command = [sys.executable, "-c", WITHOUT + program]
    result = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    return result.stdout.splitlines(), result.stderr


def test_without_the_extension_the_package_runs_on_torch_s_functions_and_says_so_once():
    program = "trained(); trained()\nprint(lets_kernels.backends()['cpu'])\n"
    (*backends, reason), warned = without_the_extension(program, PYTHONWARNINGS="always")
    assert backends == ["foreach"] * 2
    assert reason.startswith("not available: the compiled extension lets_kernels._C could not be imported")
    assert "LETS_KERNELS_CPU=1" in reason
    assert warned.count("UserWarning: no compiled kernels run here: the steps of parameters on cpu go through") == 1
    assert "backend='foreach' asks for them" in warned and "reinstall with a C++ compiler" in warned


def test_who_asks_for_torch_s_functions_or_the_reference_is_not_warned():
    program = "trained(backend='foreach'); trained(backend='reference')\n"
    assert without_the_extension(program, PYTHONWARNINGS="error") == (["foreach", "reference"], "")
    environment = {"PYTHONWARNINGS": "error", "LETS_KERNELS_BACKEND": "foreach"}
    assert without_the_extension("trained()\n", **environment) == (["foreach"], "")


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_a_gpu_without_kernels_is_named_with_the_reasons_of_each_backend(kind, monkeypatch):
    reasons = {"cuda": "built without nvcc", "triton": "No module named 'triton'"}
    monkeypatch.setattr(ops, "load", lambda name: (ops.foreach, "") if name == "foreach" else (None, reasons[name]))
    monkeypatch.setattr(fallback, "_said", set())
    bucket = SimpleNamespace(backend="foreach", device=torch.device(kind, 0), params=[torch.ones(1)])
    with pytest.warns(
        UserWarning, match=f"on {kind}:0 .*; cuda: built without nvcc; triton: No module named 'triton'$"
    ):
        fallback.warn_without_kernels("auto", [bucket])
    fallback.warn_without_kernels("auto", [bucket])  # once a process


@pytest.mark.parametrize("change", [{"backend": "cpu"}, {"device": torch.device("meta")}])
def test_there_is_no_warning_where_kernels_run_or_none_could(change, monkeypatch):
    monkeypatch.setattr(fallback, "_said", set())
    bucket = {"backend": "foreach", "device": CPU, "params": [torch.ones(1)]}
    fallback.warn_without_kernels("auto", [SimpleNamespace(**{**bucket, **change})])
    assert not fallback._said


def test_importing_the_package_downloads_builds_and_probes_nothing():
    """Importing leaves Triton, ninja and the test tools alone, and does not initialise CUDA."""
    program = (
        "import sys, lets_kernels, torch\n"
        "print([m for m in ('triton', 'ninja', 'setuptools', 'sklearn', 'matplotlib', 'rich') if m in sys.modules])\n"
        "print(torch.cuda.is_initialized())\n"
    )
    plain = "import sys, torch\nprint([m for m in ('triton', 'ninja', 'setuptools') if m in sys.modules])\n"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before = subprocess.run([sys.executable, "-c", plain], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == [before.stdout.strip(), "False"]


def test_importing_the_package_imports_neither_dtensors_nor_fsdp():
    """They take seconds, and most who use the package have none."""
    names = ("torch.distributed.tensor", "torch.distributed.fsdp")
    program = f"import sys, lets_kernels\nprint([m for m in {names} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_instruction_set_can_be_chosen_by_environment():
    program = "from lets_kernels.ops import native; print(native._C.cpu_isa())"
    environment = {**os.environ, "LETS_KERNELS_CPU_ISA": "baseline"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == "baseline"
    environment["LETS_KERNELS_CPU_ISA"] = "sse9"
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert "'sse9' does not run here; choose from: baseline" in result.stderr


def test_the_command_line_prints_what_runs(capsys):
    assert command.main([]) == 0
    printed = capsys.readouterr().out
    assert f"lets_kernels {lets_kernels.__version__}" in printed
    assert "Parameters on the CPU run on: cpu" in printed
    with pytest.raises(SystemExit):
        command.main(["nonsense"])
    assert "choose from" in capsys.readouterr().err


class Pretended:
    """A backend as `ops.load` finds it, with what the CUDA library would say of a device."""

    def __init__(self, refuses=None, interpreted=False):
        self.INTERPRETED, self._refuses = interpreted, refuses

    def refuses_device(self, index):
        return self._refuses


@pytest.mark.parametrize(
    ("found", "device", "expected"),
    [
        ({"cuda": Pretended(), "triton": Pretended()}, CUDA, "cuda"),
        ({"cuda": Pretended("built for others"), "triton": Pretended()}, CUDA, "triton"),
        ({"triton": Pretended()}, CUDA, "triton"),
        ({"cuda": Pretended()}, XPU, "foreach"),
        ({"cuda": Pretended(), "triton": Pretended()}, XPU, "triton"),
        ({}, CUDA, "foreach"),
        ({"cuda": Pretended(), "triton": Pretended(), "cpu": Pretended()}, CPU, "cpu"),
        ({"triton": Pretended(interpreted=True)}, CPU, "foreach"),
        ({"cpu": Pretended()}, torch.device("meta"), "foreach"),
    ],
)
def test_the_fastest_backend_that_runs_on_a_device_is_taken(found, device, expected, monkeypatch):
    modules = {"foreach": (ops.foreach, ""), **{name: (module, "") for name, module in found.items()}}
    monkeypatch.setattr(ops, "load", lambda name: modules.get(name, (None, "not here")))
    assert ops.choose("auto", device)[0] == expected


def test_a_backend_that_runs_elsewhere_only_says_so(monkeypatch):
    modules = {"cuda": Pretended("built for others"), "triton": Pretended(), "cpu": Pretended()}
    monkeypatch.setattr(ops, "load", lambda name: (modules[name], ""))
    with pytest.raises(RuntimeError, match=r"backend 'cuda' does not run here: built for others; use 'auto'"):
        ops.choose("cuda", CUDA)
    with pytest.raises(RuntimeError, match=r"backend 'triton' does not run here: it has no kernels for .* on cpu"):
        ops.choose("triton", CPU)
    with pytest.raises(RuntimeError, match=r"backend 'cpu' does not run here: it has no kernels for .* on cuda:0"):
        ops.choose("cpu", CUDA)


def test_the_command_line_says_why_a_gpu_does_not_get_the_best(monkeypatch, capsys):
    modules = {"cuda": (Pretended("built for others"), "compiled"), "triton": (Pretended(), "Triton 3")}
    real = ops.load
    monkeypatch.setattr(ops, "load", lambda name: modules.get(name) or real(name))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    command.main([])
    printed = capsys.readouterr().out
    assert "Parameters on cuda:0 (Some GPU) run on: triton\n  not on cuda: built for others\n" in printed
