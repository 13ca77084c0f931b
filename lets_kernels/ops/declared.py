"""Every op, declared once: its arguments, which of them it writes, its result, its formula, and its memory traffic.

The methods of :class:`Backend` are the declaration. These follow from it: the schemas and the registration of every
backend, the structs with the arguments of C++ kernels (``csrc/generate.py``), the fake kernels, the byte floors of the
benchmarks, docs/ops.md, and the lists that tests use. :mod:`lets_kernels.ops` says what a bucket, a run, the table, a
gate and ``dirty`` are; each backend's formulas are documented in :mod:`lets_kernels.ops.reference`.

The build reads this file by its path, without torch, so annotations stay text.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, NamedTuple, Protocol, TypeVar

#: ``filter_length`` of a run without filters: T of the Fisher information, T = 1, and T = |θ| + ξ.
FISHER, UNSCALED, ELEMENT_WISE = -2, -1, 0

F = TypeVar("F", bound=Callable[..., object])

if TYPE_CHECKING:
    from torch import Tensor

    A = TypeVar("A")
    Written = Annotated[A, "the op writes it"]

    # The kinds of arguments. Lists of tensors hold one dense tensor a run, or one flat buffer.
    Tensors = Sequence[Tensor]
    MaybeTensors = Sequence[Tensor]  # may be empty
    Flat = Tensor  # one flat buffer of the bucket
    Table = Tensor
    FilterNorms = Tensor  # one norm a filter, which gives T its value
    Mask = Tensor  # one byte for each element of the bucket
    Number = Tensor  # 0-d float64, on the device
    Radii = Tensor  # float64, on the device: 0-d, or one number a run
    PerRun = float | Sequence[float]  # one number, or one a run
    Count = Tensor  # 0-d int64, on the device
    Coefficients = Tensor  # two float64, on the device
    Random = Tensor  # two int64, on the device: the seed, and the count of random steps
    Stream = int  # which of the optimizer's streams of random numbers
    Steps = Sequence[Tensor]  # one float32 count a run
    Numbers = Sequence[Tensor]  # any number of Number
    # The kinds of results: Number, and three of them in a vector.
    Three = Tensor


def op(reads: str = "", element_wise: str = "", filter_wise: str = "") -> Callable[[F], F]:
    """Declare an op and the arguments that it must read: for all runs, or only for runs with one kind of T.

    It must write the ``Written`` arguments that have the size of a parameter.
    """

    def declare(method: F) -> F:
        method.__dict__["moved"] = reads.split(), element_wise.split(), filter_wise.split()
        return method

    return declare


class Backend(Protocol):
    """A backend is a module with these functions."""

    def pack(self, tensors: list[Tensor], anchor: Tensor, addresses: object = None) -> list[Tensor]:
        """The list in the form of the cheapest argument; ``anchor`` is any int64 scalar on the tensors' device.

        ``addresses``: what a layout (lets_kernels.ops.layouts) has just said of these tensors, if one was asked.
        """

    @op(reads="vectors", element_wise="params")
    def grad_norm(
        self, vectors: Tensors, params: MaybeTensors, table: Table, filter_norms: FilterNorms | None, xi: PerRun,
        q: float,
    ) -> Number:  # fmt: skip
        """Σ |Tv|^q"""

    @op(filter_wise="params")
    def filter_norms(self, params: Tensors, table: Table, out: Written[FilterNorms]) -> None:
        """out <- ‖θ‖ of every filter"""

    @op(reads="params vectors")
    def perturb_(
        self, params: Written[Tensors], vectors: MaybeTensors, saved: Written[Flat], dirty: Written[Count],
        table: Table, filter_norms: FilterNorms | None, xi: PerRun, q: float, total: Number, rho: Radii,
    ) -> None:  # fmt: skip
        """saved <- θ, then θ <- θ + ρ T sign(Tv)|Tv|^(q-1) / total^(1/p)"""

    @op(reads="saved")
    def restore_(self, params: Written[Tensors], saved: Flat, dirty: Written[Count], table: Table) -> None:
        """θ <- saved, if θ is perturbed"""

    @op(reads="saved grads momenta")
    def restore_sgd_(
        self, params: Written[Tensors], grads: Tensors, momenta: Written[MaybeTensors], saved: Flat,
        dirty: Written[Count], table: Table, gate: Number, lr: PerRun, momentum: PerRun, weight_decay: PerRun,
        nesterov: bool, maximize: bool,
    ) -> None:  # fmt: skip
        """A step of SGD from the weights before they were perturbed"""

    @op(reads="saved grads exp_avgs exp_avg_sqs")
    def restore_adamw_(
        self, params: Written[Tensors], grads: Tensors, exp_avgs: Written[Tensors], exp_avg_sqs: Written[Tensors],
        steps: Written[Steps], saved: Flat, dirty: Written[Count], table: Table, gate: Number, lr: PerRun,
        beta1: PerRun, beta2: PerRun, eps: PerRun, weight_decay: PerRun, decoupled: bool, maximize: bool,
    ) -> None:  # fmt: skip
        """A step of Adam or AdamW from the weights before they were perturbed"""

    @op(reads="saved grads exp_avgs")
    def restore_lion_(
        self, params: Written[Tensors], grads: Tensors, exp_avgs: Written[Tensors], saved: Flat, dirty: Written[Count],
        table: Table, gate: Number, lr: PerRun, beta1: PerRun, beta2: PerRun, weight_decay: PerRun,
    ) -> None:  # fmt: skip
        """A step of Lion from the weights before they were perturbed"""

    @op(reads="saved grads exp_avgs precisions")
    def restore_bsam_(
        self, params: Written[Tensors], grads: Tensors, exp_avgs: Written[Tensors], precisions: Tensors, saved: Flat,
        dirty: Written[Count], table: Table, gate: Number, lr: PerRun, beta1: PerRun, weight_decay: PerRun,
    ) -> None:  # fmt: skip
        """A step of Variational SAM from the weights before they were perturbed"""

    @op(reads="val train perturbed vectors", element_wise="params")
    def rho_grad_diagonal(
        self, val: Tensors, train: MaybeTensors, perturbed: Tensors, vectors: Tensors, params: MaybeTensors,
        table: Table, filter_norms: FilterNorms | None, xi: PerRun, q: float,
    ) -> Number:  # fmt: skip
        """(val - train)ᵀ ĝ² T sign(Tv)|Tv|^(q-1)"""

    @op(reads="val train perturbed first")
    def rho_grad_secant(
        self, val: Tensors, train: MaybeTensors, perturbed: Tensors, first: Tensors, table: Table
    ) -> Number:
        """(val - train)ᵀ (ĝ - g)"""

    @op()
    def all_finite_(self, values: Numbers, skipped: Written[Count]) -> Number:
        """1 if all values are finite; else 0, and skipped counts one more"""

    @op(reads="x y")
    def dots(self, x: Tensors, y: Tensors, table: Table) -> Three:
        """x·x, x·y, y·y"""

    @op(reads="grads params saved")
    def displacement_dots(self, grads: Tensors, params: Tensors, saved: Flat, table: Table) -> Three:
        """g·g, g·Δ, Δ·Δ with Δ = θ - saved"""

    @op(reads="x y")
    def combine_(
        self, out: Written[Tensors], x: Tensors, y: Tensors, table: Table, coefficients: Coefficients, gate: Number
    ) -> None:
        """out <- a x + b y, if the gate is open"""

    @op(reads="averages vectors")
    def average_(
        self, averages: Written[Tensors], vectors: Tensors, out: Written[MaybeTensors], updates: Written[Count],
        table: Table, gate: Number, decay: float, a: float, b: float,
    ) -> Number:  # fmt: skip
        """m <- decay m + (1 - decay) x, then out <- a x + b m; Σ out²"""

    @op(reads="precisions grads")
    def posterior_ascent_(
        self, out: Written[Tensors], precisions: Written[Tensors], grads: Tensors, table: Table, gate: Number,
        beta2: float, damping: PerRun,
    ) -> None:  # fmt: skip
        """out <- g/s, then s <- beta2 s + (1 - beta2)(√s |g| + damping)"""

    @op(reads="vectors")
    def noise_(
        self, out: Written[Tensors], vectors: MaybeTensors, precisions: MaybeTensors, table: Table,
        filter_norms: FilterNorms | None, random: Random, stream: Stream, a: float, std: float,
    ) -> Number:  # fmt: skip
        """out <- a v + std S n with n standard normal; Σ out²"""

    @op(reads="vectors mask")
    def masked_(
        self, out: Written[Tensors], vectors: Tensors, mask: Mask | None, table: Table, random: Random, stream: Stream,
        share: float,
    ) -> Number:  # fmt: skip
        """out <- v where the mask is set or drawn, else 0; Σ v²"""

    @op(reads="vectors mask")
    def count_above(
        self, vectors: MaybeTensors, mask: Mask, table: Table, threshold: Count, random: Random, stream: Stream,
        member: int,
    ) -> Number:  # fmt: skip
        """How many elements, of those whose mask is `member`, have keys above the threshold"""

    @op(reads="vectors mask")
    def select_(
        self, mask: Written[Mask], vectors: MaybeTensors, table: Table, threshold: Count, random: Random,
        stream: Stream, member: int, value: int,
    ) -> None:  # fmt: skip
        """mask <- value for the elements that count_above counts"""

    @op(reads="vectors")
    def largest(self, vectors: Tensors, table: Table) -> Number:
        """max |v|"""

    @op(reads="vectors")
    def peaks_(self, out: Written[Tensors], vectors: Tensors, table: Table, largest: Number) -> Number:
        """out <- sign(v) where |v| is the largest, else 0; how many there are"""


#: How a schema writes an argument of each kind.
SCHEMA = {
    **dict.fromkeys(("Tensors", "MaybeTensors", "Steps", "Numbers"), "Tensor[]"),
    **dict.fromkeys(("Flat", "Table", "FilterNorms", "Mask", "Number", "Count", "Coefficients", "Random"), "Tensor"),
    "Radii": "Tensor",
    "PerRun": "float[1]",  # a float stands for a list of it
    "Stream": "int",
    **{name: name for name in ("float", "int", "bool")},
}
#: The shape of each kind of result; an op without such a result returns nothing.
SHAPES: dict[str, tuple[int, ...]] = {"Number": (), "Three": (3,)}


class Argument(NamedTuple):
    """One argument: its kind, whether the op writes it, and whether it may be None."""

    name: str
    kind: str
    written: bool
    optional: bool


class Op(NamedTuple):
    """One op, as :class:`Backend` declares it."""

    name: str
    doc: str
    arguments: tuple[Argument, ...]
    result: str
    reads: tuple[str, ...]
    element_wise: tuple[str, ...]
    filter_wise: tuple[str, ...]

    @property
    def written(self) -> tuple[str, ...]:
        return tuple(a.name for a in self.arguments if a.written)

    @property
    def moved(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The parameter-sized lists that the op must read and write, and the masks (one byte an element)."""
        kinds = {a.name: a.kind for a in self.arguments}
        moved = (*self.reads, *(a for a in self.written if kinds[a] in ("Tensors", "MaybeTensors", "Flat", "Mask")))
        masks = tuple(name for name in moved if kinds[name] == "Mask")
        return tuple(name for name in moved if name not in masks), masks

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape of the float64 tensor that the op returns; None if it returns nothing."""
        return SHAPES.get(self.result)

    @property
    def schema(self) -> str:
        """The schema, in the form of ``torch.library``."""
        marks = iter("abcdefgh")

        def typed(a: Argument) -> str:
            kind = SCHEMA[a.kind].replace("Tensor", f"Tensor({next(marks)}!)") if a.written else SCHEMA[a.kind]
            return f"{kind}{'?' * a.optional} {a.name}"

        result = "()" if self.shape is None else "Tensor"
        return f"{self.name}({', '.join(map(typed, self.arguments))}) -> {result}"


def _argument(parameter: inspect.Parameter) -> Argument:
    text = str(parameter.annotation)
    match = re.fullmatch(r"(Written\[)?(\w+)\]?( \| None)?", text)
    if match is None or match[2] not in SCHEMA:
        raise TypeError(f"{parameter.name}: {text} is no kind of argument")
    return Argument(parameter.name, match[2], bool(match[1]), bool(match[3]))


def _declared(name: str, method: Callable[..., object]) -> Op:
    signature = inspect.signature(method)
    arguments = tuple(map(_argument, list(signature.parameters.values())[1:]))
    moved = [tuple(names) for names in method.__dict__["moved"]]
    return Op(name, inspect.getdoc(method) or "", arguments, str(signature.return_annotation), *moved)


OPS: tuple[Op, ...] = tuple(_declared(n, f) for n, f in vars(Backend).items() if hasattr(f, "moved"))


def table() -> str:
    """All ops in Markdown, for docs/ops.md."""

    def listed(names: Sequence[str], where: str = "") -> str:
        return "".join(f", {name}{where}" for name in names)

    lines = ["| op | computes | reads | writes |", "|---|---|---|---|"]
    for op in OPS:
        reads = listed(op.reads) + listed(op.element_wise, " (element-wise T)") + listed(op.filter_wise, " (filters)")
        doc = op.doc.replace("|", "\\|")
        lines.append(f"| `{op.name}` | {doc} | {reads[2:] or '–'} | {', '.join(op.written) or '–'} |")
    return "\n".join(lines)
