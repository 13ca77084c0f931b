"""From lists of tensors to launches: checks, tables on the device, and the caches of the tables.

A launch runs over **chunks**, stretches of one run of at most ``Plan.chunk`` elements, one program each. It reads four
kinds of int64 tables on the device: the run table; the chunks as (run, first element, elements); for every list
argument the address of each run; and for each run the numbers that differ by run, as float64 words. All are made once
and remembered, so steps on the same tensors, with the same numbers, upload nothing. A number of all runs is an argument
of the kernel: to change it costs nothing.
"""

import ctypes
from array import array
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
import triton.language as tl
from torch import Tensor

from lets_kernels.ops.declared import ELEMENT_WISE, FISHER, SCHEMA, Op
from lets_kernels.ops.memory import capturing, is_dense
from lets_kernels.ops.triton.device import COLUMNS, INTERPRETED, add_slots

DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
#: The launch configuration of every kernel: nothing is tuned at run time, and no multiply-add is fused.
OPTIONS = {"num_stages": 1, "enable_fp_fusion": False}
MORE_WARPS = 8  # for kernels whose loops ptxas unrolls so far that with 4 warps it would spill registers
BLOCK_BYTES = 4096  # a block of each list: 32 bytes a thread, 16 with more warps
CHUNK, MANY_CHUNKS = 8192, 32768
SLOTS = 4096  # slots that are added at a time
PLANS, LISTS, NUMBERS = 64, 64, 64

T = TypeVar("T")


def recall(cache: dict[Any, T], key: Hashable, limit: int, make: Callable[[], T]) -> T:
    """The entry of a cache, made if it is missing; beyond ``limit`` entries the oldest entry is dropped."""
    found = cache.get(key)
    if found is None:
        found = cache[key] = make()
        while len(cache) > limit:
            cache.pop(next(iter(cache)), None)
    return found


class Packed(list[Tensor]):
    """A list with its addresses, and the results of the checks on them, for several ops one after the other."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__(tensors)
        self.addresses = tuple(map(Tensor.data_ptr, tensors))
        self.found: dict[Hashable, tuple[Resident, bool]] = {}


def addresses_of(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tensors.addresses if isinstance(tensors, Packed) else tuple(map(Tensor.data_ptr, tensors))


def kinds_of(tensors: Sequence[Tensor]) -> Hashable:
    """The properties of the tensors at these addresses that are checked. An address alone does not tell: freed memory
    may hold a tensor of another kind, and a view may begin where its base begins.
    """
    return tuple((t.numel(), t.dtype, t.is_contiguous() or (t.shape, t.stride())) for t in tensors)


# Tables that a captured graph reads. A graph holds addresses, not tensors, and nothing shows when it is deleted, so
# these tables are never freed, even if the caches drop them. They are small: 8 bytes a run and list.
_captured: dict[int, "Resident"] = {}


class Resident:
    """An int64 table on the device, uploaded on the stream that is current when it is made."""

    def __init__(self, rows: Tensor, device: torch.device) -> None:
        if capturing():
            raise RuntimeError(
                "these tensors, or the options of their param groups, are new to the triton backend, and nothing can "
                "be uploaded while a CUDA graph is captured: run the step once on the same tensors, with the same "
                "options, before (a warm-up), and keep the gradients where they are (set_to_none=False)"
            )
        self.table = rows
        if device.type == "cpu":
            return
        # The copy is asynchronous. Its source must live until the copy is done, so it lives as long as the table.
        self._pinned = rows.pin_memory()
        self.table = self._pinned.to(device, non_blocking=True)
        module = torch.get_device_module(device)
        stream = module.current_stream(device)
        self._uploaded = module.Event()
        self._uploaded.record(stream)
        self._ordered = {stream.stream_id}

    def wait(self, stream: torch.Stream) -> None:
        """Let a stream's further work come after the upload; the host does not wait."""
        if stream.stream_id not in self._ordered:
            stream.wait_event(self._uploaded)
            self.table.record_stream(stream)
            self._ordered.add(stream.stream_id)


