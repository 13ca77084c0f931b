"""For each argument of each op, what it must refuse; for test_refused_arguments.py and triton_interpreted.py."""

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from support.guard_bands import same_bits
from support.op_arguments import WRITES, arguments, overload

VECTOR = 2  # of the runs: the longest of one dimension


def _replaced(change):
    def apply(tensors):
        return [*tensors[:VECTOR], change(tensors[VECTOR]), *tensors[VECTOR + 1 :]]

    return apply


def given_back(t):
    """What a tensor is whose storage was resized to nothing; a vector begins after the beginning of its own."""
    freed = torch.cat([t.reshape(-1)[:1], t.reshape(-1)])[1:].view(t.shape) if t.dim() else t.clone()
    freed.untyped_storage().resize_(0)
    return freed


LISTS = {
    "two-int64": lambda tensors: [torch.arange(1, len(tensors) + 2), torch.zeros((), dtype=torch.int64)],
    "no-memory": _replaced(given_back),
    "one-less": lambda tensors: tensors[:-1],
    "one-more": lambda tensors: [*tensors, tensors[0]],
    "another-dtype": _replaced(lambda t: t.to(torch.float64 if t.dtype is torch.float32 else torch.float32)),
    "integers": _replaced(lambda t: t.to(torch.int32)),
    "holes": _replaced(lambda t: t.repeat_interleave(2)[::2]),
    "an-element-more": _replaced(lambda t: torch.cat([t, t[:1]])),
    "an-element-less": _replaced(lambda t: t[:-1].clone()),
}
WHOLE = {  # tensors that have as many elements as the table says, or more
    "too-small": lambda t: t[:-200].clone(),
    "another-dtype": lambda t: t.to(torch.int32),
    "holes": lambda t: t.repeat_interleave(2)[::2],
    "no-memory": given_back,
}
NORMS = {
    "no-memory": given_back,
    "too-small": lambda t: t[:3].clone(),
    "another-dtype": lambda t: t.to(torch.float16),
    "none": lambda t: None,
}
SCALAR = {
    "two-elements": lambda t: torch.stack([t, t]),
    "float32": lambda t: t.float(),
    "int32": lambda t: t.to(torch.int32),
    "no-memory": given_back,
}
PAIR = {
    "three-elements": lambda t: torch.cat([t, t[:1]]),
    "one-element": lambda t: t[:1].clone(),
    "float32": lambda t: t.float(),
    "int32": lambda t: t.to(torch.int32),
    "holes": lambda t: t.repeat_interleave(2)[::2],
    "no-memory": given_back,
}
STEPS = {"one-less": lambda s: s[:-1], "float64": lambda s: [*s[:-1], s[-1].double()]}
TENSORS = {
    **dict.fromkeys(("saved", "mask"), WHOLE),
    "filter_norms": NORMS,
    **dict.fromkeys(("dirty", "updates", "threshold", "gate", "total", "rho", "largest"), SCALAR),
    **dict.fromkeys(("random", "coefficients"), PAIR),
    "steps": STEPS,
    "member": {"less-than-none": lambda n: -2, "more-than-a-byte": lambda n: 256},
    "value": {"negative": lambda n: -1, "more-than-a-byte": lambda n: 256},
}


def cases():
    """(op, name of the argument, name of what is wrong)."""
    found = []
    for op in WRITES:
        if op == "all_finite_":
            continue
        for argument in overload(op)._schema.arguments:
            changes = TENSORS.get(argument.name, LISTS if str(argument.type) == "List[Tensor]" else {})
            if op == "filter_norms" and argument.name == "out":
                changes = {name: NORMS[name] for name in ("too-small", "another-dtype", "no-memory")}
            found += [pytest.param(op, argument.name, wrong, id=f"{op}-{argument.name}-{wrong}") for wrong in changes]
    return found


def check(ops, op, name, wrong):
    """An error before anything is written: what the op got has the bits that it had."""
    where = [a.name for a in overload(op)._schema.arguments].index(name)
    given = list(arguments(op, torch.float32))
    changes = TENSORS.get(name, NORMS if op == "filter_norms" and name == "out" else LISTS)
    if given[where] == []:  # a list that may be left out
        given[where] = [t.clone() for t in given[0]]
    given[where] = changes[wrong](given[where])
    before = tree_map(lambda t: t.clone() if torch.is_tensor(t) and t.untyped_storage().nbytes() else t, given)
    with pytest.raises(RuntimeError, match=r"\w"):
        getattr(ops, op)(*given)
    pairs = [(old, new) for old, new in zip(*map(tree_leaves, (before, given)), strict=True) if torch.is_tensor(new)]
    was, now = zip(*[pair for pair in pairs if pair[1].untyped_storage().nbytes()], strict=True)
    assert same_bits(was, now), "something was written"
