"""What is measured: the mean loss of a model over some batches, as a function of the weights."""

import copy
import itertools
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from lets_kernels.sharpness.snapshot import Snapshot, detached, forget_casts, held
from lets_kernels.space.shards import is_spread

#: The mean loss of a batch, 0-d, from the model and one batch of the loader, whatever that batch is.
Loss: TypeAlias = Callable[[nn.Module, Any], Tensor]


def samples(batch: Any) -> int:
    """How many samples a batch has: the first dimension of the first tensor in it. 1 if there is none.

    Looks into mappings, tuples, lists and named tuples.
    """
    found = _first(batch)
    return 1 if found is None or found.dim() == 0 else len(found)


def _first(batch: Any) -> Tensor | None:
    if isinstance(batch, Tensor):
        return batch
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    return next((found for part in parts if (found := _first(part)) is not None), None)


class Objective:
    """L(θ): the mean loss of a model over some batches. Everything in this package is measured at such an objective.

    The weights θ are all parameters that require gradients, as one flat vector, in the order of ``model.parameters()``;
    it is float32, or float64 if a parameter is.

    The model is left as it was, also by an exception or Ctrl-C: weights and buffers bit for bit, ``training`` of each
    module, torch's random numbers. ``p.grad`` is not used. Call it between training steps: weights move meanwhile.

    Args:
        model: the module; on one device, not sharded.
        loss: ``loss(model, batch)`` gives the mean loss over the samples of a batch, a 0-d tensor. It must use the
            model that it is given. One argument for the batch fits every loader: pairs, dicts, several inputs; what has
            to be moved to a device is moved here.
        data: batches, from a data loader or a list. They are drawn once and kept in memory, so that each pass sees the
            same samples, with the same augmentations, whatever the loader shuffles.
        batches: how many batches to draw; None: all.
        train: False measures in evaluation mode: batch norm uses its running statistics, dropout is off. True measures
            in training mode: batch norm uses each batch's statistics, and dropout draws the same masks in every pass.
        autocast: run the passes under ``torch.autocast`` with this dtype. The caller's own autocast works as well.
            Gradients are not scaled: in float16 small ones are lost, so take bfloat16 where you can.
        size: how many samples (or tokens) a batch has, of which its loss is the mean; see :func:`samples`.

    Attributes:
        cost: what has been computed so far, by batch: "losses" (a forward pass), "gradients" (forward and backward),
            "products" (Hessian times vector; two to three gradients).

    Raises:
        ValueError: there are no batches, or nothing to differentiate.
        TypeError: parameters are sharded, complex, or on several devices, or the model is wrapped for replicas.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        data: Iterable[Any],
        *,
        batches: int | None = None,
        train: bool = False,
        autocast: torch.dtype | None = None,
        size: Callable[[Any], int] = samples,
    ) -> None:
        _check(model)
        self.model, self._loss, self._train, self._autocast = model, loss, train, autocast
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.device, self.dtype = self.params[0].device, torch.float32
        for p in self.params:
            self.dtype = torch.promote_types(self.dtype, p.dtype)
        self.cost: Counter[str] = Counter()
        self._snapshot: Snapshot | None = None
        self._data: list[Any] = []
        self._draw(data, batches)
        sizes = [size(batch) for batch in self._data]
        if not sizes or min(sizes) < 1:
            raise ValueError("there is nothing to measure on: the data has no batches, or a batch has no samples")
        self._shares = [n / sum(sizes) for n in sizes]

    @held
    def _draw(self, data: Iterable[Any], batches: int | None) -> None:
        self._data = list(itertools.islice(data, batches))  # a loader that shuffles draws from torch's random numbers

    @property
    def numel(self) -> int:
        """How many weights there are."""
        return sum(p.numel() for p in self.params)

    @property
    def begun(self) -> bool:
        """True while a measurement goes on."""
        return self._snapshot is not None

    def begin(self) -> None:
        """A measurement begins; :func:`held` calls it."""
        self._snapshot = Snapshot(self.model, self.params)
        self.model.train(self._train)

    def end(self) -> None:
        """A measurement is over, or was cut short."""
        if self._snapshot is not None:
            self._snapshot.restore()
            self._snapshot = None

    def each(self) -> Iterator[tuple["Objective", float]]:
        """An objective for each batch, and its share of the samples."""
        for batch, share in zip(self._data, self._shares, strict=True):
            one = copy.copy(self)
            one._data, one._shares, one._snapshot = [batch], [1.0], None
            yield one, share

    @property
    def weights(self) -> Tensor:
        """θ, flat, a copy; while a measurement goes on, from before it."""
        return self.flat(self._snapshot.weights if self._snapshot else [p.detach() for p in self.params])

    def flat(self, tensors: Iterable[Tensor]) -> Tensor:
        """One vector from a tensor for each parameter."""
        return torch.cat([t.reshape(-1).to(self.dtype) for t in tensors])

    def split(self, vector: Tensor) -> list[Tensor]:
        """Views of a flat vector, in the shapes of the parameters.

        Raises:
            ValueError: the vector has another length.
        """
        if vector.shape != (self.numel,):
            raise ValueError(f"a vector must be flat, with {self.numel} elements, not of shape {list(vector.shape)}")
        parts = vector.split([p.numel() for p in self.params])
        return [part.view(p.shape) for part, p in zip(parts, self.params, strict=True)]

    def move(self, epsilon: Tensor | None) -> None:
        """The weights become θ + ε, for a measurement that has begun; None brings θ back."""
        if self._snapshot is None:
            raise RuntimeError("weights are moved only within a measurement, which brings them back: see held()")
        steps = [None] * len(self.params) if epsilon is None else self.split(epsilon)
        with torch.no_grad():
            for p, w, step in zip(self.params, self._snapshot.weights, steps, strict=True):
                p.copy_(w if step is None else w + step)
        forget_casts()

    @held
    def loss(self) -> float:
        """L at the present weights."""
        total = 0.0
        with torch.no_grad():
            for batch, share in self._pass("losses"):
                total += share * float(self._value(batch))
        return total

    @held
    def gradient(self) -> tuple[float, Tensor]:
        """L and ∇L at the present weights; the gradient is flat."""
        total, gradient = 0.0, torch.zeros(self.numel, dtype=self.dtype, device=self.device)
        with torch.enable_grad():
            for batch, share in self._pass("gradients"):
                loss = self._differentiable(batch)
                grads = torch.autograd.grad(loss, self.params, allow_unused=True)
                gradient += share * self.flat(detached(grads, self.params))
                total += share * float(loss.detach())
        return total, gradient

    @held
    def product(self, vector: Tensor) -> Tensor:
        """H v at the present weights, by differentiating the gradient once more; both vectors are flat.

        Attention is computed by torch's plain formula, and compiled modules run uncompiled: the fast ones have no
        second derivative.
        """
        parts, found = self.split(vector), torch.zeros_like(vector)
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), _uncompiled():
            for batch, share in self._pass("products"):
                grads = torch.autograd.grad(
                    self._differentiable(batch), self.params, create_graph=True, allow_unused=True
                )
                used = [(g, v.to(g.dtype)) for g, v in zip(grads, parts, strict=True) if g is not None]
                used = [(g, v) for g, v in used if g.requires_grad]  # elsewhere L is linear
                if used:
                    heads, along = zip(*used, strict=True)
                    curved = torch.autograd.grad(heads, self.params, along, allow_unused=True)
                    found += share * self.flat(detached(curved, self.params))
        return found

    def _pass(self, kind: str) -> Iterator[tuple[Any, float]]:
        assert self._snapshot is not None
        self._snapshot.replay()
        for batch, share in zip(self._data, self._shares, strict=True):
            self.cost[kind] += 1
            yield batch, share

    def _value(self, batch: Any) -> Tensor:
        with self._casting():
            loss = self._loss(self.model, batch)
        if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.is_floating_point():
            what = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss(model, batch) must give the mean loss of the batch, a real 0-d tensor, not {what}")
        return loss

    def _differentiable(self, batch: Any) -> Tensor:
        loss = self._value(batch)
        if not loss.requires_grad:
            raise ValueError(
                "loss(model, batch) gives a loss without a gradient: it must use the model that it is given, and "
                "neither detach() nor no_grad()"
            )
        return loss

    def _casting(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._autocast is None else torch.autocast(self.device.type, dtype=self._autocast)


def finite(loss: float) -> float:
    """NaN counts as infinite: a loss that cannot be computed is no small one."""
    return math.inf if math.isnan(loss) else loss


def _uncompiled() -> AbstractContextManager[Any]:
    """Without an import of the compiler, which takes seconds, where nobody has imported it."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _check(model: nn.Module) -> None:
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ValueError("the model has no parameters that require gradients, so there is no sharpness")
    if isinstance(model, DistributedDataParallel):
        raise TypeError(
            "the model is wrapped for replicas (DistributedDataParallel): pass model.module; what is measured is then "
            "of this rank's batches"
        )
    fsdp = sys.modules.get("torch.distributed.fsdp")  # where nobody has imported it, nothing is sharded
    if any(is_spread(p) for p in params) or (
        fsdp is not None and any(isinstance(m, fsdp.FullyShardedDataParallel) for m in model.modules())
    ):
        raise TypeError(
            "the parameters are sharded over ranks, and sharpness is measured on whole ones: load the full state "
            "(torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True) into a model "
            "that is not sharded, and measure on one rank"
        )
    if len({p.device for p in params}) > 1:
        raise TypeError("the parameters are on several devices: move the model to one")
    if any(p.is_complex() for p in params):
        raise TypeError("the model has complex parameters; view them as real ones (torch.view_as_real) to measure it")
