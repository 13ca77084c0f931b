"""Variational SAM, bSAM (Möllenhoff & Khan, ICLR 2023)."""

from types import MappingProxyType
from typing import Any

from lets_kernels.base.variational import VariationalSGD
from lets_kernels.methods.catalogue import CODE, OURS, PAPER, STARTS, Method
from lets_kernels.parts.direction import Posterior
from lets_kernels.parts.radius import RadiusLike
from lets_kernels.sam import SAM, Params


class BSAM(SAM):
    """Variational SAM: SAM as an optimal relaxation of Bayes, which learns a Gaussian over the weights.

    Möllenhoff & Khan, ICLR 2023 (bSAM). An optimizer of its own, without a base optimizer: g at a sample of N(ω,
    1/(Ns)), ĝ at ω + ρ g/s, then m ← β₁m + (1 − β₁)(ĝ + δω), s ← β₂s + (1 − β₂)(√s|g| + δ + γ) and ω ← ω − α m/s. The
    weights are the mean ω; ``opt.state[p]["precision"]`` is s. The noise is drawn again wherever it is used. Put the
    first pass into ``with opt.first_pass():``, unless ``step(closure)`` makes it. The average s includes every finite
    first gradient, also if its step is given up later.

    ``step([closures])`` cuts a batch as the authors' code does, in eight there: each closure has a sample and a
    perturbation of its own, and the step takes the means of √s|g| and of ĝ. A parameter that has no gradient in one of
    them counts there with the s that it has.

    The authors' code steps ω along the s of the step before, and updates s afterwards; Algorithm 1 in the paper does it
    the other way round, and so does this class unless ``update_first=False``.

    Args:
        params: as :class:`SAM`.
        rho: ρ, which scales g/s.
        lr: α.
        data_size: N, the number of training examples; infinity takes g at ω itself.
        beta1, beta2: β₁ and β₂.
        weight_decay: δ, the precision of the prior over N.
        damping: γ.
        precision: the s to begin with.
        update_first: False is the order of the authors' code. s then changes only if the step is taken, and a step
            needs memory for one more buffer of the parameters' size.
        kwargs: as :class:`SAM`.

    Examples:
        >>> opt = BSAM([w], rho=0.05, lr=0.1, data_size=50_000, seed=0)  # no base optimizer
        >>> loss = opt.step(closure)
        >>> opt.state[w]["precision"].shape  # one s for each weight
        torch.Size([2])
    """

    called = MappingProxyType(
        {
            "learningrate": "lr",
            "Ndata": "data_size",
            "wdecay": "weight_decay",
            "s_init": "precision",
            "custominit": "precision",
        }
    )

    def __init__(
        self,
        params: Params,
        rho: RadiusLike = 0.05,
        *,
        lr: float,
        data_size: float,
        beta1: float = 0.9,
        beta2: float = 0.999,
        weight_decay: float = 1e-4,
        damping: float = 0.1,
        precision: float = 1.0,
        update_first: bool = True,
        **kwargs: Any,
    ) -> None:
        direction = Posterior(data_size, beta2, damping, update_first)
        own: dict[str, Any] = {"lr": lr, "beta1": beta1, "weight_decay": weight_decay, "precision": precision}
        super().__init__(params, VariationalSGD, rho, direction=direction, **own, **kwargs)


METHODS = (
    Method(BSAM, "bSAM", "Möllenhoff & Khan, ICLR 2023", (Posterior,))
    .whose(
        rho=f"{OURS}; the authors' commands have 0.01 and 5e-5, the default of their code is 0.1",
        beta1=CODE,
        beta2=CODE,
        weight_decay=f"{OURS}; the authors' code has --priorprec over N: 5e-5 and 2.5e-4 in its commands",
        damping=CODE,
        precision=f"{CODE} (--custominit)",
        update_first=f"{PAPER}, Algorithm 1; the authors' code has the other order",
    )
    .row(
        "Variational SAM (bSAM)", "rho=0.05, lr=0.1, data_size=50000", state=2.0, remark=f"no base optimizer; {STARTS}"
    ),
)
