"""Methods that use Fisher information: Fisher SAM (Kim et al., ICML 2022), Sparse SAM (Mi et al., NeurIPS 2022)."""

from types import MappingProxyType
from typing import Any

import torch

from lets_kernels.methods.catalogue import AS_SAM, CODE, OURS, Method
from lets_kernels.parts.direction import Fisher, Masked
from lets_kernels.parts.part import at_least_one
from lets_kernels.parts.radius import RadiusLike
from lets_kernels.parts.samples import Closure
from lets_kernels.sam import SAM, BaseLike, Params
from lets_kernels.step.frameworks import no_scaler_steps


class FisherSAM(SAM):
    """ε = ρ F⁻¹g/√(gᵀF⁻¹g): SAM in the geometry of the diagonal Fisher information F⁻¹ ≈ 1/(1 + η_F g²).

    Kim et al., ICML 2022. F is computed from the batch's gradient.

    Args:
        params, base_optimizer, rho, kwargs: as :class:`SAM`.
        eta: η_F ≥ 0; 0 is SAM.

    Examples:
        >>> opt = FisherSAM([w], SGD, rho=5.0, eta=1.0, lr=0.1)  # F⁻¹ = (1/10, 1/17): ε leans towards w₁
        >>> loss = opt.step(closure)
        >>> print(w.data)
        tensor([2.5895, 1.4266])
    """

    def __init__(
        self, params: Params, base_optimizer: BaseLike, rho: RadiusLike = 0.05, eta: float = 1.0, **kwargs: Any
    ) -> None:
        super().__init__(params, base_optimizer, rho, direction=Fisher(eta), **kwargs)


class SparseSAM(SAM):
    """ε = ρ (g/‖g‖) ⊙ mask: only a share 1 − s of the weights is perturbed.

    Mi et al., NeurIPS 2022. The first step selects a mask, one byte an element. :class:`~lets_kernels.Masked` says how
    and when a mask is selected.

    Args:
        params, base_optimizer, rho, kwargs: as :class:`SAM`.
        sparsity: s in [0, 1); 0 is SAM.
        kind: ``"fisher"`` or ``"dynamic"``.
        interval, drop, steps: see :class:`~lets_kernels.Masked`.

    Examples:
        >>> opt = SparseSAM([w], SGD, rho=5.0, sparsity=0.5, lr=0.1)
        >>> loss = closure()
        >>> with opt.perturbed():  # of two weights, only that with the larger gradient is moved
        ...     print(w.data)
        tensor([3., 6.])
    """

    called = MappingProxyType(
        {"update_freq": "interval", "drop_rate": "drop", "T_end": "steps", "num_samples": "update_mask(samples=...)"}
    )

    def __init__(
        self,
        params: Params,
        base_optimizer: BaseLike,
        rho: RadiusLike = 0.05,
        sparsity: float = 0.5,
        kind: str = "fisher",
        interval: int | None = None,
        *,
        drop: float = 0.5,
        steps: int | None = None,
        **kwargs: Any,
    ) -> None:
        direction = Masked(sparsity, kind, interval, drop=drop, steps=steps)
        super().__init__(params, base_optimizer, rho, direction=direction, **kwargs)

    def update_mask(self, closure: Closure, samples: int = 128) -> None:
        """Select the Fisher mask by Σ g² over n samples, as the paper does every few epochs. Call it between steps.

        Meanwhile it needs memory for one sum, as large as the parameters. Afterwards it puts present gradients back.

        Args:
            closure: as for ``step``, but for one sample, a new one at each call. It must not scale the loss.
            samples: n, the number of calls. The authors' commands have 128, 512 and 1024, their code 1024 by default.

        Raises:
            RuntimeError: the weights are perturbed.
            ValueError: the mask is dynamic, ``samples`` is below 1, or Σ g² is zero or not finite. The old mask stays.
        """
        e, w, direction = self._engine, self._engine.work, self.direction
        assert isinstance(direction, Masked)
        if direction.kind != "fisher":
            raise ValueError("update_mask() is for kind='fisher'; a dynamic mask is selected within steps")
        at_least_one(samples, "samples")
        with no_scaler_steps(self), torch.no_grad():
            e.refuse_another_step("update_mask()")
            buckets = w.tables.agreed().buckets
            kept = [(p, p.grad) for b in buckets for p in b.params]
            runs = [b.all_runs() for b in buckets]
            sums = [
                [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in r.params] for r in runs
            ]
            w.setting.network.statistics.hold()
            try:
                for _ in range(samples):
                    w.drop_gradients()
                    self.samples.whole(w.a_pass(None), closure)
                    for b, own in zip(buckets, sums, strict=True):
                        passed = b.gather()
                        for i, g in zip(passed.indices, passed.grads, strict=True):
                            wide = g.to(own[i].dtype)
                            own[i].addcmul_(wide, wide)
            finally:
                w.setting.network.statistics.release()
                for p, grad in kept:
                    p.grad = grad
                e.mark_gradients()
            found = torch.stack([t.sum(dtype=torch.float64).to(w.progress.home) for own in sums for t in own])
            total = w.setting.replicas.mean(found.sum())
            if not bool(torch.isfinite(total) & (total > 0)):
                raise ValueError(
                    "the squared gradients of these samples sum up to zero or to no finite number, so the old mask "
                    "stays: does the closure call backward(), on a loss that no gradient scaler has scaled?"
                )
            direction.select(w.first_pass(runs), sums)


METHODS = (
    Method(FisherSAM, "Fisher SAM", "Kim et al., ICML 2022", (Fisher,))
    .whose(rho=AS_SAM, eta=OURS)
    .row("Fisher SAM", "rho=0.05, eta=1.0, lr=0.1"),
    Method(SparseSAM, "Sparse SAM", "Mi et al., NeurIPS 2022", (Masked,))
    .whose(
        rho=f"{CODE} (its commands have 0.1)",
        sparsity=f"{OURS}; the default of the authors' code is 0.2, its commands have 0.5 to 0.99",
        kind=OURS,
        interval=f"{OURS}; the default of the authors' code is 5 epochs, its commands have 1 to 10",
        drop=CODE,
        steps="none: kind='dynamic' needs it",
    )
    .row(
        "Sparse SAM, Fisher",
        "rho=0.05, sparsity=0.5, lr=0.1",
        state=0.25,
        remark="`interval=`, or `update_mask(closure)`",
    )
    .row("Sparse SAM, dynamic", 'rho=0.05, kind="dynamic", interval=100, steps=1000, lr=0.1', state=0.25),
)
