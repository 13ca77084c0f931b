"""Every Triton kernel compiled (triton_compiled.py) for GPUs that need not be there: what its machine code shows."""

import itertools
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support.lengths import WHOLE, at_length

triton = pytest.importorskip("triton", reason="Triton is not installed")

HERE = Path(__file__).resolve().parent
#: Each GPU is compiled other variants for: all of them are somewhere only where all GPUs are there.
ARCHES, AMD = at_length((80, 90, 100), (90,)), at_length(("gfx942", "gfx950"), ("gfx942",))
of_all_gpus = pytest.mark.skipif(not WHOLE, reason="compiled for all GPUs by `make long`")
DTYPES = ("fp32", "fp64", "bf16", "fp16")
#: Those of every kernel in every run: one of each arithmetic type.
OFTEN, OFTEN_AMD = at_length(DTYPES, ("fp64", "bf16")), at_length(DTYPES, ("fp32",))
#: Kernels that stream through whole runs: how many lists they read, of those that can be left out, and write.
STREAMING = {
    "norm_kernel": (1, "SCALED", 0),
    "long_filters_kernel": (1, None, 0),
    "perturb_kernel": (2, None, 2),
    "restore_kernel": (1, None, 1),
    "sgd_kernel": (2, "MOMENTUM", 1),
    "adam_kernel": (4, None, 3),
    "diagonal_kernel": (3, "TRAIN", 0),
    "secant_kernel": (3, "TRAIN", 0),
}
#: Those of the other methods, for some dtypes on each GPU.
SAMPLED = {
    "dots_kernel": (2, None, 0),
    "displacement_kernel": (3, None, 0),
    "combine_kernel": (2, None, 1),
    "average_kernel": (2, None, 1),
    "ascent_kernel": (2, None, 2),
    "bsam_kernel": (4, None, 2),
    "lion_kernel": (3, None, 2),
    "noise_kernel": (0, "VECTORS", 1),
    "masked_kernel": (1, None, 1),
    "count_kernel": (0, "VECTORS", 0),
    "largest_kernel": (1, None, 0),
    "peaks_kernel": (1, None, 1),
}
#: Lists that are written only where a constant says so.
WRITTEN = ("MOMENTUM", "OUT")
ONCE = {"finite_kernel", "adam_counts_kernel", "add_slots", "updates_kernel", "largest_slot"}
DIVIDING = {"adam_kernel", "ascent_kernel", "bsam_kernel", "noise_kernel"}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """The facts by architecture. Two programs at a time, each with an empty cache, without the interpreter."""
    folder = tmp_path_factory.mktemp("triton")

    def compile_for(*arches):
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment |= {
            "TRITON_CACHE_DIR": str(folder / "-".join(arches)),
            "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, str(HERE / "triton_compiled.py"), *arches]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout)

    with ThreadPoolExecutor(2) as pool:
        programs = [*((str(arch),) for arch in ARCHES), AMD]
        return dict(itertools.chain(*(found.items() for found in pool.map(lambda them: compile_for(*them), programs))))


@pytest.fixture(scope="module")
def built(reports):
    return {arch: reports[str(arch)] for arch in ARCHES}


@pytest.fixture(scope="module")
def amd(reports):
    return {arch: reports[arch] for arch in AMD}


def divides(k):
    """Whether a kernel divides; where T is that of the Fisher information, each that scales does."""
    return k["kernel"] in DIVIDING or k.get("SCALED", 0) >= 4


def kernels(built, *names, **constants):
    found = [
        (arch, k)
        for arch, report in built.items()
        for k in report["kernels"]
        if (not names or k["kernel"] in names) and all(k.get(c) == v for c, v in constants.items())
    ]
    assert found
    return found


def test_every_kernel_compiles_in_every_dtype_for_every_architecture(built):
    for arch in ARCHES:
        seen = {(k["kernel"], k.get("DTYPE")) for k in built[arch]["kernels"]}
        of_a_dtype = {(name, d) for name in {*STREAMING, "short_filters_kernel"} for d in OFTEN}
        some = {*SAMPLED, "select_kernel"}
        assert {(name, d) for name, d in seen if name not in some} == of_a_dtype | {(name, None) for name in ONCE}
        assert {name for name, _ in seen} >= some


@of_all_gpus
def test_the_kernels_of_vectors_compile_in_every_dtype(built):
    for name in SAMPLED:
        assert {k["DTYPE"] for _, k in kernels(built, name)} == set(DTYPES)


def test_no_kernel_is_left_out(built):
    """Those that the files of the ops have, by their decorator."""
    sources = (HERE.parents[1] / "lets_kernels" / "ops" / "triton").glob("*.py")
    written = re.findall(r"^@kernel\ndef (\w+)\(", "\n".join(map(Path.read_text, sources)), re.MULTILINE)
    assert set(written) - {k["kernel"] for _, k in kernels(built)} == set(), "KERNELS of triton_compiled.py lacks some"


@of_all_gpus
def test_every_variant_is_compiled_somewhere(built):
    def values(name, constant):
        return {k[constant] for _, k in kernels(built, name)}

    for name in ("norm_kernel", "perturb_kernel", "diagonal_kernel"):
        seen = {(k["POWER"], k["SCALED"]) for _, k in kernels(built, name)}
        assert {(p, s) for p, s in seen if s < 4} == {(p, s) for p in (0, 1, 2) for s in (0, 1, 2)}
        assert {s for _, s in seen} == {0, 1, 2, 4, 5, 6} and {p for p, s in seen if s > 2} == {0, 1, 2}
    for constant in ("MOMENTUM", "NESTEROV", "MAXIMIZE"):
        assert values("sgd_kernel", constant) == {False, True}
    for constant in ("DECOUPLED", "MAXIMIZE"):
        assert values("adam_kernel", constant) == {False, True}
    for name in ("diagonal_kernel", "secant_kernel"):
        assert values(name, "TRAIN") == {False, True}
    for constant in ("VECTORS", "PRECISIONS", "FILTERS"):
        assert values("noise_kernel", constant) == {False, True}
    for name in ("count_kernel", "select_kernel"):
        assert {(k["VECTORS"], k["MEMBER"]) for _, k in kernels(built, name)} == {(True, True), (False, False)}
    assert values("average_kernel", "OUT") == values("masked_kernel", "GIVEN") == {False, True}
    for name in STREAMING | SAMPLED:
        assert values(name, "ALIGNED") == {False, True}


def test_no_kernel_spills(built):
    """Division and root of doubles are calls where they are not easy: around these a few registers may be put aside."""
    for arch, k in kernels(built):
        called = divides(k) and k["C"] == "fp64"
        assert k["local"] <= 8 * called and k["stack"] <= 32 * called, f"sm_{arch}: {k}"


def test_aligned_kernels_read_and_write_16_bytes_at_a_time(built):
    """A block is 32 bytes a list and thread, 16 where there are 8 warps; the end of a run goes element by element."""
    for name, (read, optional, written) in (STREAMING | SAMPLED).items():
        for arch, k in kernels(built, name, ALIGNED=True):
            each = 1 if k["warps"] == 8 else 2
            assert k["loads"] >= each * (read + bool(optional and k[optional])), f"sm_{arch}: {k}"
            stored = written + any(k.get(c) is True for c in WRITTEN)
            assert (k["stores"] >= each * stored) if stored else k["stores"] == 0, f"sm_{arch}: {k}"


@of_all_gpus
def test_unaligned_kernels_do_not(built):
    """A 16-byte access to an address that is not a multiple of 16 is a fault."""
    for arch, k in kernels(built, *STREAMING, *SAMPLED, "select_kernel", ALIGNED=False):
        assert k["loads"] == 0 and k["stores"] == 0, f"sm_{arch}: {k}"


def test_no_product_and_sum_are_fused(built):
    """One rounding for each operation, as on the CPU. What is left are the insides of division, square root and pow:
    the one fused operation in perturb_kernel (two with pow's) tests the exponent of a quotient of doubles."""
    for arch, k in kernels(built):
        assert not k["fusion_allowed"]
        # For sm_100 the ptxas of Triton 3.6 fuses pairs of products and sums even where they are told to round (.rn).
        if not (arch == 100 and triton.__version__.startswith("3.6.")):
            assert k["fused_pairs"] == 0, f"sm_{arch}: {k}"
        if divides(k) and k.get("POWER") != 0:
            assert k["fused_in_ptx"] == 0, f"sm_{arch}: {k}"
        elif k["kernel"] == "perturb_kernel":
            own = k["fused"] - k["fused_in_ptx"]
            assert (own <= 2 or divides(k)) and (k["fused_in_ptx"] == 0 or k["POWER"] == 0), f"sm_{arch}: {k}"
        else:
            assert k["fused"] == 0 or divides(k), f"sm_{arch}: {k}"
    assert all(k["products"] > 0 for _, k in kernels(built, "sgd_kernel", C="fp32"))  # the products are there, unfused


def test_division_and_root_are_correctly_rounded(built):
    for arch, k in kernels(built):
        single = divides(k) and (k["C"] == "fp32" or k["kernel"] == "noise_kernel")  # normal numbers are in float32
        root = ["sqrt.rn.f32"] * (k["kernel"] != "bsam_kernel")
        assert k["divisions"] == (["div.rn.f32", *root] if single else []), f"sm_{arch}: {k}"


@of_all_gpus
def test_no_value_of_a_runtime_argument_compiles_a_kernel_again(built):
    """Rates, radii, 1 and 0 and multiples of 16 among them, one for all runs or one a run, the number of runs and where
    they lie."""
    assert built[ARCHES[0]]["again"] == 0


def test_every_kernel_compiles_for_amd(built, amd):
    """The binary offers the kernel, and its descriptor of 64 bytes; each dtype is compiled for one of the two."""
    for arch in AMD:
        assert {k["kernel"] for _, k in kernels({arch: amd[arch]})} == {k["kernel"] for _, k in kernels(built)}
    for name in {*STREAMING, "short_filters_kernel"}:
        assert {k["DTYPE"] for _, k in kernels(amd, name)} == set(OFTEN_AMD)
    for arch, k in kernels(amd):
        assert k["code"] > 0 and k["descriptor"] == 64, f"{arch}: {k}"


def test_no_kernel_for_amd_spills(amd):
    """Scalar registers are put aside in vector registers, not in memory, and only around the power of a double."""
    for arch, k in kernels(amd):
        assert k["scratch"] == k["spilled"] == 0 and (k["scalars"] == 0 or k["POWER"] == 0), f"{arch}: {k}"


def test_aligned_kernels_for_amd_read_and_write_as_wide_as_a_block_allows(amd):
    """16 bytes a thread, 8 where there are 8 warps."""
    for name, (read, optional, written) in (STREAMING | SAMPLED).items():
        for arch, k in kernels(amd, name, ALIGNED=True):
            assert k["loads"] >= read + bool(optional and k[optional]), f"{arch}: {k}"
            assert k["stores"] >= written + any(k.get(c) is True for c in WRITTEN), f"{arch}: {k}"


def test_no_product_and_sum_are_fused_for_amd(amd):
    """Of the kernels that compute no quotient, root or power, nor which filter an element belongs to."""
    plain = [(arch, k) for arch, k in kernels(amd) if not (divides(k) or "SCALED" in k or "filters" in k["kernel"])]
    assert {"sgd_kernel", "lion_kernel", "combine_kernel"} < {k["kernel"] for _, k in plain}
    for arch, k in plain:
        assert k["fused"] == 0, f"{arch}: {k}"
    assert all(k["products"] > 0 for _, k in kernels(amd, "sgd_kernel", C="fp32"))
