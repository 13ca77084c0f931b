"""The trajectory loss, and what the two terms built from it, SAF and MESA, share."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from lets_kernels.parts.part import not_negative


def trajectory_loss(
    outputs: Tensor, past: Tensor, temperature: float = 5.0, *, seen: Tensor | None = None, rescale: bool = False
) -> Tensor:
    """(1/B) Σ KL(softmax(y_past/τ) ‖ softmax(y/τ)), in log space; gradients go through y only.

    Du et al., NeurIPS 2022, the trajectory loss, without its coefficient λ. Computed in float32, or in float64 if the
    outputs are float64. An output of -inf means a class of probability zero; no finite output gives NaN.

    Args:
        outputs: y, the logits now: [B, classes].
        past: y_past, the logits to compare with. Adding a constant to all logits of a sample changes nothing.
        temperature: τ > 0.
        seen: bool [B]; samples with False count as zero. Default: all are True. B stays the size of the whole batch.
        rescale: multiply by τ², as the authors' code does; the printed equation does not. Gradients then keep their
            size as τ grows.

    Returns:
        A scalar ≥ 0, up to rounding.

    Examples:
        >>> now, past = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [2.0, 0.0]])
        >>> print(trajectory_loss(now, past, temperature=1.0))
        tensor(0.7616)
        >>> print(trajectory_loss(now, past, seen=torch.tensor([True, False])))  # the first sample has not moved
        tensor(0.)
    """
    dtype = precision(outputs)
    past = past.detach().to(dtype)
    if seen is not None:  # before the softmax, since unrecorded values may be anything
        past = torch.where(seen[:, None], past, torch.zeros_like(past))
    log_past, log_now = (_log_softmax(y, temperature) for y in (past, outputs.to(dtype)))
    terms = functional.kl_div(log_now, log_past, reduction="none", log_target=True).sum(1)
    if seen is not None:
        terms = torch.where(seen, terms, torch.zeros_like(terms))
    loss = terms.sum() / max(len(terms), 1)
    return loss * temperature**2 if rescale else loss


def centred(outputs: Tensor) -> Tensor:
    """y - max(y), which has the same distribution and cannot overflow upwards."""
    return outputs - outputs.detach().amax(1, keepdim=True)


def _log_softmax(outputs: Tensor, temperature: float) -> Tensor:
    """log softmax with finite lowest values, since -inf times a probability of zero would be NaN."""
    return functional.log_softmax(centred(outputs) / temperature, 1).clamp(min=torch.finfo(outputs.dtype).min)


def precision(outputs: Tensor) -> torch.dtype:
    """The dtype in which the term is computed."""
    return torch.float64 if outputs.dtype == torch.float64 else torch.float32


class Term:
    """What the two terms share: λ, τ, and the epoch."""

    def __init__(self, weight: float, temperature: float, start: int, rescale: bool) -> None:
        self.weight = not_negative(weight, "weight")
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"temperature must be a finite number > 0, not {temperature}")
        if start < 0:
            raise ValueError(f"start must be an epoch from 0, not {start}")
        self.temperature, self.start, self.rescale = float(temperature), int(start), rescale
        self._epoch: int | None = None

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the epoch, from 0, when it begins; as for a ``DistributedSampler``."""
        if epoch < 0:
            raise ValueError(f"epochs are counted from 0, not {epoch}")
        self._epoch = int(epoch)

    @property
    def epoch(self) -> int:
        """The epoch that was set."""
        if self._epoch is None:
            raise RuntimeError(f"{type(self).__name__} goes by epochs: call set_epoch(epoch) at the start of an epoch")
        return self._epoch

    def _loss(self, outputs: Tensor, past: Tensor, seen: Tensor | None = None) -> Tensor:
        return self.weight * trajectory_loss(outputs, past, self.temperature, seen=seen, rescale=self.rescale)

    @staticmethod
    def _zero(outputs: Tensor) -> Tensor:
        return outputs.new_zeros((), dtype=precision(outputs))
