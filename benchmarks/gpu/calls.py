"""The ops as a step calls them: their tensors, for one parameter set and dtype, and one call of each."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.timing import Device
from lets_kernels.bench.shapes import Shape
from lets_kernels.ops import reference
from lets_kernels.ops.declared import FISHER
from lets_kernels.parts.direction import Adaptive, Direction, Gradient
from lets_kernels.space.buckets import Bucket, Member

XI, LR, MOMENTUM, DECAY, BETAS, EPS = 0.01, 1e-3, 0.9, 1e-4, (0.9, 0.999), 1e-8
DIRECTIONS: dict[str, Callable[[], Direction]] = {
    "plain": Gradient,
    "element": lambda: Adaptive(XI),
    "filter": lambda: Adaptive(XI, filterwise=True),
    "fisher": Gradient,  # with another T
}
CASES = [
    ("grad_norm", "plain"),
    ("perturb_", "plain"),
    ("restore_sgd_", "plain"),
    ("restore_adamw_", "plain"),
    ("rho_grad_diagonal", "plain"),
    ("rho_grad_secant", "plain"),
    ("restore_", "plain"),
    ("grad_norm", "element"),
    ("perturb_", "element"),
    ("rho_grad_diagonal", "element"),
    ("filter_norms", "filter"),
    ("grad_norm", "filter"),
    ("perturb_", "filter"),
    ("all_finite_", "plain"),
]
# What not every method needs.
VECTOR_CASES = [
    ("combine_", "plain"),
    ("dots", "plain"),
    ("displacement_dots", "plain"),
    ("average_", "plain"),
    ("noise_", "plain"),
    ("noise_", "filter"),
    ("masked_", "plain"),
    ("count_above", "plain"),
    ("select_", "plain"),
    ("posterior_ascent_", "plain"),
    ("restore_bsam_", "plain"),
    ("restore_lion_", "plain"),
    ("largest", "plain"),
    ("peaks_", "plain"),
    ("grad_norm", "fisher"),
    ("perturb_", "fisher"),
    ("rho_grad_diagonal", "fisher"),
]
WRITES = {
    "filter_norms": ("norms",),
    "perturb_": ("params", "saved"),
    "restore_": ("params",),
    "restore_sgd_": ("params", "m"),
    "restore_adamw_": ("params", "m", "v", "steps"),
    "all_finite_": ("skipped",),
    "combine_": ("out",),
    "average_": ("m", "out", "updates"),
    "noise_": ("out",),
    "masked_": ("out",),
    "select_": ("mask",),
    "posterior_ascent_": ("out", "s"),
    "restore_bsam_": ("params", "m"),
    "restore_lion_": ("params", "m"),
    "peaks_": ("out",),
}
FLAT = ("saved", "out", "mask")


class Tensors:
    """One set of buffers; each is made when first asked for. `double` gives the same values in float64 on the CPU."""

    def __init__(self, shapes: Sequence[Shape], dtype: torch.dtype, device: Device) -> None:
        self.shapes, self.dtype, self.device = list(shapes), dtype, device
        self.dirty = torch.ones((), dtype=torch.int64, device=device.device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device.device)
        self.updates = torch.ones((), dtype=torch.int64, device=device.device)

    def _normal(self, sd: float) -> list[Tensor]:
        return [self.device.normal(s, sd, self.dtype) for s in self.shapes]

    @functools.cached_property
    def params(self) -> list[Tensor]:
        return self._normal(0.02)

    @functools.cached_property
    def g(self) -> list[Tensor]:
        return self._normal(0.01)

    @functools.cached_property
    def saved(self) -> Tensor:
        size = self.space("plain").size
        return self.device.normal((size,), 0.02, self.dtype)

    @functools.cached_property
    def m(self) -> list[Tensor]:
        return self._normal(0.01)

    @functools.cached_property
    def v(self) -> list[Tensor]:
        return [x.square_() for x in self._normal(0.01)]

    @functools.cached_property
    def s(self) -> list[Tensor]:
        return [x.square_().add_(0.1) for x in self._normal(0.3)]

    @functools.cached_property
    def out(self) -> Tensor:
        return torch.zeros(self.space("plain").size, dtype=self.dtype, device=self.device.device)

    @functools.cached_property
    def mask(self) -> Tensor:
        return (torch.arange(self.space("plain").size, device=self.device.device) % 3 > 0).to(torch.uint8)

    @functools.cached_property
    def random(self) -> Tensor:
        return torch.tensor([1, 2], device=self.device.device)

    @functools.cached_property
    def threshold(self) -> Tensor:
        """The key of about the median of |g|: 0.0067 as float32, in the upper half."""
        return torch.tensor(0x3BDB8BAC << 32, device=self.device.device)

    @functools.cached_property
    def peak(self) -> Tensor:
        """A value that some of |g| have, more in bfloat16 than in float32."""
        return self.g[0].flatten()[0].double().abs()

    @functools.cached_property
    def coefficients(self) -> Tensor:
        return torch.tensor([1.0, -0.5], dtype=torch.float64, device=self.device.device)

    @functools.cached_property
    def steps(self) -> list[Tensor]:
        return [torch.full((), 10.0, device=self.device.device) for _ in self.shapes]

    # The gradients around a step are correlated, so that neither radius gradient is a sum of noise.
    @functools.cached_property
    def train(self) -> list[Tensor]:
        return self._normal(0.01)

    @functools.cached_property
    def val(self) -> list[Tensor]:
        return [x.add_(t).add_(g) for x, t, g in zip(self._normal(0.005), self.train, self.g, strict=True)]

    @functools.cached_property
    def perturbed(self) -> list[Tensor]:
        return [x.add_(g, alpha=1.5) for x, g in zip(self._normal(0.002), self.g, strict=True)]

    @functools.cached_property
    def norms(self) -> Tensor:
        """ASAM's norms of the filters, as the reference computes them."""
        bucket = self.space("filter")
        assert bucket.filter_norms is not None
        reference.filter_norms(self.params, table_of(bucket), bucket.filter_norms)
        return bucket.filter_norms

    @functools.cached_property
    def total(self) -> Tensor:
        return torch.full((), 1e-4 * sum(map(math.prod, self.shapes)), dtype=torch.float64, device=self.device.device)

    @functools.cached_property
    def rho(self) -> Tensor:
        return torch.full((), 0.05, dtype=torch.float64, device=self.device.device)

    @functools.cached_property
    def gate(self) -> Tensor:
        return torch.ones((), dtype=torch.float64, device=self.device.device)

    def space(self, direction: str) -> Bucket:
        """The index space over these parameters, with its table."""
        if direction not in self._spaces:
            members = [Member(p, None, 0, place) for place, p in enumerate(self.params)]
            geometry = DIRECTIONS[direction]().geometry
            options = {"adaptive": True, "xi": XI}
            self._spaces[direction] = Bucket(members, 0, [options], geometry, "reference", False)
        return self._spaces[direction]

    @functools.cached_property
    def _spaces(self) -> dict[str, Bucket]:
        return {}

    def double(self, direction: str) -> "Tensors":
        """The same values in float64 on the CPU."""
        twin = Tensors(self.shapes, torch.float64, Device("cpu"))
        for name in ("params", "g", "saved", "m", "v", "s", "val", "train", "perturbed"):
            value = getattr(self, name)
            exact = value.cpu().double() if isinstance(value, Tensor) else [x.cpu().double() for x in value]
            setattr(twin, name, exact)
        twin.steps = [x.cpu().clone() for x in self.steps]
        if direction == "filter":
            twin.norms = self.norms.cpu().double()
        return twin


