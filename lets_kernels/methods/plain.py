"""SAM (Foret et al., ICLR 2021); its class is in lets_kernels/sam.py."""

from lets_kernels.methods.catalogue import OURS, Method
from lets_kernels.sam import SAM

METHODS = (
    Method(SAM, "SAM", "Foret et al., ICLR 2021", ())
    .whose(rho="that of the code in common use (davda54/sam)", adaptive=OURS)
    .row("SAM", "rho=0.05, lr=0.1")
    .row("p-norm SAM", "rho=0.05, direction=Gradient(p=1), lr=0.1", remark="any p in [1, ∞]", paper="the same, Eq. 2")
    .row(
        "SAM, no radius to choose",
        'rho="auto", lr=0.1',
        holds=True,
        remark="goes with every method that has a first gradient",
        paper="docs/radius.md",
    ),
)
