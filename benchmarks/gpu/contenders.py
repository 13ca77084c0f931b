"""Who takes the step: our optimizers, and the alternatives in eager PyTorch as they are best written for a GPU.

Every contender has `params`, `first_step()`, `second_step()` and, for LETS, `radius_step(train, val)` with the
gradients at the new weights and `rho_grad()`. Gradients of the two passes are read from `p.grad`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import eager_radius
from benchmarks.gpu.timing import Device
from lets_kernels import ASAM, LETSSAM, SAM, LearnedRadius
from lets_kernels.bench import eager

Base = Callable[[Sequence[Tensor]], torch.optim.Optimizer]
RHO, XI = 5.0, 0.01  # a radius so large that an error in the perturbation shows in the weights
TRAIN_LOSS, VAL_LOSS = 1.0, 1.5
BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, float]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}),
    "AdamW": (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 1e-2}),
}
# Method: how T scales (plain, element, filter), and the curvature of a learned radius.
METHODS: dict[str, tuple[str, str | None]] = {
    "SAM": ("plain", None),
    "ASAM": ("element", None),
    "ASAM filter-wise": ("filter", None),
    "LETS secant": ("plain", "secant"),
    "LETS diagonal": ("plain", "diagonal"),
}


def fused(base: str) -> Base:
    """torch's own fused optimizer."""
    kind, options = BASES[base]
    return lambda params: kind(params, **options, fused=True)  # type: ignore[arg-type]


class Ours:
    """One of our optimizers."""

    def __init__(self, params: list[Tensor], method: str, base: str, **options: Any) -> None:
        scale, curvature = METHODS[method]
        kind, settings = BASES[base]
        self.params = params
        if curvature:
            radius = LearnedRadius(RHO, curvature=curvature)
            self.optimizer: SAM = LETSSAM(params, kind, radius, **settings, **options)
        elif scale == "filter":
            self.optimizer = ASAM(params, kind, RHO, XI, filterwise=True, **settings, **options)
        else:
            self.optimizer = SAM(params, kind, RHO, scale == "element", **settings, **options)
        self._learns = curvature is not None
        self._losses = [torch.full((), x, device=params[0].device) for x in (TRAIN_LOSS, VAL_LOSS)]

    def first_step(self) -> None:
        self.optimizer.first_step(zero_grad=self._learns)  # else a learned radius would clone the gradients

    def second_step(self) -> None:
        self.optimizer.second_step()

    def radius_step(self, train: Sequence[Tensor], val: Sequence[Tensor]) -> None:
        def closure(grads: Sequence[Tensor], loss: Tensor) -> Callable[[], Tensor]:
            def run() -> Tensor:
                give(self.params, grads)
                return loss

            return run

        self.optimizer.radius_step(closure(train, self._losses[0]), closure(val, self._losses[1]))

    def rho_grad(self) -> Tensor:
        return self.optimizer.metrics()["rho_grad"]

    def state(self) -> dict[Tensor, Any]:
        return self.optimizer.base_optimizer.state


