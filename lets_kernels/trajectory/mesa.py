"""MESA (Du et al., NeurIPS 2022)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lets_kernels.trajectory.loss import Term


class MESA(Term):
    """SAF without records: compares the outputs with those of a moving average of the model.

    Du et al., NeurIPS 2022 (memory-efficient SAF): y_past are the outputs of weights averaged over the steps, by
    ``torch.optim.swa_utils``. Memory: one copy of the model. Time: one more forward pass a step, without gradients;
    there is still one gradient a step. ::

        mesa = lets_kernels.MESA(model)
        ...
            outputs = model(inputs)
            loss = cross_entropy(outputs, targets) + mesa(outputs, inputs)
            ...                                        # backward, and the optimizer's step
            mesa.update(model)                         # at the weights after the step, never at perturbed weights

    λ is that of the authors' command and one of two in their README (0.3 and 0.8); the default of their code is 0.3.
    Their λ is meant with the factor τ², which the printed equation lacks: without it (``rescale=False``) the term is 25
    times weaker. The other defaults are those of their code. The average begins with the weights at the first
    ``update``; theirs begins with the initial weights: call ``mesa.update(model)`` once before the first step for that.
    The paper leaves open what normalisation layers do in the averaged model: here the model runs in evaluation mode,
    and its running statistics are averaged too.

    Args:
        model: the model to average, without the wrapper of DistributedDataParallel, and not sharded.
        decay: the decay of the average, in [0, 1).
        start: the first epoch (from 0) whose loss has the term. The authors' code has ``--kl_start_epoch 5``, and the
            term in the epochs after that one.
        weight: λ ≥ 0.
        temperature: τ > 0.
        rescale: the factor τ²; see :func:`trajectory_loss`.

    Raises:
        ValueError: an argument is out of its range.

    Examples:
        >>> mesa = MESA(model, start=0)
        >>> mesa.update(model)  # once before training: the average begins with the first weights
        >>> mesa.set_epoch(0)
        >>> outputs = model(inputs)
        >>> loss = functional.cross_entropy(outputs, targets) + mesa(outputs, inputs)
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        decay: float = 0.9998,
        start: int = 6,
        weight: float = 0.8,
        temperature: float = 5.0,
        rescale: bool = True,
    ) -> None:
        super().__init__(weight, temperature, start, rescale)
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), not {decay}")
        #: The averaged model, in evaluation mode.
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True).eval()
        self.average.requires_grad_(False)

    def __call__(self, outputs: Tensor, *inputs: Any, **options: Any) -> Tensor:
        """The term for a batch, λ included.

        Args:
            outputs: the logits, [B, classes], of the pass whose gradient is taken.
            *inputs: the arguments with which the model was called for these outputs.
            **options: its arguments by name.

        Returns:
            A scalar; a constant zero before ``start``, without a forward pass.

        Raises:
            RuntimeError: no epoch was set.
            ValueError: the averaged model's outputs have another shape, or outputs are not [B, classes].
        """
        if self.epoch < self.start:
            return self._zero(outputs)
        with torch.no_grad():
            past = self.average(*inputs, **options)
        if not isinstance(past, Tensor) or past.shape != outputs.shape or outputs.dim() != 2:
            found = list(past.shape) if isinstance(past, Tensor) else type(past).__name__
            raise ValueError(
                f"outputs must be logits of shape [B, classes], the model's own for these inputs, but they are "
                f"{list(outputs.shape)} and the averaged model gives {found}: call mesa(outputs, ...) with the "
                "arguments of model(...); for other shapes, give both outputs to trajectory_loss"
            )
        return self._loss(outputs, past)

    def update(self, model: torch.nn.Module) -> None:
        """Add the model to the average; call it after each step."""
        self.average.update_parameters(model)

    def state_dict(self) -> dict[str, Any]:
        """The average and the epoch. The tensors are not copies, as in a module's state."""
        return {"epoch": self._epoch, "average": self.average.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: the state is no state of a MESA.
            RuntimeError: the state is of another model (torch raises this).
        """
        if "average" not in state:
            raise ValueError("this is no state of a MESA: it has no 'average'; load what mesa.state_dict() gave")
        self.average.load_state_dict(state["average"])
        self._epoch = state.get("epoch")
