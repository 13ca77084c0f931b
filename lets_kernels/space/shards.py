"""The real numbers in memory that kernels work on, where they are not the parameter itself.

A complex parameter is pairs of real numbers, here as in torch's optimizers. Of a parameter that is spread over ranks
(``torch.distributed.tensor.DTensor``) this rank holds a part.

Kernels work on local shards. A sum over elements becomes global by one rule, whatever the mesh: each rank's share
counts once for every part that the tensor is cut into, and the mean over all ranks is taken. A replicated tensor is
cut into one part, so that the copies do not count twice.
"""

import math
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor


#: In the place of the dimension along which filters lie: there is one, the whole tensor.
WHOLE = -1


def is_spread(t: Tensor) -> bool:
    """True for a DTensor. Where nobody has imported them there are none, and importing them takes long."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def is_apart(t: Tensor) -> bool:
    """True for a tensor that is not itself what kernels can take."""
    return t.is_complex() or is_spread(t)


def local(t: Tensor) -> Tensor:
    """The memory itself, outside of autograd: this rank's part, complex numbers as pairs along a last dimension of 2.

    A tensor that is neither spread nor complex is its own memory.
    """
    part = t
    if is_spread(t):
        with torch.no_grad():
            part = t.to_local().detach()  # type: ignore[attr-defined]
    return torch.view_as_real(part.detach().resolve_conj()) if part.is_complex() else part


def elements(t: Tensor) -> int:
    """How many real numbers a tensor holds, over all ranks."""
    return t.numel() * (2 if t.is_complex() else 1)


def version(t: Tensor) -> tuple[int, int]:
    """What a write in place changes. Of a DTensor it may count on the whole (``zero_()``) or the part (FSDP adds)."""
    if type(t) is Tensor:  # as most gradients are, and there are many
        return t._version, 0
    return t._version, local(t)._version if is_spread(t) else 0


def local_gradient(grad: Tensor, p: Tensor) -> Tensor:
    """This rank's part of a gradient, cut as its parameter is; a partial sum is reduced first."""
    if not is_spread(grad):
        return local(grad)
    spread: DTensor = grad  # type: ignore[assignment]
    wanted = p.placements  # type: ignore[attr-defined]
    if spread.placements != wanted:
        with torch.no_grad():
            spread = spread.redistribute(placements=wanted)
    return local(spread)


def whole_gradient(part: Tensor, p: Tensor) -> Tensor:
    """The gradient that a parameter takes, of which ``part`` is this rank's."""
    return spread_as(torch.view_as_complex(part) if p.is_complex() else part, p)


def spread_as(part: Tensor, p: Tensor) -> Tensor:
    """A tensor cut as the parameter is, of which ``part`` is this rank's; it may have a last dimension more, of pairs.

    The memory is that of ``part``, which itself it is where the parameter is not spread.
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
    """The dimensions of the mesh along which a parameter is cut; none if every rank holds all of it."""
    return tuple(i for i, placed in enumerate(p.placements) if not placed.is_replicate()) if is_spread(p) else ()


def parts(p: Any) -> int:
    """Into how many parts the elements of a parameter are cut; 1 if every rank holds all of them."""
    return math.prod(p.device_mesh.size(i) for i in cuts(p))


def mesh_of(p: Tensor) -> Any:
    """The mesh of ranks over which a parameter is spread; None for one that is not."""
    return p.device_mesh if is_spread(p) else None  # type: ignore[attr-defined]


def part_of(p: Tensor) -> int:
    """Which of its ``parts`` this rank holds; ranks that hold the same one have the same number."""
    index = 0
    for i in cuts(p):
        index = index * p.device_mesh.size(i) + p.device_mesh.get_local_rank(i)  # type: ignore[attr-defined]
    return index


def filter_groups(p: Tensor, dim: int) -> tuple["dist.ProcessGroup", ...]:
    """The groups of ranks whose parts make up one filter, for filters along ``dim``: those that cut another one.

    ``WHOLE``: the parameter is one filter, whichever way it is cut.
    """
    if not is_spread(p):
        return ()
    placements, mesh = p.placements, p.device_mesh  # type: ignore[attr-defined]
    across = [i for i in cuts(p) if placements[i].dim % p.dim() != dim]
    return tuple(mesh.get_group(i) for i in across if mesh.size(i) > 1)


def groups_of(params: Iterable[Tensor]) -> list["dist.ProcessGroup | None"] | None:
    """The groups over which a sum becomes that of the whole mesh, one after the other; None without DTensors.

    ``[None]`` is the default group: a mesh over all ranks takes one collective, a smaller one takes one a dimension.

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
