"""Whether a saved value can be loaded. All values are checked before any is loaded: a damaged state changes nothing.

Every ``check`` raises ``ValueError`` or returns None, and changes nothing.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, NoReturn

import torch
from torch import Tensor

from lets_kernels.space.shards import local


def refuse(what: str, found: str) -> NoReturn:
    raise ValueError(
        f"the saved state does not fit, and nothing of it was loaded: {what} {found}. Build the optimizer with the "
        "arguments of the one that was saved; if it is built so, the state is damaged: load another copy"
    )


def expect(holds: bool, what: str, otherwise: str) -> None:
    """Refuse the state if the condition does not hold."""
    if not holds:
        refuse(what, otherwise)


def check_keys(entry: Any, keys: Iterable[str], what: str) -> None:
    """The entry is a dict with these keys."""
    expect(isinstance(entry, Mapping), what, f"is a {type(entry).__name__}, not a dict")
    keys = set(keys)
    if entry.keys() != keys:
        lacks, beside = (sorted(map(str, some)) for some in (keys - entry.keys(), entry.keys() - keys))
        found = [f"{verb} {', '.join(some)}" for verb, some in (("lacks", lacks), ("has an unknown", beside)) if some]
        refuse(what, " and ".join(found))


def check_count(value: Any, what: str) -> None:
    """The value is a whole number ≥ 0."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        refuse(what, f"is {value!r}, not a count")


def check_scalar(value: Any, what: str) -> None:
    """The value is a 0-d tensor of a finite number."""
    if not isinstance(value, Tensor) or value.dim() != 0 or not bool(torch.isfinite(value)):
        refuse(what, f"is {value!r}, not a 0-d tensor of a finite number")


def check_numbers(values: Any, count: int, what: str) -> None:
    """The values are ``count`` 0-d tensors of finite numbers."""
    if not is_list(values) or len(values) != count:
        refuse(what, f"is {values!r}, not a list of {count}")
    for value in values:
        check_scalar(value, what)


def check_part(state: Any, present: Mapping[str, Any], what: str) -> None:
    """The state of a part of a method has finite numbers where the part has numbers now, and counts where it counts."""
    check_keys(state, present, what)
    for name, now in present.items():
        value, label = state[name], f"{what}: {name}"
        number = isinstance(now, Real) and not isinstance(now, bool)
        scalar = isinstance(now, Tensor) and now.dim() == 0
        if not alike(value, now) or (number and isinstance(value, (bool, Tensor))) or (scalar and value is None):
            refuse(label, f"is {value!r}, and {now!r} has another kind")
        # Tensors are read where they lie; Python numbers do not go to torch's default device.
        if (number or scalar) and not torch.isfinite(torch.as_tensor(value, device=getattr(value, "device", "cpu"))):
            refuse(label, f"is {value!r}, not a finite number")
        counts = isinstance(now, int) if number else scalar and not now.is_floating_point()
        if counts and (value < 0 or float(value) != int(value)):
            refuse(label, f"is {value!r}, not a count")


def alike(value: Any, present: Any) -> bool:
    """True if one value can stand in the place of the other. In the place of None anything may have been saved."""
    if isinstance(present, bool):
        return value is None or isinstance(value, bool)
    if isinstance(present, Tensor) or isinstance(value, Tensor):
        shape = present.shape if isinstance(present, Tensor) else torch.Size(())
        return (isinstance(value, Tensor) and value.shape == shape) or (isinstance(value, Real) and not shape)
    if isinstance(present, Real):
        return isinstance(value, Real)
    if isinstance(present, (list, tuple)):
        return isinstance(value, (list, tuple)) and len(value) == len(present) and all(map(alike, value, present))
    return True


def is_finite(value: Any, least: float = -math.inf) -> bool:
    """True for a finite number that is at least ``least``, and for a tensor without memory, which cannot be read."""
    return (isinstance(value, Tensor) and value.is_meta) or (math.isfinite(float(value)) and float(value) >= least)


def is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex() and value.dtype is not torch.bool
    return isinstance(value, Real) and not isinstance(value, bool)


def is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def shaped_as(value: Any, p: Tensor) -> bool:
    """True for a tensor with the shape of a parameter, or of this rank's part of the parameter."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return False
    return value.shape in (p.shape, local(p).shape) and (value.device.type != "meta" or p.device.type == "meta")