def table_of(bucket: Bucket, direction: str = "plain") -> Tensor:
    table = bucket.table(tuple(range(len(bucket.params))))
    if direction == "fisher":
        table = table.clone()
        table[:, 2] = FISHER
    return table


def call(op: str, direction: str, module: Any, t: Tensors) -> Callable[[], Any]:
    """The op on these tensors through one backend, its arguments looked up once."""
    bucket = t.space(direction)
    table, weights = table_of(bucket, direction), t.params if bucket.element_wise else []
    norms = t.norms if direction == "filter" else None
    function = getattr(module, op)
    arguments: dict[str, Callable[[], tuple[Any, ...]]] = {
        "grad_norm": lambda: (t.g, weights, table, norms, XI, 2.0),
        "filter_norms": lambda: (t.params, table, norms),
        "perturb_": lambda: (t.params, t.g, t.saved, t.dirty, table, norms, XI, 2.0, t.total, t.rho),
        "restore_": lambda: (t.params, t.saved, t.dirty, table),
        "restore_sgd_": lambda: (
            *(t.params, t.g, t.m, t.saved, t.dirty, table, t.gate),
            *(LR, MOMENTUM, DECAY, False, False),
        ),
        "restore_adamw_": lambda: (
            *(t.params, t.g, t.m, t.v, t.steps, t.saved, t.dirty, table, t.gate),
            *(LR, *BETAS, EPS, DECAY, True, False),
        ),
        "rho_grad_diagonal": lambda: (t.val, t.train, t.perturbed, t.g, weights, table, norms, XI, 2.0),
        "rho_grad_secant": lambda: (t.val, t.train, t.perturbed, t.g, table),
        "all_finite_": lambda: ([t.total, t.rho], t.skipped),
        "dots": lambda: (t.m, t.g, table),
        "displacement_dots": lambda: (t.g, t.params, t.saved, table),
        "combine_": lambda: ([t.out], t.m, t.g, table, t.coefficients, t.gate),
        "average_": lambda: (t.m, t.g, [t.out], t.updates, table, t.gate, 0.9, 0.5, 0.5),
        "posterior_ascent_": lambda: ([t.out], t.s, t.g, table, t.gate, 0.999, 0.1),
        "restore_bsam_": lambda: (t.params, t.g, t.m, t.s, t.saved, t.dirty, table, t.gate, LR, MOMENTUM, DECAY),
        # With a half the sign of the mean is exact in every dtype; with 0.9 rounding turns that of a mean near zero.
        "restore_lion_": lambda: (t.params, t.g, t.m, t.saved, t.dirty, table, t.gate, LR, 0.5, BETAS[1], DECAY),
        "noise_": lambda: ([t.out], t.g, [], table, norms, t.random, 0, 1.0, 0.01),
        "masked_": lambda: ([t.out], t.g, t.mask, table, t.random, 0, 1.0),
        "count_above": lambda: (t.g, t.mask, table, t.threshold, t.random, 0, 1),
        "select_": lambda: (t.mask, t.g, table, t.threshold, t.random, 0, -1, 0),
        "largest": lambda: (t.g, table),
        "peaks_": lambda: ([t.out], t.g, table, t.peak),
    }
    given = arguments[op]()
    return lambda: function(*given)


def results(op: str, t: Tensors, returned: Any) -> list[Tensor]:
    """What the op returned or wrote, one vector a list: an element alone may be what is left of two that cancel, and
    is measured by the rms of all."""
    found = [returned.reshape(-1)] if isinstance(returned, Tensor) else []
    for name in WRITES.get(op, ()):
        value = getattr(t, name)
        if name in FLAT:  # the padding between the runs belongs to nobody
            value = [value[start : start + numel] for start, numel, *_ in table_of(t.space("plain")).tolist()]
        found.append(torch.cat([x.reshape(-1) for x in ([value] if isinstance(value, Tensor) else value)]))
    return [x.detach() for x in found]


def touch(op: str, direction: str, t: Tensors) -> None:
    """Make every buffer that the op works on."""
    call(op, direction, reference, t)
