"""Where tensors lie in memory, and which parameters no method can perturb."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lets_kernels import ops
from lets_kernels.ops.memory import capturing, is_dense, is_fake
from lets_kernels.space.shards import check_spread, is_spread, local


def is_lent(grad: Tensor) -> bool:
    """True for a gradient that is a view: other code owns its memory and may write there. Autograd makes no views."""
    return grad._is_view() or grad.untyped_storage().nbytes() > grad.numel() * grad.element_size()


def check_parameter(p: Tensor, where: str) -> None:
    """Refuse a parameter that no method can perturb. Frozen parameters (``requires_grad=False``) are never perturbed.

    Raises:
        TypeError: the dtype has no gradient or no kernels (8-bit, complex32), or the class keeps its numbers in tensors
            other than itself. The message names the way out.
        ValueError: elements share memory (an expanded tensor), or memory holds other values (lazily negated).
    """
    if not p.requires_grad:
        return
    found = _keeps_elsewhere(p)
    if found is not None:
        raise TypeError(
            f"{where}: a parameter of class {found.__module__}.{found.__qualname__} cannot be perturbed: the class "
            "dispatches operations by itself (__torch_dispatch__), so its numbers need not lie in its memory. Keep it "
            "out of the groups, train the tensors in it as parameters, or dequantise it (p.dequantize())"
        )
    if p.is_nested:
        raise TypeError(f"{where}: a nested parameter cannot be perturbed; make a parameter of each tensor in it")
    if p.layout is not torch.strided:
        raise TypeError(
            f"{where}: a parameter of layout {p.layout} cannot be perturbed; make it dense (p.to_dense()), or keep it "
            "out of the groups"
        )
    if p.dtype not in (*ops.DTYPES, torch.complex64, torch.complex128):
        what = "make it complex64" if p.is_complex() else "keep it out of the groups"
        raise TypeError(f"{where}: a parameter of dtype {p.dtype} cannot be perturbed; {what}")
    if p.numel() and any(size > 1 and stride == 0 for size, stride in zip(p.shape, p.stride(), strict=True)):
        raise ValueError(f"{where}: an expanded parameter shares memory between elements; pass p.clone()")
    if p.is_conj() or p.is_neg():
        raise ValueError(f"{where}: a lazily conjugated or negated parameter; pass p.resolve_conj().resolve_neg()")
    check_spread(p, where)


def _keeps_elsewhere(p: Tensor) -> type | None:
    """The class of the parameter, or of this rank's part of it, if only the class's own dispatch knows its numbers."""
    for t in (p, local(p)) if is_spread(p) else (p,):
        kind = type(t)
        if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ and not (is_spread(t) or is_fake(t)):
            return kind
    return None


def check_apart(named: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse tensors that share memory: a step would move the shared elements twice.

    Args:
        named: pairs of a name and a tensor.

    Raises:
        ValueError: a tensor is there twice, or two tensors share elements. The message names both.
    """
    places = []
    for name, t in named:
        begin = 0 if is_fake(t) else t.data_ptr()  # zero, too, on the meta device
        if t.numel() and begin:
            last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
            places.append(_Place(str(t.device), begin, begin + (last + 1) * t.element_size(), name, t))
    places.sort(key=lambda place: (place.device, place.begin))
    stretch: list[_Place] = []  # places that overlap
    end = 0
    for place in places:
        if stretch and place.device == stretch[0].device and place.begin < end:
            if is_dense(place.tensor) and is_dense(stretch[-1].tensor) and place.begin < stretch[-1].end:
                raise _shared(stretch[-1], place)
            stretch.append(place)
            end = max(end, place.end)
            continue
        _check_stretch(stretch, end)
        stretch, end = [place], place.end
    _check_stretch(stretch, end)


@dataclass
class _Place:
    """The place of a tensor: from its first byte to the byte after its last, perhaps with holes in between."""

    device: str
    begin: int
    end: int
    name: str
    tensor: Tensor

    def of(self, memory: Tensor, start: int) -> Tensor:
        """The tensor's own bytes in a map of the bytes from ``start`` on."""
        t, size = self.tensor, self.tensor.element_size()
        return memory.as_strided((*t.shape, size), (*(s * size for s in t.stride()), 1), self.begin - start)


def _check_stretch(stretch: list[_Place], end: int) -> None:
    if len(stretch) < 2:
        return
    start = stretch[0].begin
    taken = torch.zeros(end - start, dtype=torch.bool, device="cpu")
    for i, place in enumerate(stretch):
        if bool(place.of(taken, start).any()):
            for other in stretch[:i]:
                other.of(taken.zero_(), start).fill_(True)
                if bool(place.of(taken, start).any()):
                    raise _shared(other, place)
        place.of(taken, start).fill_(True)


def _shared(a: _Place, b: _Place) -> ValueError:
    return ValueError(
        f"{a.name} and {b.name} share memory, so a step would move it twice: give the optimizer one of them. Tie "
        "weights by using one Parameter in both places (a.weight = b.weight), not by .data"
    )


def refuse_while_capturing(what: str) -> None:
    """``RuntimeError`` while a graph is captured: the graph would make this memory, and its values, at every replay."""
    if capturing():
        raise RuntimeError(
            f"{what} would be made inside the CUDA graph that is being captured: take a step or two in the same way "
            "before the capture, as torch's examples do on a side stream"
        )


def uploaded(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers on a device; the host does not wait for the copy."""
    if device.type == "cpu" or not torch.accelerator.is_available():
        return torch.tensor(numbers, dtype=dtype, device=device)
    return torch.tensor(numbers, dtype=dtype, device="cpu").pin_memory().to(device, non_blocking=True)
