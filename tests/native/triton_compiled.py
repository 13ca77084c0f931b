"""A program, run by test_triton_aot.py: compiles what the Triton backend launches, for GPUs that need not be there.

A driver that launches nothing stands in for the GPU's, so every kernel is compiled from the very arguments and options
that the ops pass to it. Takes architectures (90 for sm_90, or gfx942) and prints one JSON object with an object for
each: ``kernels``, a list of facts about the machine code of each kernel; ``again``, how many of them other values of
runtime arguments made compile again.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

from lets_kernels.ops import triton as ops
from lets_kernels.ops.declared import FISHER
from lets_kernels.ops.triton import (
    average,
    combine,
    device,
    launch,
    mask,
    noise,
    norm,
    peaks,
    perturb,
    rho,
    step,
)
from support.guard_bands import Bucket, Run
from support.lengths import at_length
from support.machine_code import disassembled, functions, symbols

ARCHES, AMD = (80, 90, 100), ("gfx942", "gfx950")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
#: In every run one of each arithmetic type, and the vectors' kernels in another; for AMD one, and another.
OFTEN, VECTORS = at_length((0, 1, 2, 3), (1, 2)), at_length((0, 1, 2, 3), (3,))
KERNELS = (
    norm.norm_kernel, norm.long_filters_kernel, norm.short_filters_kernel, norm.finite_kernel, perturb.perturb_kernel,
    perturb.restore_kernel, step.sgd_kernel, step.adam_kernel, step.lion_kernel, step.adam_counts_kernel,
    rho.diagonal_kernel, rho.secant_kernel, device.add_slots, combine.dots_kernel, combine.displacement_kernel,
    combine.combine_kernel, average.average_kernel, average.updates_kernel, average.ascent_kernel, step.bsam_kernel,
    noise.noise_kernel, mask.masked_kernel, mask.count_kernel, mask.select_kernel, peaks.largest_kernel,
    peaks.largest_slot, peaks.peaks_kernel,
)  # fmt: skip


class Driver:
    """What Triton asks of a GPU's driver."""

    def __init__(self, arch, device):
        self.arch, self.device = arch, device
        self.utils = self

    def get_current_target(self):
        return GPUTarget("hip", self.arch, 64) if self.arch in AMD else GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 0

    def get_device_properties(self, device):
        return {"max_shared_mem": 1 << 17}

    def load_binary(self, name, binary, shared, device):
        return object(), 0, 0, 0, 1024

    def unload_module(self, module):
        pass

    def launcher_cls(self, source, metadata):
        return lambda *grid_and_arguments: None


def scalar(x=1.0):
    return torch.tensor(x, dtype=torch.float64)


def of_runs(bucket, *numbers):
    """A number of each run instead of each of these."""
    return ([x / (i + 1) for i in range(len(bucket.runs))] for x in numbers)


def call_all(
    bucket, q=2.0, momentum=0.9, nesterov=False, maximize=False, decoupled=True, lr=0.1,
    numbers=(0.01, 0.9, 0.99, 1e-8), rho=None,
):  # fmt: skip
    """Every op of SAM, ASAM and LETS once."""
    xi, beta1, beta2, eps = numbers
    theta, g, h, m, v = (bucket.give(bucket.values(), "list") for _ in range(5))
    saved, dirty = torch.zeros(bucket.total, dtype=bucket.dtype), torch.tensor(1)
    scaling = bucket.table, bucket.norms(), xi, q
    ops.grad_norm(g, theta, *scaling)
    ops.filter_norms(theta, bucket.table, bucket.norms())
    ops.perturb_(theta, g, saved, dirty, *scaling, scalar(), scalar() if rho is None else rho)
    ops.restore_(theta, saved, dirty, bucket.table)
    options = scalar(), lr, momentum, eps, nesterov, maximize
    ops.restore_sgd_(theta, g, m if momentum else [], saved, dirty, bucket.table, *options)
    steps = [torch.zeros(()) for _ in bucket.runs]
    options = scalar(), lr, beta1, beta2, eps, xi, decoupled, maximize
    ops.restore_adamw_(theta, g, m, v, steps, saved, dirty, bucket.table, *options)
    ops.rho_grad_diagonal(g, h if momentum else [], m, v, theta, *scaling)
    ops.rho_grad_secant(g, h if momentum else [], m, v, bucket.table)
    ops.all_finite_([scalar(), scalar()], torch.tensor(0))


