"""Which samples of a batch each pass of a step counts, and with which weight.

By default every sample counts alike, and the closure is torch's: it calls ``backward`` itself. The other classes here
look at each sample's own loss. Their closure takes ``subset=None``: None, or an int64 tensor of places in the batch. It
computes the losses of these samples and returns them, of shape [B]; the optimizer calls ``zero_grad`` and ``backward``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lets_kernels.around.amp import Scaler

Closure = Callable[..., Any]


@dataclass
class Pass:
    """What the step provides for a pass: how to call a closure, and how to run backward."""

    call: Callable[[Callable[[], Any]], Any]  # with gradients enabled; its gradients are unscaled afterwards
    drop_gradients: Callable[[], None]
    scaler: Scaler | None

    def backward(self, loss: Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()


class Samples:
    """Every sample counts alike: the closure zeroes the gradients, computes the loss and calls ``backward``.

    Examples:
        >>> opt = SAM([w], SGD, rho=5.0, samples=Samples(), lr=0.1)  # the default
        >>> opt.samples.per_sample  # the closure returns one loss, and calls backward
        False
    """

    #: True if the closure returns the loss of each sample.
    per_sample = False
    #: True if the first gradient (and the second) is the gradient of the mean loss of the whole batch.
    first_is_whole = second_is_whole = True
    #: True if there is a forward pass without a backward between the two passes.
    looks_between = False

    def first(self, passed: Pass, closure: Closure) -> Any:
        """Make the pass at θ. Leaves the gradients; returns what the closure returned."""
        return self.whole(passed, closure)

    def second(self, passed: Pass, closure: Closure) -> Any:
        """Make the pass at θ + ε."""
        return self.whole(passed, closure)

    def whole(self, passed: Pass, closure: Closure) -> Any:
        """Make a pass in which every sample counts."""
        return passed.call(closure)

    def loss(self, returned: Any) -> Any:
        """The loss of the batch, from what the closure returned."""
        return returned


def _losses(returned: Any) -> Tensor:
    losses = returned[0] if isinstance(returned, (tuple, list)) else returned
    if not isinstance(losses, Tensor) or losses.dim() != 1:
        raise ValueError(
            "this closure must return the loss of each sample, of shape [B] (reduction='none'), and leave backward() "
            "to the optimizer"
        )
    return losses


class _PerSample(Samples):
    per_sample = True

    def whole(self, passed: Pass, closure: Closure) -> Any:
        return self._weighted(passed, closure, lambda returned: _losses(returned).mean())

    def loss(self, returned: Any) -> Any:
        return None if returned is None else _losses(returned).mean()

    @staticmethod
    def _weighted(
        passed: Pass, closure: Closure, loss_of: Callable[[Any], Tensor], subset: Tensor | None = None
    ) -> Any:
        def run() -> Any:
            passed.drop_gradients()
            returned = closure(subset)
            passed.backward(loss_of(returned))
            return returned

        return passed.call(run)


class SelectedSamples(_PerSample):
    """ESAM's sharpness-sensitive data selection: the second gradient is that of the samples whose loss ε raised most.

    Du et al., ICLR 2022. A forward pass at θ + ε, without gradients, gives the losses there; then the closure is called
    for the chosen samples. With several ranks, each rank chooses among its own samples.

    Args:
        gamma: γ in (0, 1], the share of chosen samples, at least one sample; 1 takes all, without that forward pass.

    Raises:
        ValueError: γ is out of its range.

    Examples:
        >>> samples = SelectedSamples(gamma=0.5)
        >>> before, after = torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([1.1, 1.4, 0.9, 1.2])
        >>> samples.subset(before, after)  # ε raised the second and the fourth loss most
        tensor([1, 3])
        >>> opt = SAM(model.parameters(), SGD, samples=samples, lr=0.1)
    """

    def __init__(self, gamma: float = 0.5) -> None:
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma must be in (0, 1], not {gamma}")
        self.gamma = float(gamma)
        self.second_is_whole = self.gamma == 1
        self.looks_between = self.gamma < 1
        self._before: Tensor | None = None

    def subset(self, before: Tensor, after: Tensor) -> Tensor:
        """The places of the chosen samples, int64 of shape [γB], from their losses at θ and at θ + ε, of shape [B].

        For the two-step shape, where the caller makes the second backward. Nothing waits for the device.
        """
        count = max(1, math.ceil(self.gamma * len(before) - 1e-9))  # 0.07 * 100 is above 7 in float64
        return torch.topk((after - before).detach(), count).indices

    def first(self, passed: Pass, closure: Closure) -> Any:
        returned = self.whole(passed, closure)
        self._before = _losses(returned).detach()
        return returned

    def second(self, passed: Pass, closure: Closure) -> Any:
        before, self._before = self._before, None
        if self.gamma == 1 or before is None:
            return self.whole(passed, closure)
        with torch.no_grad():
            after = _losses(closure(None))
        chosen = self.subset(before, after)
        return self._weighted(passed, closure, lambda returned: _losses(returned).mean(), chosen)


def output_norms(losses: Tensor, outputs: Tensor) -> Tensor:
    """‖∂ℓ_i/∂z_i‖, the norm of the gradient of each sample's loss in the network's outputs z (logits): shape [B]."""
    gradients = torch.autograd.grad(losses.sum(), outputs, retain_graph=True)[0]
    return gradients.detach().reshape(len(losses), -1).norm(dim=1)


class WeightedSamples(_PerSample):
    """δ-SAM: the ascent gradient weights the samples, so that one ε approximates one ε for each sample.

    Zhou et al., 2021 (arXiv 2112.08772). A perturbation for each sample is ε_i = ρ g_i/‖g_i‖; the mean of these is
    along Σ w_i g_i with w_i ∝ 1/‖g_i‖. How to estimate the norms without one backward pass a sample, and their power,
    are arguments here. By default the norms come from the gradient in the outputs, for which the closure returns
    ``(losses, outputs)``. The second pass counts every sample alike. With several ranks, the weights of each rank sum
    up to one.

    Args:
        power: w_i ∝ ‖g_i‖^power; 0 gives all samples the same weight.
        norms: takes what the closure returned (``*returned``) and gives the norms, of shape [B].

    Raises:
        ValueError: the power is not finite.

    Examples:
        >>> def losses(subset=None):  # of each sample, and the outputs; the optimizer zeroes and calls backward
        ...     chosen = slice(None) if subset is None else subset
        ...     outputs = model(inputs[chosen])
        ...     return functional.cross_entropy(outputs, targets[chosen], reduction="none"), outputs
        >>> opt = SAM(model.parameters(), SGD, samples=WeightedSamples(power=-0.5), lr=0.1)
        >>> losses_at_theta, outputs = opt.step(losses)
    """

    def __init__(self, power: float = -1.0, norms: Callable[..., Tensor] = output_norms) -> None:
        if not math.isfinite(power):
            raise ValueError(f"power must be finite, not {power}")
        self.power, self.norms = float(power), norms
        self.first_is_whole = not self.power

    def weights(self, *returned: Any) -> Tensor:
        """The weights w_i, which sum to one, from what the closure returned: of shape [B], without a graph.

        For the two-step shape: ``(opt.samples.weights(losses, outputs) * losses).sum().backward()``. A sample whose
        norm is zero has no gradient; if the power is negative, its weight is zero.
        """
        if not self.power:
            return torch.full_like(returned[0].detach(), 1 / len(returned[0]))
        norms = self.norms(*returned).detach()
        raised = torch.where(norms > 0, norms.pow(self.power), torch.zeros_like(norms))
        total = raised.sum()
        return torch.where(total > 0, raised / total, torch.full_like(raised, 1 / len(raised)))

    def first(self, passed: Pass, closure: Closure) -> Any:
        def loss_of(returned: Any) -> Tensor:
            losses = _losses(returned)
            if not self.power:
                return losses.mean()
            if not isinstance(returned, (tuple, list)):
                raise ValueError("this closure must return (losses, outputs): the weights are made from the outputs")
            return (self.weights(*returned) * losses).sum()

        return self._weighted(passed, closure, loss_of)


class FunctionalSamples(_PerSample):
    """Functional SAM: the second gradient has the Jacobian at θ + ε, and the loss's derivative at θ.

    Singh, Mobahi, Agarwala & Dauphin, ICML 2025 (arXiv 2502.02407). With the outputs F(θ) (logits) and v = ∂L/∂F at θ,
    the step goes along ∂(v·F(θ + ε))/∂θ; SAM would take v at θ + ε, too. The closure returns ``(losses, outputs)`` in
    both passes, for the same samples in the same order.

    Raises:
        ValueError: the closure returned no outputs, or in the second pass outputs of another shape.

    Examples:
        >>> opt = SAM(model.parameters(), SGD, samples=FunctionalSamples(), lr=0.1)
        >>> outputs = model(inputs)
        >>> losses = functional.cross_entropy(outputs, targets, reduction="none")
        >>> v = opt.samples.derivative(losses, outputs)
        >>> losses.mean().backward()
        >>> opt.first_step(zero_grad=True)
        True
        >>> (v * model(inputs)).sum().backward()
        >>> opt.second_step(zero_grad=True)
    """

    second_is_whole = False

    def __init__(self) -> None:
        self._derivative: Tensor | None = None

    def derivative(self, losses: Tensor, outputs: Tensor) -> Tensor:
        """v = ∂(mean loss)/∂(outputs), of the outputs' shape, without a graph.

        For the two-step shape: before the first backward, ``v = opt.samples.derivative(losses, outputs)``; the second
        one is ``(v * outputs).sum().backward()``.
        """
        return torch.autograd.grad(losses.mean(), outputs, retain_graph=True)[0].detach()

    def first(self, passed: Pass, closure: Closure) -> Any:
        def loss_of(returned: Any) -> Tensor:
            self._derivative = self.derivative(*self._pair(returned))
            return _losses(returned).mean()

        return self._weighted(passed, closure, loss_of)

    def second(self, passed: Pass, closure: Closure) -> Any:
        derivative, self._derivative = self._derivative, None
        if derivative is None:
            return self.whole(passed, closure)

        def loss_of(returned: Any) -> Tensor:
            outputs = self._pair(returned)[1]
            if outputs.shape != derivative.shape:
                raise ValueError(
                    f"the outputs have shape {tuple(outputs.shape)} in the second pass, and {tuple(derivative.shape)} "
                    "in the first: return those of the same samples"
                )
            return (derivative * outputs).sum()

        return self._weighted(passed, closure, loss_of)

    @staticmethod
    def _pair(returned: Any) -> tuple[Tensor, Tensor]:
        if not isinstance(returned, (tuple, list)) or len(returned) < 2:
            raise ValueError("this closure must return (losses, outputs): the derivative is taken in the outputs")
        return _losses(returned), returned[1]
