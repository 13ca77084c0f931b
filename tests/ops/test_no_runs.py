"""Every op on no runs at all, as on a rank that holds nothing of any parameter."""

import pytest
import torch

from support.op_arguments import WRITES, arguments, overload

pytestmark = [pytest.mark.ops, pytest.mark.own]

SIZELESS = ("dirty", "updates")  # what an op writes that has no place in a run


@pytest.mark.parametrize("op", sorted(set(WRITES) - {"all_finite_"}))
def test_no_runs_at_all(backend, op):
    """Sums are zero; what counts or marks the whole op is written all the same."""
    for whole in (True, False):
        given = arguments(op, torch.float32, whole, runs=[])
        named = dict(zip((a.name for a in overload(op)._schema.arguments), given, strict=True))
        before = {name: named[name].item() for name in SIZELESS if name in named}
        returned = getattr(backend, op)(*given)
        assert returned is None or not returned.any()
        if "dirty" in named:
            assert named["dirty"].item() == (op == "perturb_")
        if "updates" in named:
            assert named["updates"].item() == before["updates"] + 1
