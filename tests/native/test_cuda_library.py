"""What can be said of the CUDA library without a GPU: registers, instructions, symbols, what loading it answers."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lets_kernels
from lets_kernels.ops import native
from support.machine_code import disassembled, functions

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = native.CUDA_LIBRARY
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
# The streaming kernels, with the lists that they read and write: each by 128-bit instructions, at least one a list.
LISTS = {
    "perturb_kernel": (2, 2),
    "restore_kernel": (1, 1),
    "sgd_kernel": (3, 2),
    "adam_kernel": (4, 3),
    "norm_kernel": (1, 0),
    "filter_kernel": (1, 0),
    "diagonal_kernel": (4, 0),
    "secant_kernel": (4, 0),
    "dots_kernel": (2, 0),
    "displacement_kernel": (3, 0),
    "combine_kernel": (2, 1),
    "average_kernel": (2, 2),
    "ascent_kernel": (2, 2),
    "bsam_kernel": (4, 2),
    "lion_kernel": (3, 2),
    "noise_kernel": (2, 1),
    "masked_kernel": (1, 1),  # masks are of bytes, as many of them as the pack has elements
    "count_above_kernel": (1, 0),
    "select_kernel": (1, 0),
    "largest_kernel": (1, 0),
    "peaks_kernel": (1, 1),
}
# Sums, with the 128-bit loads that are under way before the first of them is used, and the share of a kernel's variants
# that must have them: of the norm those without T for q = 1 and q = 2, two variants out of six.
IN_FLIGHT = {
    "norm_kernel": (4, 1 / 3),
    "dots_kernel": (4, 1),
    "displacement_kernel": (4, 1),
    "largest_kernel": (4, 1),
}
KERNELS = {*LISTS, "join_slots", "count_kernel", "set_kernel", "advance_kernel", "finite_kernel"}


def kernel_of(mangled):
    """perturb_kernel and so on, from a mangled name."""
    found = [name for name in KERNELS if f"{len(name)}{name}" in mangled]
    assert len(found) == 1, mangled
    return found[0]


def in_flight(body):
    """The most 128-bit loads that stand together, without arithmetic on numbers between them."""
    most = now = 0
    for line in body.splitlines():
        if "LDG.E.128" in line:
            now += 1
            most = max(most, now)
        elif re.search(r"\b(DADD|DFMA|DMUL|DSETP|F2F|FADD|FFMA|FMUL|FMNMX|FSETP|HADD2|PRMT)\b", line):
            now = 0
    return most


@pytest.fixture(scope="module")
def library():
    if not LIBRARY.exists() and os.environ.get("LETS_KERNELS_CUDA") != "1":
        pytest.skip("built without nvcc")
    return LIBRARY


@pytest.fixture(scope="module")
def tool():
    """cuobjdump: CUDA's own, or the one in Triton's package."""
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = shutil.which("cuobjdump") or str(bundled)
    assert Path(found).exists(), "no cuobjdump: neither CUDA's nor Triton's"
    return found


def test_no_kernel_spills_registers(library):
    """ptxas reports each kernel while it compiles it; the reports lie beside the objects."""
    built = {}
    for report in (ROOT / "build").glob("*/*.cuda.o.ptxas"):
        entry = None
        for line in report.read_text().splitlines():
            if found := re.search(r"Compiling entry function '(\S+)' for '(sm_\w+)'", line):
                entry = found.groups()
            elif "bytes stack frame" in line and entry:
                assert " 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in line, (entry, line)
                built.setdefault(entry[1], set()).add(kernel_of(entry[0]))
    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        assert set(built) == set(ARCHITECTURES)
    unknown = {name: kernels ^ KERNELS for name, kernels in built.items() if kernels != KERNELS}
    assert built and not unknown, f"LISTS here and csrc/cuda differ: {unknown}"


@pytest.fixture(scope="module")
def cubins(library, tool, tmp_path_factory):
    """The library's machine code, one file for each source and architecture."""
    folder = tmp_path_factory.mktemp("cubins")
    subprocess.run([tool, "-xelf", "all", str(library)], cwd=folder, capture_output=True, check=True)
    return folder


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_streaming_kernels_move_sixteen_bytes_at_a_time(cubins, architecture, tmp_path):
    codes, flights = {}, {}
    for cubin in cubins.glob(f"*.{architecture}.cubin"):
        codes |= functions(cubin.read_bytes())
    seen = {}
    for name, body in zip(codes, disassembled(list(codes.values()), architecture, tmp_path), strict=True):
        kernel = kernel_of(name)
        seen[kernel] = seen.get(kernel, 0) + 1
        flights.setdefault(kernel, []).append(in_flight(body))
        assert "LDL" not in body and "STL" not in body, f"{name} uses local memory"
        if kernel in LISTS:
            loads, stores = (body.count(f"{op}.E.128") for op in ("LDG", "STG"))
            assert loads >= LISTS[kernel][0], f"{name}: {loads} 128-bit loads"
            assert stores >= LISTS[kernel][1], f"{name}: {stores} 128-bit stores"
    assert set(seen) == KERNELS
    for kernel, (loads, share) in IN_FLIGHT.items():
        reached = sum(found >= loads for found in flights[kernel])
        assert reached >= share * len(flights[kernel]), f"{kernel}: {flights[kernel]} loads in flight"
    # four dtypes, two sizes of batch; three cases of q, with and without T; noise of filters, masks that are drawn
    several = {**dict.fromkeys(("norm_kernel", "perturb_kernel", "diagonal_kernel"), 3 * 2)}
    several |= {"noise_kernel": 2, "masked_kernel": 2}
    assert {name: seen[name] for name in LISTS} == {name: 4 * 2 * several.get(name, 1) for name in LISTS}


def test_the_machine_code_is_compressed(library, cubins):
    """To less than a quarter; an eighth was measured."""
    assert library.stat().st_size < sum(cubin.stat().st_size for cubin in cubins.glob("*.cubin")) / 4


def test_the_newest_code_is_there_as_ptx_for_newer_gpus(library, tool):
    listed = subprocess.run([tool, "-lptx", str(library)], capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"\.(sm_\w+)\.ptx", listed)) == {"sm_100"}


@pytest.mark.parametrize("path", [LIBRARY, Path(native._C.__file__)], ids=["cuda", "cpu"])
def test_the_stable_abi_is_all_that_is_used_of_torch(path):
    if not path.exists():
        pytest.skip("built without nvcc")
    symbols = subprocess.run(["nm", "-DC", "--undefined-only", path], capture_output=True, text=True, check=True).stdout
    assert "aoti_torch_get_data_ptr" in symbols
    assert not re.findall(r".*\b(?:at|c10)::.*", symbols)


def test_the_library_asks_for_libtorch_which_brings_the_stream(library):
    """The current stream's function is in a library that libtorch needs where torch has CUDA, and nobody else names."""
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", dynamic))
    assert {"libtorch.so", "libtorch_cpu.so"} <= needed
    assert not any("cudart" in name for name in needed), "the CUDA runtime is linked statically"


def test_where_torch_has_no_cuda_the_library_is_not_loaded_and_the_reason_is_given(library):
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    program = (
        "import lets_kernels; print(lets_kernels.backends()['cuda'])\n"
        "print('_cuda' in open('/proc/self/maps').read())\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == [f"not available: torch {torch.__version__} is built without CUDA", "False"]
    with pytest.raises(RuntimeError, match=r"backend='cuda' does not run here: torch .* is built without CUDA"):
        lets_kernels.SAM([torch.zeros(3, requires_grad=True)], torch.optim.SGD, lr=0.1, backend="cuda")
