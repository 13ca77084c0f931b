"""SAM (Foret et al., ICLR 2021), whose class is the engine: lets_kernels/sam.py."""

from lets_kernels.methods.page import OURS, Method, Row
from lets_kernels.sam import SAM

METHODS = (
    Method(
        SAM,
        "SAM",
        key="sam",
        paper="Foret et al., ICLR 2021",
        parts=(),
        defaults={"rho": "that of the code in common use (davda54/sam)", "adaptive": OURS},
        rows=(
            Row("SAM", "rho=0.05, lr=0.1"),
            Row(
                "p-norm SAM",
                "rho=0.05, direction=Gradient(p=1), lr=0.1",
                remark="any p in [1, ∞]",
                paper="the same, Eq. 2",
            ),
            Row(
                "SAM, no radius to choose",
                'rho="auto", lr=0.1',
                holds=True,
                remark="goes with every method that has a first gradient",
                paper="docs/radius.md",
            ),
        ),
    ),
)