def call_vectors(bucket, given=True, other=False, lr=0.1, numbers=(0.01, 0.9, 0.99, 1e-8), by_run=False):
    """Every op of the other methods once; ``given`` and ``other`` say what is not left out."""
    xi, beta1, beta2, eps = numbers
    rate, decay, first, second = of_runs(bucket, lr, xi, beta1, beta2) if by_run else (lr, xi, beta1, beta2)
    theta, g, h, m, v = (bucket.give(bucket.values(), "list") for _ in range(5))
    saved, dirty, table = torch.zeros(bucket.total, dtype=bucket.dtype), torch.tensor(1), bucket.table
    draw, mask = (torch.tensor([1, 2]), int(lr)), torch.zeros(bucket.total, dtype=torch.uint8)
    member = int(lr) if given else -1
    ops.dots(g, h, table)
    ops.displacement_dots(g, theta, saved, table)
    ops.combine_(g, h, m, table, torch.ones(2, dtype=torch.float64), scalar())
    ops.average_(m, g, v if given else [], torch.tensor(0), table, scalar(), beta1, xi, eps)
    ops.posterior_ascent_(h, v, g, table, scalar(), beta2, decay)
    ops.restore_bsam_(theta, g, m, v, saved, dirty, table, scalar(), rate, first, decay)
    ops.restore_lion_(theta, g, m, saved, dirty, table, scalar(), rate, first, second, decay)
    ops.noise_(h, g if given else [], v if other else [], table, bucket.norms(), *draw, xi, eps)
    ops.masked_(h, g, mask if other else None, table, *draw, 1 / (1 + lr))
    ops.count_above(g if given else [], mask, table, torch.tensor(1), *draw, member)
    ops.select_(mask, g if given else [], table, torch.tensor(1), *draw, member, int(lr))
    ops.largest(g, table)
    ops.peaks_(h, g, table, scalar())


def call_scaled(bucket, q):
    """The ops that scale their vectors."""
    theta, g = (bucket.give(bucket.values(), "list") for _ in range(2))
    scaling = bucket.table, bucket.norms(), 0.01, q
    ops.grad_norm(g, theta, *scaling)
    saved = torch.zeros(bucket.total, dtype=bucket.dtype)
    ops.perturb_(theta, [], saved, torch.tensor(0), *scaling, scalar(), scalar())
    ops.rho_grad_diagonal(g, g, g, g, theta, *scaling)


def compiled():
    """Triton's compiled kernels for the current device, with their names."""
    device = triton.runtime.driver.active.get_current_device()
    for kernel in KERNELS:
        if device in kernel.device_caches:
            for built in kernel.device_caches[device][0].values():
                yield kernel.__name__, built


def resources(binary):
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(binary)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def variant(name, built):
    """Which kernel it is, and its constants."""
    names = built.src.fn.arg_names
    constants = {names[k[0]]: v if isinstance(v, (int, bool)) else str(v) for k, v in built.src.constants.items()}
    return {"kernel": name, **constants, "warps": built.metadata.num_warps}


def facts(name, built, code, folder):
    """What the PTX and the machine code of one kernel say."""
    binary = Path(folder) / "kernel.cubin"
    binary.write_bytes(built.asm["cubin"])
    usage, ptx = resources(binary), built.asm["ptx"]
    return {
        **variant(name, built),
        "loads": len(re.findall(r"\bLDG\.E\.128\b", code)),
        "stores": len(re.findall(r"\bSTG\.E\.128\b", code)),
        "local": len(re.findall(r"\b(?:LDL|STL)\b", code)) + ptx.count(".local"),
        "stack": int(re.search(r"STACK:(\d+)", usage).group(1)),
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "fused": len(re.findall(r"\bFFMA\b", code)),
        "fused_pairs": len(re.findall(r"\bFFMA2\b", code)),
        "fused_in_ptx": len(re.findall(r"\bfma\.rn(?:\.ftz)?\.f32\b", ptx)),
        "products": len(re.findall(r"\bFMUL", code)),
        "fusion_allowed": built.metadata.enable_fp_fusion,
        "divisions": sorted(set(re.findall(r"\b(?:div|sqrt)\.[a-z.]*f32\b", ptx))),
    }


def amd_facts(name, built):
    """What the assembly and the binary of one kernel for a GPU of AMD say."""
    text, offered = built.asm["amdgcn"], symbols(built.asm["hsaco"])

    def resource(what):
        return int(re.search(rf"^ +\.{what}: +(\d+)$", text, re.MULTILINE).group(1))

    wide = f"dwordx{16 // built.metadata.num_warps}"  # a block is 16 bytes a list and thread, 8 where there are 8 warps
    return {
        **variant(name, built),
        "code": offered[name],
        "descriptor": offered[f"{name}.kd"],
        "scratch": resource("private_segment_fixed_size"),
        "spilled": resource("vgpr_spill_count"),
        "scalars": resource("sgpr_spill_count"),
        "loads": len(re.findall(rf"\b(?:buffer|global)_load_{wide}\b", text)),
        "stores": len(re.findall(rf"\b(?:buffer|global)_store_{wide}\b", text)),
        "fused": len(re.findall(r"\bv_(?:pk_)?(?:fma|mad|mac)[a-z]*_f(?:32|64)", text)),
        "products": len(re.findall(r"\bv_(?:pk_)?mul_f32", text)),
    }