def give(params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = g


class Learner:
    """ν under Adam in eager code, with ε (or for the secant the two gradients) kept from the step."""

    def __init__(self, curvature: str, lr: float, device: torch.device, foreach: bool) -> None:
        self.nu = torch.full((), RHO, dtype=torch.float64, device=device).log().requires_grad_()
        self.optimizer = torch.optim.Adam([self.nu], lr=1e-2)
        self.curvature, self.lr, self.foreach = curvature, lr, foreach
        self.gap = torch.full((), VAL_LOSS, device=device) - TRAIN_LOSS
        self.found = torch.zeros((), device=device)

    def rho(self) -> Tensor:
        return self.nu.detach().exp()

    def learn(
        self,
        train: Sequence[Tensor],
        val: Sequence[Tensor],
        perturbed: Sequence[Tensor],
        first: Sequence[Tensor],
        eps: Sequence[Tensor],
    ) -> None:
        if self.curvature == "secant":
            share = eager_radius.foreach_rho_grad_secant if self.foreach else eager_radius.rho_grad_secant
            slope = share(val, train, perturbed, first)
        elif self.foreach:
            product = torch._foreach_sub(list(val), list(train))
            for factor in (perturbed, perturbed, eps):
                torch._foreach_mul_(product, list(factor))
            slope = torch.stack([x.sum() for x in product]).sum()
        else:
            slope = eager_radius.rho_grad(val, train, perturbed, eps)
        self.found = -self.lr * self.gap * slope / self.rho()
        self.nu.grad = (self.rho() * self.found).to(self.nu.dtype)
        self.optimizer.step()


class Eager:
    """What the alternatives have in common: the base optimizer, T, and for LETS the learner."""

    def __init__(self, params: list[Tensor], method: str, base: str, foreach: bool) -> None:
        self.scale, curvature = METHODS[method]
        self.params, self.base = params, fused(base)(params)
        lr = BASES[base][1]["lr"]
        self.learner = Learner(curvature, lr, params[0].device, foreach) if curvature else None
        self.keeps_eps = curvature == "diagonal"
        self.eps: list[Tensor] = []
        self.first: list[Tensor] = []
        self.rho: float | Tensor = RHO

    def begin(self) -> list[Tensor]:
        grads = [p.grad for p in self.params if p.grad is not None]
        if self.learner:
            self.first, self.rho = grads, self.learner.rho()
            for p in self.params:
                p.grad = None  # the gradients are kept, so the second pass must not write over them
        return grads

    def radius_step(self, train: Sequence[Tensor], val: Sequence[Tensor]) -> None:
        assert self.learner is not None
        with torch.no_grad():
            perturbed = [p.grad for p in self.params if p.grad is not None]
            give(self.params, train)  # as the two backwards at the new weights do, and ours does within
            give(self.params, val)
            self.learner.learn(train, val, perturbed, self.first, self.eps)

    def rho_grad(self) -> Tensor:
        assert self.learner is not None
        return self.learner.found

    def state(self) -> dict[Tensor, Any]:
        return self.base.state


def scale_of(p: Tensor, scale: str) -> Tensor | float:
    """T of one parameter; element-wise without ξ, as the code that most people use has it."""
    if scale == "plain":
        return 1.0
    if scale == "element":
        return p.abs()
    if p.dim() > 2:
        return p.flatten(1).norm(dim=1).view(-1, *(1,) * (p.dim() - 1)) + XI
    return p.abs() + XI


class PerTensor(Eager):
    """A Python loop over the parameters for each pass, as most PyTorch code has it; torch's fused base optimizer."""

    def __init__(self, params: list[Tensor], method: str, base: str) -> None:
        super().__init__(params, method, base, foreach=False)
        self.old: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def first_step(self) -> None:
        grads = self.begin()
        rows = list(zip(self.params, grads, strict=True))
        norm = eager.total_norm([scale_of(p, self.scale) * g for p, g in rows])
        scale = self.rho / (norm + 1e-12)
        self.eps = []
        for p, g in rows:
            self.old[p] = p.data.clone()
            square = torch.pow(p, 2) if self.scale == "element" else scale_of(p, self.scale) ** 2
            e_w = square * g * scale.to(p)
            p.add_(e_w)
            if self.keeps_eps:
                self.eps.append(e_w)

    @torch.no_grad()
    def second_step(self) -> None:
        for p in self.params:
            p.data = self.old[p]
        self.base.step()


class Foreach(Eager):
    """Lists of tensors, one call a pass.

    waits: the scale is read on the host, which saves writing ε. swap: the perturbed weights are new tensors and the
    restore exchanges pointers, which moves nothing; `p.data_ptr()` then changes twice a step, which sharded, captured
    and flattened parameters do not allow.
    """

    def __init__(self, params: list[Tensor], method: str, base: str, waits: bool = False, swap: bool = False) -> None:
        super().__init__(params, method, base, foreach=True)
        self.waits, self.swap = waits, swap
        self.saved = [] if swap else [torch.empty_like(p) for p in params]

    @torch.no_grad()
    def first_step(self) -> None:
        grads = self.begin()
        data = [p.data for p in self.params]
        along, own = grads, self.scale != "plain"
        if own:
            scales = data if self.scale == "element" else [torch.as_tensor(scale_of(p, self.scale)) for p in data]
            along = list(torch._foreach_mul(scales, grads))  # ‖|θ| g‖ = ‖θ g‖
        scale = self.rho / (eager.foreach_total_norm(along) + 1e-12)
        if own:
            torch._foreach_mul_(along, scales)
        if not self.swap:
            torch._foreach_copy_(self.saved, data)
        if self.waits:
            alpha = float(scale)
            if self.swap:
                self._point_to(torch._foreach_add(data, along, alpha=alpha))
            else:
                torch._foreach_add_(data, along, alpha=alpha)
            return
        factor = scale.to(data[0].dtype)
        if own:
            torch._foreach_mul_(along, factor)
        else:
            along = list(torch._foreach_mul(along, factor))
        self.eps = along if self.keeps_eps else []
        if not self.swap:
            torch._foreach_add_(data, along)
        elif self.keeps_eps:
            self._point_to(torch._foreach_add(data, along))
        else:
            torch._foreach_add_(along, data)
            self._point_to(along)

    def _point_to(self, perturbed: Sequence[Tensor]) -> None:
        self.saved = [p.data for p in self.params]
        for p, new in zip(self.params, perturbed, strict=True):
            p.data = new

    @torch.no_grad()
    def second_step(self) -> None:
        if self.swap:
            for p, old in zip(self.params, self.saved, strict=True):
                p.data = old
            self.saved = []
        else:
            torch._foreach_copy_([p.data for p in self.params], self.saved)
        self.base.step()


class Compiled:
    """SAM with SGD through torch.compile: both passes, the restore and SGD's arithmetic in one, nothing waits."""

    def __init__(self, params: list[Tensor]) -> None:
        self.params = params
        self.saved = [torch.empty_like(p) for p in params]
        self.momenta = [torch.zeros_like(p) for p in params]
        o = BASES["SGD"][1]

        def first(data: list[Tensor], grads: list[Tensor], saved: list[Tensor]) -> None:
            scale = RHO / (torch.stack(torch._foreach_norm(grads)).norm() + 1e-12)
            torch._foreach_copy_(saved, data)
            torch._foreach_add_(data, torch._foreach_mul(grads, scale))

        def second(data: list[Tensor], grads: list[Tensor], saved: list[Tensor], momenta: list[Tensor]) -> None:
            torch._foreach_mul_(momenta, o["momentum"])
            torch._foreach_add_(momenta, torch._foreach_add(grads, saved, alpha=o["weight_decay"]))
            torch._foreach_copy_(data, torch._foreach_add(saved, momenta, alpha=-o["lr"]))

        backend = "inductor" if params[0].is_cuda else "eager"  # a dry run compiles nothing
        options: dict[str, Any] = {"fullgraph": True, "dynamic": False, "backend": backend}
        self._first, self._second = (torch.compile(f, **options) for f in (first, second))

    @torch.no_grad()
    def first_step(self) -> None:
        self._first([p.data for p in self.params], [p.grad for p in self.params], self.saved)

    @torch.no_grad()
    def second_step(self) -> None:
        self._second([p.data for p in self.params], [p.grad for p in self.params], self.saved, self.momenta)

    def state(self) -> dict[Tensor, Any]:
        return {p: {"momentum_buffer": m} for p, m in zip(self.params, self.momenta, strict=True)}


def passes(device: Device, shapes: Sequence[Sequence[int]], learns: bool) -> list[list[Tensor]]:
    """The gradients g and ĝ; for LETS also ḡ_tr and ḡ_vl, so correlated that ∂F/∂ρ is not a sum of noise."""

    def normal(sd: float) -> list[Tensor]:
        return [device.normal(s, sd) for s in shapes]

    g, perturbed = normal(0.01), normal(0.002)
    torch._foreach_add_(perturbed, g, alpha=1.5)
    if not learns:
        return [g, perturbed]
    train, val = normal(0.01), normal(0.005)
    torch._foreach_add_(val, train)
    torch._foreach_add_(val, g)
    return [g, perturbed, train, val]
