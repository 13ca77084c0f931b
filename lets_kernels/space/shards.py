"""The real numbers in memory that kernels work on, if they are not the parameter itself.

A complex parameter is treated as pairs of real numbers, as in torch's optimizers. If a parameter is spread over ranks
(``torch.distributed.tensor.DTensor``), this rank holds a part of it.

Kernels work on local shards. One rule makes a sum over elements global, for any mesh: each rank's share is multiplied
by the number of parts into which the tensor is cut, and the mean over all ranks is taken. A replicated tensor is cut
into one part, so its copies do not count twice.
"""

import math
import operator
import sys
from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor


_version = operator.attrgetter("_version")

#: Stands for the dimension along which filters lie if the whole tensor is one filter.
WHOLE = -1


def is_spread(t: Tensor) -> bool:
    """True for a DTensor. Does not import DTensor, which takes long: if it is not imported, there is none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def is_apart(t: Tensor) -> bool:
    """True for a tensor that kernels cannot take as it is."""
    return t.is_complex() or is_spread(t)


def local(t: Tensor) -> Tensor:
    """The memory of a tensor, outside of autograd: this rank's part, complex numbers as pairs in a last dimension of 2.

    A tensor that is neither spread nor complex is returned as it is.
    """
    part = t
    if is_spread(t):
        with torch.no_grad():
            part = t.to_local().detach()  # type: ignore[attr-defined]
    return torch.view_as_real(part.detach().resolve_conj()) if part.is_complex() else part


def elements(t: Tensor) -> int:
    """The number of real numbers in a tensor, over all ranks."""
    return t.numel() * (2 if t.is_complex() else 1)


def version(t: Tensor) -> Hashable:
    """Changes with every write in place. A DTensor counts it on the whole (``zero_()``) or on the part (FSDP adds)."""
    return (t._version, local(t)._version) if is_spread(t) else t._version


def versions(tensors: Sequence[Tensor]) -> list[Hashable]:
    """The version of each tensor."""
    if set(map(type, tensors)) == {Tensor}:  # a fast path: most gradients are plain tensors
        return list(map(_version, tensors))
    return list(map(version, tensors))


def local_gradient(grad: Tensor, p: Tensor) -> Tensor:
    """This rank's part of a gradient, cut like its parameter; a partial sum is reduced first."""
    if not is_spread(grad):
        return local(grad)
    spread: DTensor = grad  # type: ignore[assignment]
    wanted = p.placements  # type: ignore[attr-defined]
    if spread.placements != wanted:
        with torch.no_grad():
            spread = spread.redistribute(placements=wanted)
    return local(spread)


def whole_gradient(part: Tensor, p: Tensor) -> Tensor:
    """The gradient to assign to a parameter; ``part`` is this rank's part of it."""
    return spread_as(torch.view_as_complex(part) if p.is_complex() else part, p)


def spread_as(part: Tensor, p: Tensor) -> Tensor:
    """A tensor cut like the parameter, from this rank's ``part``, which may have one more dimension, of pairs.

    It shares the memory of ``part``. If the parameter is not spread, it is ``part`` itself.
    """
    if not is_spread(p):
        return part
    from torch.distributed.tensor import DTensor

    mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
    shape, stride = p.shape, p.stride()
    if part.dim() > p.dim():
        shape, stride = torch.Size((*shape, 2)), (*(2 * s for s in stride), 1)
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)


def check_spread(p: Tensor, where: str) -> None:
    """Refuse a parameter that is a partial sum: ``TypeError``."""
    if is_spread(p) and any(placement.is_partial() for placement in p.placements):  # type: ignore[attr-defined]
        raise TypeError(f"{where}: a parameter with a partial placement has no value to perturb; redistribute() it")


def cuts(p: Any) -> tuple[int, ...]:
    """The mesh dimensions along which a parameter is cut; empty if every rank holds the whole parameter."""
    return tuple(i for i, placed in enumerate(p.placements) if not placed.is_replicate()) if is_spread(p) else ()


def parts(p: Any) -> int:
    """The number of parts into which a parameter is cut; 1 if every rank holds the whole parameter."""
    return math.prod(p.device_mesh.size(i) for i in cuts(p))


def mesh_of(p: Tensor) -> Any:
    """The mesh of ranks over which a parameter is spread; None for a parameter that is not spread."""
    return p.device_mesh if is_spread(p) else None  # type: ignore[attr-defined]


def part_of(p: Tensor) -> int:
    """The number of the part that this rank holds; ranks that hold the same part have the same number."""
    index = 0
    for i in cuts(p):
        index = index * p.device_mesh.size(i) + p.device_mesh.get_local_rank(i)  # type: ignore[attr-defined]
    return index


def filter_groups(p: Tensor, dim: int) -> tuple["dist.ProcessGroup", ...]:
    """The groups of ranks whose parts make up one filter along ``dim``: groups that cut another dimension.

    For ``WHOLE`` the parameter is one filter, in whatever way it is cut.
    """
    if not is_spread(p):
        return ()
    placements, mesh = p.placements, p.device_mesh  # type: ignore[attr-defined]
    across = [i for i in cuts(p) if placements[i].dim % p.dim() != dim]
    return tuple(mesh.get_group(i) for i in across if mesh.size(i) > 1)


def groups_of(params: Iterable[Tensor]) -> list["dist.ProcessGroup | None"] | None:
    """The groups over which to sum, one after the other, for a sum over the whole mesh; None without DTensors.

    ``[None]`` means the default group: a mesh over all ranks needs one collective, a smaller mesh one a dimension.

    Raises:
        ValueError: the meshes do not cover the same ranks.
    """
    meshes = {id(p.device_mesh): p.device_mesh for p in params if is_spread(p)}  # type: ignore[attr-defined]
    if not meshes:
        return None
    import torch.distributed as dist

    widest = max(meshes.values(), key=lambda mesh: mesh.size())
    if widest.size() == dist.get_world_size():
        return [None]
    ranks = set(widest.mesh.flatten().tolist())
    if any(not set(mesh.mesh.flatten().tolist()) <= ranks for mesh in meshes.values()):
        raise ValueError("parameters on meshes of different ranks: pass process_group=, the group of all of them")
    return [widest.get_group(i) for i in range(widest.ndim)]
