"""SAF (Du et al., NeurIPS 2022), and its records of outputs."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lets_kernels.parts.part import at_least_one
from lets_kernels.trajectory.loss import Term, centred, precision


def _pinned(records: torch.device, outputs: torch.device) -> bool:
    """True if copies between the two devices go through pinned memory."""
    return records.type == "cpu" and outputs.type == "cuda"


class SAF(Term):
    """Sharpness-aware training for free: outputs should not have moved far since E epochs ago.

    Du et al., NeurIPS 2022: the loss gains (λτ²/B) Σ KL(softmax(y_past/τ) ‖ softmax(y/τ)), where y_past are the
    outputs recorded for the same samples E epochs ago. Any optimizer steps on the sum, with one gradient a step::

        saf = lets_kernels.SAF(len(dataset), classes)
        for epoch in range(epochs):
            saf.set_epoch(epoch)
            for index, inputs, targets in loader:  # the data set gives the index of each sample
                outputs = model(inputs)
                loss = cross_entropy(outputs, targets) + saf(outputs, index)

    Memory: ``nbytes`` = E · samples · (classes · itemsize + 4), allocated here and never more; for 1.28 million images
    of 1000 classes in float16 and E = 3 this is 7.7 GB, so the records are on the CPU by default. Outputs of a GPU then
    pass through pinned memory, one batch in each direction, and no step waits for the copy of its own outputs. Indices
    should be on the CPU, where a loader leaves them. Time: two copies of [B, classes] a step.

    λ is that of the authors' command and one of two in their README (0.3 and 0.8); the default of their code is 0.16. E
    and τ are the defaults of their code (the command has E = 2). Their λ is meant with the factor τ², which the printed
    equation lacks: without it (``rescale=False``) the term is 25 times weaker. The paper leaves open what to do with
    samples without a record, such as samples of a dropped last batch: here they count as zero. The second visit to a
    sample in one epoch also counts as zero, since its record has been overwritten. So does a sample that another rank
    had E epochs ago: each rank has its own records, so its sampler should shuffle within its own share of the data set.
    The outputs of a sample are not recorded if there is NaN or +infinity among them.

    The records hold y - max(y): the same distribution, and in float16 the most accurate values are those of likely
    classes.

    Args:
        samples: N, the size of the data set; indices are 0 ... N-1.
        classes: the width of the outputs.
        epochs: E, at least 1.
        start: the first epoch (from 0) whose loss has the term. Recording begins E epochs before. The authors' code has
            ``--kl_start_epoch 5``, and the term in the epochs after that one.
        weight: λ ≥ 0.
        temperature: τ > 0.
        dtype: the dtype of the records. The error of float16 is at most 2⁻¹¹ of a class's distance from the likeliest.
        device: the device of the records.
        rescale: the factor τ²; see :func:`trajectory_loss`.

    Raises:
        TypeError: ``dtype`` has no fractions.
        ValueError: an argument is out of its range.

    Examples:
        >>> saf = SAF(samples=8, classes=3, epochs=1, start=1)
        >>> saf.nbytes  # epochs · samples · (classes · 2 bytes + 4)
        80
        >>> index = torch.arange(8)  # which samples of the data set the batch has
        >>> for epoch in range(2):  # the first records, the second compares
        ...     saf.set_epoch(epoch)
        ...     outputs = model(inputs)
        ...     loss = functional.cross_entropy(outputs, targets) + saf(outputs, index)
    """

    def __init__(
        self,
        samples: int,
        classes: int,
        *,
        epochs: int = 3,
        start: int = 6,
        weight: float = 0.3,
        temperature: float = 5.0,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str = "cpu",
        rescale: bool = True,
    ) -> None:
        super().__init__(weight, temperature, start, rescale)
        for name, value in (("samples", samples), ("classes", classes), ("epochs", epochs)):
            at_least_one(value, name)
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point dtype, such as torch.float16, not {dtype}")
        self.epochs = int(epochs)
        self._records = torch.zeros(epochs, samples, classes, dtype=dtype, device=device)
        self._recorded_at = torch.full((epochs, samples), -1, dtype=torch.int32, device=device)  # -1: never
        self._arriving: tuple[torch.cuda.Event, int, Tensor, Tensor] | None = None

    @property
    def nbytes(self) -> int:
        """The memory of the records, in bytes."""
        return self._records.nbytes + self._recorded_at.nbytes

    def __call__(self, outputs: Tensor, index: Tensor, *, record: bool = True) -> Tensor:
        """The term for a batch, λ included; then its outputs are recorded.

        Args:
            outputs: the logits, [B, classes], of the pass whose gradient is taken.
            index: int64 [B], the places of these samples in the data set.
            record: False does not change the records. Use it for a second pass over a batch (a closure that is called
                twice), and for outputs at perturbed weights.

        Returns:
            A scalar; a constant zero while there can be no records yet.

        Raises:
            RuntimeError: no epoch was set.
            ValueError: shapes do not fit, or an index is beyond the data set (checked only if it is on the CPU).
        """
        epoch, index = self.epoch, self._checked(outputs, index)
        self._settle()
        loss, place = self._zero(outputs), epoch % self.epochs
        if epoch >= max(self.start, self.epochs):
            past, seen = self._read(place, epoch - self.epochs, index, outputs.device)
            loss = self._loss(outputs, past, seen)
        if record and epoch >= self.start - self.epochs:
            self._record(outputs.detach(), index, epoch)
        return loss

    def _checked(self, outputs: Tensor, index: Tensor) -> Tensor:
        _, samples, classes = self._records.shape
        if outputs.dim() != 2 or outputs.shape[1] != classes:
            raise ValueError(
                f"outputs must be logits of shape [B, {classes}], not {list(outputs.shape)}: build SAF with "
                "classes=<the last dimension>, and flatten other dimensions into the first, as separate samples"
            )
        if index.dtype != torch.int64 or index.shape != outputs.shape[:1]:
            raise ValueError(
                f"index must be int64 of shape {list(outputs.shape[:1])}, the places of these samples in the data set, "
                f"not {index.dtype} of shape {list(index.shape)}: have the data set return them with each sample"
            )
        if index.device.type == "cpu" and len(index):
            low, high = (int(x) for x in index.aminmax())
            if low < 0 or high >= samples:
                raise ValueError(
                    f"an index is {low if low < 0 else high}, but SAF was built for samples={samples}: give SAF the "
                    "size of the whole data set, and indices into the whole data set"
                )
        return index.to(self._records.device)

    def _read(self, place: int, epoch: int, index: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """The records of an epoch, and which samples have a record."""
        records = self._records[place]
        seen = self._recorded_at[place].index_select(0, index) == epoch
        if not _pinned(records.device, device):
            return records.index_select(0, index).to(device), seen.to(device)
        past = torch.empty(len(index), records.shape[1], dtype=records.dtype, device="cpu", pin_memory=True)
        torch.index_select(records, 0, index, out=past)
        return past.to(device, non_blocking=True), seen.pin_memory().to(device, non_blocking=True)

    @torch.no_grad()
    def _record(self, outputs: Tensor, index: Tensor, epoch: int) -> None:
        kept = centred(outputs.to(precision(outputs))).clamp(min=torch.finfo(self._records.dtype).min)
        kept = kept.to(self._records.dtype)
        if not _pinned(self._records.device, kept.device):
            self._write(epoch, index, kept.to(self._records.device))
            return
        staged = torch.empty(kept.shape, dtype=kept.dtype, device="cpu", pin_memory=True)
        staged.copy_(kept, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(kept.device))
        self._arriving = event, epoch, index.clone(), staged

    def _write(self, epoch: int, index: Tensor, kept: Tensor) -> None:
        at = torch.where(kept.isnan().any(1), -1, epoch).to(torch.int32)  # NaN marks outputs that were not finite
        self._records[epoch % self.epochs].index_copy_(0, index, kept)
        self._recorded_at[epoch % self.epochs].index_copy_(0, index, at)

    def _settle(self) -> None:
        """Store the outputs of the step before, which a GPU has sent meanwhile."""
        if self._arriving is not None:
            event, epoch, index, staged = self._arriving
            self._arriving = None
            event.synchronize()
            self._write(epoch, index, staged)

    def state_dict(self) -> dict[str, Any]:
        """Records and epoch, at any time within an epoch. The tensors are not copies, as in a module's state."""
        self._settle()
        return {"epoch": self._epoch, "records": self._records, "recorded_at": self._recorded_at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; dtype and device of the records do not change.

        Raises:
            ValueError: the state is no state of a SAF, or has another data set or another E. Nothing has been loaded.
        """
        for name, own in (("records", self._records), ("recorded_at", self._recorded_at)):
            saved = state.get(name)
            if not isinstance(saved, Tensor) or saved.shape != own.shape:
                found = list(saved.shape) if isinstance(saved, Tensor) else "missing"
                raise ValueError(
                    f"this is no state of such a SAF: {name!r} must have the shape {list(own.shape)}, but is {found}; "
                    "build SAF with the epochs, samples and classes of the SAF that saved it"
                )
        self._arriving = None
        self._epoch = state.get("epoch")
        self._records.copy_(state["records"])
        self._recorded_at.copy_(state["recorded_at"])
