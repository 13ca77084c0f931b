"""All methods in one table: what each costs, what it keeps, and the line that constructs it.

``python -m lets_kernels methods`` prints it, and docs/methods.md holds it. The tests construct every line, count its
gradients and measure what it keeps.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """A method, as a user meets it."""

    name: str
    source: str
    line: str  # in terms of params, SGD = torch.optim.SGD, and the names that lets_kernels exports
    gradients: str  # a step
    #: From step to step, beside the saved weights: buffers as large as float32 parameters. One byte an element is 1/4.
    state: float = 0.0
    #: Gradients of the first pass that live through the second.
    held: int = 0
    note: str = ""

    @property
    def keeps(self) -> str:
        """The state, as the table has it."""
        return {0.0: "–", 0.25: "N/4"}.get(self.state, f"{self.state:g}N")


ENTRIES = (
    Entry("SAM", "Foret et al., ICLR 2021", "SAM(params, SGD, rho=0.05, lr=0.1)", "2"),
    Entry(
        "p-norm SAM",
        "the same, Eq. 2",
        "SAM(params, SGD, rho=0.05, direction=Gradient(p=1), lr=0.1)",
        "2",
        note="any p in [1, ∞]",
    ),
    Entry(
        "SAM, no radius to choose",
        "docs/radius.md",
        'SAM(params, SGD, rho="auto", lr=0.1)',
        "2",
        held=1,
        note="goes with every method that has a first gradient",
    ),
    Entry("ASAM", "Kwon et al., ICML 2021", "ASAM(params, SGD, rho=0.5, xi=0.01, lr=0.1)", "2"),
    Entry(
        "ASAM, filter-wise",
        "LETS, Eq. 7",
        "ASAM(params, SGD, rho=0.5, filterwise=True, lr=0.1)",
        "2",
        note="transposed convolutions need `model=`",
    ),
    Entry(
        "LETS-SAM",
        "Wang et al., ECML-PKDD 2024",
        "LETSSAM(params, SGD, rho=0.05, lr=0.1)",
        "4",
        held=1,
        note="`step(closure, val_closure)`",
    ),
    Entry(
        "LETS-ASAM",
        "the same",
        "LETSASAM(params, SGD, rho=0.5, lr=0.1)",
        "4",
        held=1,
        note="`step(closure, val_closure)`",
    ),
    Entry("RST / SS-SAM", "Zhao et al., 2022", "RST(params, SGD, rho=0.05, p=0.5, lr=0.1)", "1 + p"),
    Entry("LookSAM", "Liu et al., CVPR 2022", "LookSAM(params, SGD, rho=0.05, k=5, lr=0.1)", "1 + 1/k", 1.0, 1),
    Entry(
        "AE-SAM",
        "Jiang et al., ICLR 2023",
        "AESAM(params, SGD, rho=0.05, steps=1000, lr=0.1)",
        "1 to 2",
        note="waits once a step for ‖g‖²",
    ),
    Entry(
        "AE-LookSAM",
        "the same",
        "AELookSAM(params, SGD, rho=0.05, steps=1000, lr=0.1)",
        "1 to 2",
        1.0,
        1,
        note="waits once a step for ‖g‖²",
    ),
    Entry(
        "R-SAM",
        "Liu et al., NeurIPS 2022",
        "RSAM(params, SGD, rho=0.05, gamma=1e-4, lr=0.1)",
        "2",
        note="two-step shape: first pass in `first_pass()`",
    ),
    Entry("Fisher SAM", "Kim et al., ICML 2022", "FisherSAM(params, SGD, rho=0.05, eta=1.0, lr=0.1)", "2"),
    Entry(
        "Sparse SAM, Fisher",
        "Mi et al., NeurIPS 2022",
        "SparseSAM(params, SGD, rho=0.05, sparsity=0.5, lr=0.1)",
        "2",
        0.25,
        note="`interval=`, or `update_mask(closure)`",
    ),
    Entry(
        "Sparse SAM, dynamic",
        "the same",
        'SparseSAM(params, SGD, rho=0.05, kind="dynamic", interval=100, steps=1000, lr=0.1)',
        "2",
        0.25,
    ),
    Entry("Friendly SAM", "Li et al., CVPR 2024", "FriendlySAM(params, SGD, rho=0.05, sigma=1.0, lr=0.1)", "2", 1.0),
    Entry("VaSSO", "Li & Giannakis, NeurIPS 2023", "VaSSO(params, SGD, rho=0.05, theta=0.9, lr=0.1)", "2", 1.0),
    Entry(
        "ESAM",
        "Du et al., ICLR 2022",
        "ESAM(params, SGD, rho=0.05, beta=0.5, gamma=0.5, lr=0.1)",
        "1 + γ, and a forward pass",
        note="closure returns the loss of each sample",
    ),
    Entry(
        "δ-SAM",
        "Zhou et al., 2021",
        "DeltaSAM(params, SGD, rho=0.05, lr=0.1)",
        "2",
        note="closure returns (losses, outputs)",
    ),
    Entry("Random SAM", "Ujváry et al., 2022", "RandomSAM(params, SGD, rho=0.05, lr=0.1)", "1"),
    Entry(
        "Variational SAM (bSAM)",
        "Möllenhoff & Khan, ICLR 2023",
        "BSAM(params, rho=0.05, lr=0.1, data_size=50000)",
        "2",
        2.0,
        note="no base optimizer; two-step shape: first pass in `first_pass()`",
    ),
    Entry("GSAM", "Zhuang et al., ICLR 2022", "GSAM(params, SGD, rho=0.05, alpha=0.4, lr=0.1)", "2", held=1),
    Entry(
        "GSAM, ρ by learning rate",
        "the same",
        "GSAM(params, SGD, rho=LearningRateRadius(rho_max=0.05, rho_min=0.01), lr=0.1)",
        "2",
        held=1,
    ),
    Entry(
        "R-GSAM",
        "Liu et al., NeurIPS 2022",
        "RGSAM(params, SGD, rho=0.05, alpha=0.4, gamma=1e-4, lr=0.1)",
        "2",
        held=1,
        note="two-step shape: first pass in `first_pass()`",
    ),
    Entry(
        "Gradient-norm penalty",
        "Zhao et al., ICML 2022",
        "GradientNormPenalty(params, SGD, rho=0.05, alpha=0.8, lr=0.1)",
        "2",
        held=1,
    ),
)


def table() -> str:
    """The table in Markdown."""
    lines = [
        "| method | paper | construct | gradients a step | keeps | holds | remark |",
        "|---|---|---|---|---|---|---|",
    ]
    for e in ENTRIES:
        held = "g" if e.held else "–"
        lines.append(f"| {e.name} | {e.source} | `{e.line}` | {e.gradients} | {e.keeps} | {held} | {e.note or '–'} |")
    return "\n".join(lines)