def rows(dtype, scale, times=1, **options):
    return Bucket([Run((40, 512), (512, 40)), Run((30, 20), (20, 30))] * times, dtype, scale, **options)


def again():
    """How many kernels other values compile, of whatever is not constexpr."""
    before = {id(built) for _, built in compiled()}
    for lr, numbers in ((1.0, (1.0, 1.0, 1.0, 1.0)), (0.0, (0.0, 0.0, 0.0, 0.0)), (16.0, (16.0, 0.5, 16.0, 16.0))):
        call_all(rows(torch.float32, "filter"), lr=lr, numbers=numbers)
        call_vectors(rows(torch.float32, "filter"), lr=lr, numbers=numbers)
    bucket = rows(torch.float32, "filter")
    call_vectors(bucket, by_run=True)
    lr, momentum, *numbers = of_runs(bucket, 0.1, 0.9, 0.01, 0.9, 0.99, 1e-8)
    call_all(bucket, lr=lr, momentum=momentum, numbers=numbers, rho=torch.ones(len(bucket.runs)).double())
    for call in (call_all, call_vectors):
        call(rows(torch.float32, "filter", times=8))
        call(rows(torch.float32, "filter", first_start=16))
    return sum(id(built) not in before for _, built in compiled())


def amd(arch):
    """Every kernel, in half of the dtypes for each GPU, and for vectors in one: all would take half a minute more."""
    which = AMD.index(arch)
    for dtype, q in [*zip(DTYPES[which::2], (2.0, (1.0, 1.5)[which]), strict=True)][: at_length(2, 1)]:
        call_all(rows(dtype, "filter"), q)
    dtype = DTYPES[which::2][1]
    call_vectors(rows(dtype, "plain"), other=bool(which))
    return {"kernels": [amd_facts(*one) for one in compiled()]}


def nvidia(arch):
    kinds = list(itertools.product((2.0, 1.0, 1.5), ("filter", "plain", "element")))
    which = ARCHES.index(arch)
    for i in sorted({*OFTEN, *VECTORS}):
        dtype = DTYPES[i]
        at = which * len(DTYPES) + i  # each variant is compiled somewhere, and each dtype for each GPU
        q, scale = kinds[at % len(kinds)]
        flags = {"nesterov": at % 2 == 1, "maximize": at % 3 == 1, "decoupled": at % 5 < 3}
        if i in OFTEN:
            call_all(rows(dtype, scale), q, 0.0 if at % 5 == 4 else 0.9, **flags)
        if i in VECTORS and (which + i) % 2 == 0:  # of these every other dtype for each GPU: all would take too long
            n = which * 2 + i // 2
            call_vectors(rows(dtype, "filter" if n < 2 else "plain"), given=n < 5, other=n in (1, 3))
        if i in OFTEN:
            bucket = rows(dtype, "filter")
            ops.filter_norms(bucket.give(bucket.values(), "list"), bucket.table, bucket.norms())
    bucket = rows(DTYPES[which], ("fisher", "element", "all")[which])
    bucket.table[1, 2] = FISHER
    call_scaled(bucket, kinds[4 * which][0])
    repeated = 0
    if arch == ARCHES[0]:
        for call in (call_all, call_vectors):
            call(Bucket([Run((20003,), (20003, 1), offset=1)], torch.float32, "filter"))  # not aligned
        repeated = again()
    built = list(compiled())
    with tempfile.TemporaryDirectory() as folder:
        each = [functions(kernel.asm["cubin"]) for _, kernel in built]
        assert all(len(one) == 1 for one in each), "a kernel calls a function that is not part of it"
        codes = disassembled([code for one in each for code in one.values()], f"sm_{arch}", folder)
        found = [facts(*one, code, folder) for one, code in zip(built, codes, strict=True)]
    return {"kernels": found, "again": repeated}


def main(*arches):
    launch.INTERPRETED = True  # lets the ops take tensors on the CPU, as if they were the GPU's
    found = {}
    for place, arch in enumerate(arches):
        triton.runtime.driver.set_active(Driver(arch if arch in AMD else int(arch), place))
        found[arch] = amd(arch) if arch in AMD else nvidia(int(arch))
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
