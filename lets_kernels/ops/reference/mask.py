"""Masks of the elements that a perturbation moves, kept or drawn; and the selection of elements with the highest keys.

A mask is a flat uint8 buffer of the bucket, 1 for an element that takes part. The **key** of an element is a number of
63 bits: the bits of |v| as float32, and below them a random word, which decides between equal values. Without vectors
the key is the word alone, shifted up by 31 bits.
"""

import torch
from torch import Tensor

from lets_kernels.ops.reference.noise import words
from lets_kernels.ops.reference.shared import Tensors, runs, wide

__all__ = ["count_above", "masked_", "select_"]


def masked_(
    out: Tensors, vectors: Tensors, mask: Tensor | None, table: Tensor, random: Tensor, stream: int, share: float
) -> Tensor:
    """out <- v where the mask is set, otherwise 0 (Mi et al., 2022). Returns Σ v² of all elements, 0-d float64.

    Without a mask each element is kept with probability ``share`` (if its word is below share · 2^32) and divided by
    ``share`` (Du et al., 2022). ``random`` holds seed and count, int64 of shape [2].

    Raises:
        RuntimeError: there is no mask, and the share is not in (0, 1] (compiled and Triton backends).
    """
    total = torch.zeros((), dtype=torch.float64, device=random.device)
    masks = [None] * len(table) if mask is None else runs([mask], table)
    for to, v, keep, (start, numel, *_) in zip(
        runs(out, table), runs(vectors, table), masks, table.tolist(), strict=True
    ):
        total += v.double().square().sum()
        if keep is None:
            below = words(start, numel, random, stream) < int(share * 2**32)
            to.copy_(torch.where(below, (wide(v) * (1 / share)).to(to.dtype), torch.zeros_like(v)))
        else:
            to.copy_(torch.where(keep != 0, v, torch.zeros_like(v)))
    return total


def _above(
    vectors: Tensors, mask: Tensor, table: Tensor, threshold: Tensor, random: Tensor, stream: int, member: int
) -> list[tuple[Tensor, Tensor]]:
    """For each run its mask, and which elements have keys above the threshold and the mask ``member``."""
    found = []
    vs = runs(vectors, table) if len(vectors) else [None] * len(table)
    for v, own, (start, numel, *_) in zip(vs, runs([mask], table), table.tolist(), strict=True):
        key = words(start, numel, random, stream)
        key = key << 31 if v is None else (v.float().abs().view(torch.int32).long() << 32) | key
        above = key > threshold
        found.append((own, above if member < 0 else above & (own == member)))
    return found


def count_above(
    vectors: Tensors, mask: Tensor, table: Tensor, threshold: Tensor, random: Tensor, stream: int, member: int
) -> Tensor:
    """The number of elements with mask ``member`` (-1: any mask) and a key above the threshold: 0-d float64.

    ``threshold`` is 0-d int64, in the units of keys. Without ``vectors`` the keys are made of words alone.

    Raises:
        RuntimeError: ``member`` is not in -1 to 255 (compiled and Triton backends).
    """
    total = torch.zeros((), dtype=torch.float64, device=mask.device)
    for _, above in _above(vectors, mask, table, threshold, random, stream, member):
        total += above.sum()
    return total


def select_(
    mask: Tensor, vectors: Tensors, table: Tensor, threshold: Tensor, random: Tensor, stream: int, member: int,
    value: int,
) -> None:  # fmt: skip
    """mask <- ``value`` for the elements that :func:`count_above` counts (Mi et al., 2022: the selection of a mask).

    ``mask`` is one flat uint8 buffer, one byte an element, and is both read and written; the other elements stay.

    Raises:
        RuntimeError: ``value`` is not in 0 to 255, or ``member`` not in -1 to 255 (compiled and Triton backends).
    """
    for own, above in _above(vectors, mask, table, threshold, random, stream, member):
        own.masked_fill_(above, value)