def table_of(numbers: Sequence[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")  # even if torch.set_default_device says otherwise


def has_memory(t: Tensor) -> bool:
    """False for a dense tensor whose memory was given back."""
    return not t.numel() or (t.storage_offset() + t.numel()) * t.element_size() <= t.untyped_storage().nbytes()


def require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


class Plan:
    """Everything that launches need to know of one run table on one device."""

    def __init__(self, table: Tensor, device: torch.device) -> None:
        self.rows: list[list[int]] = table.tolist()
        self.device = device
        for i, (start, numel, length, count, first) in enumerate(self.rows):
            require(start >= 0 and numel >= 0 and length >= FISHER, f"run table: row {i} is not valid")
            fits = length < 1 or (count >= 1 and first >= 0 and numel % (length * count) == 0)
            require(fits, f"run table: the filters of row {i} do not divide it")
        self.starts = [row[0] for row in self.rows]
        self.numels = [row[1] for row in self.rows]
        self.end = max((start + numel for start, numel, *_ in self.rows), default=0)
        self.element_wise = any(row[2] == ELEMENT_WISE for row in self.rows)
        self.filters = max((row[4] + row[3] for row in self.rows if row[2] > 0), default=0)
        #: ``SCALED`` of the kernels: 0 for T = 1 everywhere, 1 if T may be |theta| + xi, 2 if there are filters,
        #: and 4 more if T may be that of the Fisher information.
        self.scaled = 2 if self.filters else int(self.element_wise)
        self.scaled += 4 * any(row[2] == FISHER for row in self.rows)
        self.runs = Resident(table.clone(), device)
        # Small enough to fill a device with few parameters; large enough for few partial sums with many parameters.
        self.chunk = CHUNK
        while sum(self.numels) > self.chunk * MANY_CHUNKS:
            self.chunk *= 2
        sizes = table[:, 1]
        counts = (sizes + (self.chunk - 1)) // self.chunk
        run = torch.repeat_interleave(torch.arange(len(counts), device="cpu"), counts)
        begin = (torch.arange(len(run), device="cpu") - (counts.cumsum(0) - counts)[run]) * self.chunk
        self.count = len(run)
        left = (sizes[run] - begin).clamp_max(self.chunk)
        self.chunks = Resident(torch.stack((run, begin, left), dim=1).contiguous(), device)
        self.lists: dict[Hashable, tuple[Resident, bool]] = {}
        self.numbers: dict[Hashable, Resident] = {}
        self.items: dict[Hashable, tuple[int, Resident]] = {}  # filters of each launch (norm.py)

    def addresses(self, tensors: Sequence[Tensor], dtype: torch.dtype, what: str) -> tuple[Resident, bool]:
        """The address table of one list argument, and whether all addresses are multiples of 16.

        The list is checked when its addresses are first seen together with this run table.
        """
        if isinstance(tensors, Packed) and (self, dtype) in tensors.found:
            return tensors.found[self, dtype]
        first = tensors[0]
        # The same memory may be a list of one tensor now and a flat buffer later, of another size or dtype.
        flat = len(tensors) == 1 and (len(self.rows) != 1 or first.numel() != self.numels[0])
        key: Hashable = (dtype, flat, kinds_of(tensors), addresses_of(tensors))
        found = recall(self.lists, key, LISTS, lambda: self._read(tensors, flat, dtype, what))
        if isinstance(tensors, Packed):
            tensors.found[self, dtype] = found
        return found

    def _read(self, tensors: Sequence[Tensor], flat: bool, dtype: torch.dtype, what: str) -> tuple[Resident, bool]:
        n, rows = len(tensors), len(self.rows)
        require(flat or n == rows, f"{what}: {n} tensors for {rows} rows of the run table")
        for i, t in enumerate(tensors):
            name = f"{what}[{i}]"
            require(t.device == self.device, f"{name} is on {t.device}, the rest on {self.device}")
            require(t.dtype == dtype, f"{name} is of {t.dtype}, the rest of {dtype}")
            require(is_dense(t), f"{name} has holes or overlaps in memory; pass a contiguous copy")
            fits = t.numel() >= self.end if flat else t.numel() == self.numels[i]
            require(fits, f"{name} has not the number of elements that the run table says")
        if flat:
            base, size = tensors[0].data_ptr(), tensors[0].element_size()
            addresses = [base + start * size for start in self.starts]
        else:
            addresses = [t.data_ptr() for t in tensors]
        for i, t in enumerate(tensors):
            require(has_memory(t), f"{what}[{i}] has no memory of its own")
        aligned = not any(a % 16 for a, numel in zip(addresses, self.numels, strict=True) if numel)
        return Resident(table_of(addresses), self.device), aligned


_plans: dict[Hashable, Plan] = {}


class Call:
    """One op's launches: on one run table, one dtype, and the device and stream of its tensors."""

    def __init__(self, op: Op, arguments: Sequence[Any]) -> None:
        given = dict(zip((a.name for a in op.arguments), arguments, strict=True))
        table: Tensor = given.get("table", NO_RUNS)
        is_table = table.device.type == "cpu" and table.dtype == torch.int64 and table.is_contiguous()
        require(
            is_table and table.ndim == 2 and table.shape[1] == 5,
            "the run table must be a contiguous int64 CPU tensor of shape [n, 5]",
        )
        what = next(a.name for a in op.arguments if SCHEMA[a.kind] == "Tensor[]")
        # If the first list is empty, another tensor gives the device.
        others = (given[a.name] for a in op.arguments if a.kind not in ("Table", "FilterNorms"))
        anchor = given[what][0] if given[what] else next(filter(torch.is_tensor, others), None)
        self.dtype = given[what][0].dtype if given[what] else torch.float32
        self.device = torch.device("cpu") if anchor is None else anchor.device
        require(self.dtype in DTYPES, f"{what} must be float32, float64, bfloat16 or float16")
        require(
            (self.device.type == "cpu") == INTERPRETED or anchor is None,
            "Triton's interpreter (TRITON_INTERPRET=1) runs on CPU tensors, its compiled kernels on those of a GPU; "
            f"{what} is on {self.device}",
        )
        # Found by content: a table that was written to gets another plan.
        key = ctypes.string_at(table.data_ptr(), table.nbytes), self.device
        self.plan = plan = recall(_plans, key, PLANS, lambda: Plan(table, self.device))
        self._module = torch.get_device_module(self.device)
        self.stream = None if self.device.type == "cpu" else self._module.current_stream(self.device)
        self.capturing = capturing()
        self.wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.aligned = True
        #: The numbers that may differ by run, by name: one for all runs, or one a run.
        self.numbers: dict[str, Sequence[float]] = {}
        self.stride = 0  # of the radii: 1 if each run has its own
        fits = "xi" not in given or not plan.element_wise or bool(len(given["params"]))
        require(fits, "params must be given where T = |theta| + xi")
        #: The arguments of kernels, by name: the op's arguments (lists as addresses of runs), and those of every op.
        self.given: dict[str, Any] = {
            a.name: TAKEN[a.kind](self, x, a.name) if a.kind in TAKEN else x
            for a, x in zip(op.arguments, arguments, strict=True)
        }
        block = BLOCK_BYTES // self.dtype.itemsize
        self.given["thetas"] = self.given.get("params")  # Triton itself uses the parameter name params
        self.given |= {"chunks": self.use(plan.chunks), "runs": self.use(plan.runs), "SCALED": plan.scaled}
        self.given |= {"stride": self.stride, **self.by_run()}
        self.given |= {"DTYPE": DTYPES[self.dtype], "C": DTYPES[self.wide], "ALIGNED": self.aligned}
        self.given |= {"BLOCK": block, "STAGES": block.bit_length() - 1}
        if "q" in given:
            require(given["q"] >= 1, f"q must be at least 1, not {given['q']}")
            # 1 or 2 if q is 1 or 2, which have shorter formulas.
            self.given["POWER"] = int(given["q"]) if given["q"] in (1, 2) else 0

    def __getitem__(self, name: str) -> Any:
        return self.given[name]

    def use(self, resident: Resident) -> Tensor:
        """A table, for the launches of this call."""
        if self.capturing:
            _captured[id(resident)] = resident  # the capture began with a synchronisation, after the upload
        elif self.stream is not None:
            resident.wait(self.stream)
        return resident.table

    def list(self, tensors: Sequence[Tensor], what: str) -> Tensor | None:
        """The addresses of one list argument, on the device; None if there is no run."""
        if not self.plan.rows:
            return None
        require(bool(len(tensors)), f"{what}: no tensors for {len(self.plan.rows)} rows of the run table")
        table, aligned = self.plan.addresses(tensors, self.dtype, what)
        self.aligned = self.aligned and aligned
        return self.use(table)

    def steps(self, tensors: Sequence[Tensor], what: str) -> Tensor:
        """The addresses of the step counts: one float32 scalar a run."""

        def read() -> tuple[Resident, bool]:
            for t in tensors:
                fits = t.device == self.device and t.numel() == 1 and t.dtype == torch.float32
                require(fits, f"{what} must be float32 tensors with one element on {self.device}")
            return Resident(table_of([t.data_ptr() for t in tensors]), self.device), True

        require(len(tensors) == len(self.plan.rows), f"{what} must hold one tensor a run")
        key = ("steps", kinds_of(tensors), addresses_of(tensors))
        return self.use(recall(self.plan.lists, key, LISTS, read)[0])

    def scalar(self, t: Tensor, what: str, dtype: torch.dtype = torch.float64, count: int = 1) -> Tensor:
        """A number on the device, or a few of them in one tensor."""
        fits = t.numel() == count and t.is_contiguous() and t.dtype == dtype and t.device == self.device
        elements = ("one element", "two elements")[count - 1]
        require(fits and has_memory(t), f"{what} must be a {dtype} tensor with {elements} on {self.device}")
        return t

    def per_run(self, given: float | Sequence[float], what: str) -> float:
        """The number of all runs; 0 if each run has its own, which the kernels read from a table."""
        own = given if isinstance(given, Sequence) else (given,)
        require(
            len(own) in (1, len(self.plan.rows)),
            f"{what} must be one number, or one for each row of the run table, not {len(own)}",
        )
        self.numbers[what] = own
        return own[0] if len(own) == 1 else 0.0

    def by_run(self) -> dict[str, Any]:
        """The table of the numbers that differ by run, in the op's order, and which they are, as bits."""
        columns = {i: array("d", own) for i, own in enumerate(self.numbers.values()) if len(own) > 1}
        which = sum(1 << i for i in columns)
        if not which:
            return {"numbers": None, "per_run": 0}

        def read() -> Resident:
            table = torch.zeros(len(self.plan.rows), COLUMNS, dtype=torch.float64, device="cpu")
            for i, column in columns.items():
                table[:, i] = torch.tensor(column, dtype=torch.float64, device="cpu")
            return Resident(table.view(torch.int64), self.device)

        key = which, b"".join(map(array.tobytes, columns.values()))
        return {"numbers": self.use(recall(self.plan.numbers, key, NUMBERS, read)), "per_run": which}

    def radii(self, t: Tensor, what: str) -> Tensor:
        """One number on the device, or one a run; ``stride`` is how far apart those of two runs are."""
        fits = t.numel() in (1, len(self.plan.rows)) and t.is_contiguous() and t.dtype == torch.float64
        require(
            fits and t.device == self.device and has_memory(t),
            f"{what} must be a float64 tensor with one element, or one for each row of the run table, on {self.device}",
        )
        self.stride = int(t.numel() > 1)
        return t

    def random(self, t: Tensor, what: str) -> Tensor:
        """Seed and count, on the device. Checks that no two runs share words: starts are multiples of four."""
        fits = not any(start % 4 for start in self.plan.starts)
        require(fits, "run table: a random draw needs starts in multiples of four")
        return self.scalar(t, what, torch.int64, 2)

    def norms(self, t: Tensor | None, what: str) -> Tensor | None:
        """The filter norms, if the run table has filters."""
        if not self.plan.filters:
            return None
        require(t is not None, f"{what} must be given where the run table has filters")
        assert t is not None
        fits = t.device == self.device and t.is_contiguous() and t.numel() >= self.plan.filters and t.dtype == self.wide
        require(fits and has_memory(t), f"{what} must hold one float32 (float64 for float64 parameters) a filter")
        return t

    def mask(self, t: Tensor | None, what: str) -> Tensor | None:
        """The mask, addressed by the runs' starts. Its alignment counts for the whole call."""
        if t is None:
            return None
        fits = t.device == self.device and t.is_contiguous() and t.numel() >= self.plan.end and t.dtype == torch.uint8
        require(
            fits and has_memory(t),
            f"{what} must be a flat uint8 tensor with one element for each of the bucket, on {self.device}",
        )
        self.aligned = self.aligned and t.data_ptr() % 16 == 0 and not any(start % 16 for start in self.plan.starts)
        return t

    def launch(self, kernel: Any, programs: int | None = None, num_warps: int = 4, **more: Any) -> None:
        """Run a kernel on the current stream, with ``programs`` programs, by default one for each chunk.

        The kernel gets the arguments that its parameters name, from ``more`` or from ``given``. None becomes a pointer
        that the kernel never follows.
        """
        programs = self.plan.count if programs is None else programs
        if programs == 0:
            return
        given, runs = self.given | more, self.given["runs"]
        arguments = [runs if given[name] is None else given[name] for name in kernel.arg_names]
        options = OPTIONS | {"num_warps": num_warps}
        if self.stream is not None and self._module.current_device() != self.device.index:
            with self._module.device(self.device):
                kernel[(programs,)](*arguments, **options)
        else:
            kernel[(programs,)](*arguments, **options)

    def sums(self, kernel: Any, shape: tuple[int, ...] = (), **more: Any) -> Tensor:
        """Sums in a float64 tensor of this shape: one sum for each element.

        Each sum is over all chunks, with one slot for each chunk, added in their order. The slots of one sum are
        contiguous.
        """
        count = self.plan.count
        if count == 0:
            return torch.zeros(shape, dtype=torch.float64, device=self.device)
        out = torch.empty(shape, dtype=torch.float64, device=self.device)
        slots = torch.empty(count * out.numel(), dtype=torch.float64, device=self.device)
        self.launch(kernel, slots=slots, **more)
        stages = SLOTS.bit_length() - 1
        self.launch(add_slots, out.numel(), out=out, slots=slots, count=count, N=SLOTS, STAGES=stages)
        return out


NO_RUNS = torch.empty(0, 5, dtype=torch.int64, device="cpu")  # for ops without a table
#: How an argument of each kind is checked and turned into a kernel's argument; all other kinds stay as they are.
TAKEN: dict[str, Callable[[Call, Any, str], Any]] = {
    "Tensors": Call.list,
    "MaybeTensors": lambda call, x, what: call.list(x, what) if len(x) else None,
    "Flat": lambda call, x, what: call.list([x], what),
    "Steps": Call.steps,
    "FilterNorms": Call.norms,
    "Mask": Call.mask,
    "Number": Call.scalar,
    "PerRun": Call.per_run,
    "Radii": Call.radii,
    "Numbers": lambda call, x, what: [call.scalar(t, what) for t in x],
    "Count": lambda call, x, what: call.scalar(x, what, torch.int64),
    "Coefficients": lambda call, x, what: call.scalar(x, what, count=2),
    "Random": Call.random,
}
