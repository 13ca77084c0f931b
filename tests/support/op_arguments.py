"""Every registered op: what it writes, what it returns, and arguments that it takes."""

import torch
from torch.utils._pytree import tree_leaves

from lets_kernels.ops import native
from lets_kernels.ops.declared import OPS
from support.guard_bands import LAYOUTS, Bucket

# What each op writes to, by argument name: the declaration's word, to which every backend is held by running it.
WRITES = {op.name: set(op.written) for op in OPS}
# What each op returns: its shape, in float64; nothing where it is not named.
SHAPES = {op.name: op.shape for op in OPS if op.shape is not None}

#: Runs of every kind, none longer than a chunk: what an op takes and refuses does not depend on how it cuts them.
RUNS = [run for run in LAYOUTS["several"] if run.numel < 1000]


def scalar(x):
    return torch.tensor(x, dtype=torch.float64)


def arguments(op, dtype, whole=True, runs=RUNS, scale=None, q=2.0):
    """Arguments of one op on several runs; params, gradients and state as lists, `saved` flat.

    Not ``whole``: without the lists and tensors that may be left out. ``scale`` is T, as guard_bands.py names it.
    """
    bucket = Bucket(runs, dtype, scale or ("mixed" if whole else "plain"))

    def tensors():
        return bucket.give(bucket.values(), "list")

    def positive():
        return bucket.give(bucket.positive(0.1, 1.0), "list")

    def optional():
        return tensors() if whole else []

    (saved,) = bucket.give(bucket.values(), "flat")
    saved, norms, table, dirty = saved.clone(), bucket.norms(), bucket.table, torch.tensor(1)
    scaling = table, norms if whole else None, 0.01, q
    mask = (torch.arange(bucket.total) % 3 == 0).to(torch.uint8)
    threshold, random = torch.tensor(0x3F000000 << 32 if whole else 1 << 62), torch.tensor([17, 3])
    return {
        "grad_norm": lambda: (tensors(), optional(), *scaling),
        "filter_norms": lambda: (tensors(), table, norms),
        "perturb_": lambda: (tensors(), optional(), saved, dirty, *scaling, scalar(2.0), scalar(0.1)),
        "restore_": lambda: (tensors(), saved, dirty, table),
        "restore_sgd_": lambda: (
            tensors(), tensors(), optional(), saved, dirty, table, scalar(1.0), 0.1, 0.9 * whole, 0.01, whole, False,
        ),
        "restore_adamw_": lambda: (
            *(tensors() for _ in range(3)), positive(), [torch.tensor(1.0) for _ in table], saved, dirty, table,
            scalar(1.0), 0.1, 0.9, 0.99, 1e-8, 0.01, True, False,
        ),
        "rho_grad_diagonal": lambda: (tensors(), optional(), tensors(), tensors(), optional(), *scaling),
        "rho_grad_secant": lambda: (tensors(), optional(), tensors(), tensors(), table),
        "dots": lambda: (tensors(), tensors(), table),
        "displacement_dots": lambda: (tensors(), tensors(), saved, table),
        "combine_": lambda: (tensors(), tensors(), tensors(), table, torch.tensor([0.3, -2.0]).double(), scalar(1.0)),
        "average_": lambda: (
            tensors(), tensors(), optional(), torch.tensor(2 * whole), table, scalar(1.0), 0.9, 1.0, -0.5,
        ),
        "posterior_ascent_": lambda: (tensors(), positive(), tensors(), table, scalar(1.0), 0.9, 0.1),
        "restore_lion_": lambda: (
            *(tensors() for _ in range(3)), saved, dirty, table, scalar(1.0), 0.1, 0.9, 0.99, 0.01,
        ),
        "restore_bsam_": lambda: (
            *(tensors() for _ in range(3)), positive(), saved, dirty, table, scalar(1.0), 0.1, 0.9, 0.01,
        ),
        # Its scales are the norms or the precisions.
        "noise_": lambda: (
            tensors(), optional(), [] if whole else positive(), table, norms if whole else None, random, 1, 0.5, 0.1,
        ),
        "masked_": lambda: (tensors(), tensors(), mask if whole else None, table, random, 2, 0.5),
        "count_above": lambda: (optional(), mask, table, threshold, random, 3, -1),
        "select_": lambda: (mask, optional(), table, threshold, random, 3, 0, 1),
        "largest": lambda: (tensors(), table),
        "peaks_": lambda: (tensors(), tensors(), table, scalar(1.0)),
        "all_finite_": lambda: ([scalar(1.0), scalar(torch.nan)], torch.tensor(3)),
    }[op]()  # fmt: skip


def ran(ops, op, given):
    """A call of one op: what it returned, and the tensors that it was given, as it left them."""
    returned = getattr(ops, op)(*given)
    return [t for t in tree_leaves((returned, given)) if torch.is_tensor(t)]


def registered(namespace):
    """Every op of a namespace that the dispatcher knows, overloads and all."""
    names = torch._C._dispatch_get_all_op_names()
    return {n.removeprefix(f"{namespace}::") for n in names if n.startswith(f"{namespace}::")}


def overload(op):
    return getattr(native, op)
