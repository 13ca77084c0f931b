"""What the foreach ops share: lists of tensors that go together, and pieces of them that stay in a core's cache."""

import operator
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lets_kernels.ops.reference.shared import PerRun, Tensors, per_run

#: Kinds of runs beside those that ``filter_length`` says have no filters: with filters, and all.
FILTERS, ALL = 1, 2
#: Elements of one piece for each thread: 256 KiB of float32, which several passes over it find in a core's cache.
PIECE = 1 << 16
#: Ways to part one table that are remembered.
_SPLITS = 8

_dtype = operator.attrgetter("dtype")


class Plan(NamedTuple):
    """What a run table says, on the host."""

    version: int
    rows: list[list[int]]
    #: Start and number of elements of every run.
    stretches: list[tuple[int, int]]
    #: The places of the runs, by their T: FILTERS, or one of the three other values of ``filter_length``.
    kinds: dict[int, list[int]]
    #: Places of runs that share a batch, and runs of more than one piece, each alone; by T and the size of a piece.
    batches: dict[tuple[int, int], list[list[int]]]
    #: Places of runs that have the same numbers, and the table of these runs, by the numbers of all runs.
    alike: dict[tuple[tuple[float, ...], ...], list[tuple[list[int], Tensor]]]


# Both forget an entry together with its key: the tables and the flat buffers belong to the buckets.
_plans: WeakIdKeyDictionary = WeakIdKeyDictionary()
_views: WeakIdKeyDictionary = WeakIdKeyDictionary()


def on_host(*numbers: Tensor) -> bool:
    """True if these can be read without waiting: they lie on the CPU, are not fake, and nothing traces them."""
    own = Tensor.__torch_dispatch__  # what a class that is no plain memory has replaced
    plain = all(x.is_cpu and type(x).__torch_dispatch__ is own for x in numbers)
    return plain and not torch.compiler.is_compiling()


def plan_of(table: Tensor) -> Plan:
    """The plan of a run table, made once for every table."""
    if table.is_inference():  # it has no version
        return _read(table, 0)
    plan: Plan | None = _plans.get(table)
    if plan is None or plan.version != table._version:
        _plans[table] = plan = _read(table, table._version)
    return plan


def _read(table: Tensor, version: int) -> Plan:
    rows = table.tolist()
    kinds: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        kinds.setdefault(min(row[2], FILTERS), []).append(place)
    return Plan(version, rows, [(row[0], row[1]) for row in rows], kinds, {}, {})


def differ(*numbers: PerRun) -> bool:
    """True if runs may have numbers of their own."""
    return any(isinstance(x, Sequence) and len(x) != 1 for x in numbers)


def one(number: PerRun) -> float:
    """The number of all runs, where they do not differ."""
    return number[0] if isinstance(number, Sequence) else number


class Part(NamedTuple):
    """Runs of a table that have the same numbers."""

    plan: Plan
    places: list[int]
    table: Tensor
    numbers: tuple[float, ...]

    def of(self, tensors: Tensors) -> Tensors:
        """The tensors of these runs, out of those of all runs; a flat buffer, or nothing, stays what it is."""
        return tensors if not len(tensors) or is_flat(tensors, self.plan) else [tensors[i] for i in self.places]


def alike(table: Tensor, *numbers: PerRun) -> list[Part]:
    """The runs of a table in parts, of which each has one value of every number: for functions that take only one."""
    plan = plan_of(table)
    key = tuple(tuple(per_run(x, table)) for x in numbers)
    if key not in plan.alike:
        if len(plan.alike) >= _SPLITS:  # a schedule changes numbers from step to step
            plan.alike.clear()
        found: dict[tuple[float, ...], list[int]] = {}
        for place, own in enumerate(zip(*key, strict=True)):
            found.setdefault(own, []).append(place)
        plan.alike[key] = [(places, table[places]) for places in found.values()]
    return [Part(plan, places, rows, tuple(x[places[0]] for x in key)) for places, rows in plan.alike[key]]


def is_flat(tensors: Tensors, plan: Plan) -> bool:
    """True for one buffer of several runs, or of one that does not fill it."""
    return len(tensors) == 1 and (len(plan.rows) != 1 or tensors[0].numel() != plan.rows[0][1])


def fits(plan: Plan, dtype: torch.dtype, *arguments: Tensors) -> bool:
    """True if there are runs, and every argument has a tensor a run, or one buffer, of this dtype, as its first is."""
    rows = len(plan.rows)
    return rows > 0 and all((len(x) == rows or is_flat(x, plan)) and x[0].dtype is dtype for x in arguments)


def lists(plan: Plan, *arguments: Tensors) -> list[list[Tensor]]:
    """Each argument with one tensor a run; the tensors of a run have one shape and one memory order in all of them."""
    given = [x for x in arguments if not is_flat(x, plan)]
    sizes = strides = None
    if given:
        # Dense tensors of a run that agree in strides differ at most in where their sizes of 1 stand.
        found = [list(map(Tensor.stride, x)) for x in given]
        if found.count(found[0]) == len(found):
            sizes, strides = list(map(Tensor.size, given[0])), found[0]

    def listed(x: Tensors) -> list[Tensor]:
        if is_flat(x, plan):
            return _parts(x[0], plan, sizes, strides)
        return list(x) if strides is not None else list(map(line, x))

    return [listed(x) for x in arguments]


def line(t: Tensor) -> Tensor:
    """The elements in memory order."""
    return t.as_strided((t.numel(),), (1,))


def joined(tensors: list[Tensor]) -> Tensor:
    """The elements of all tensors, each in memory order, in float64; of one float64 tensor they are its own memory."""
    if not all(map(Tensor.is_contiguous, tensors)):
        tensors = [x if x.is_contiguous() else line(x) for x in tensors]
    return torch._utils._flatten_dense_tensors(tensors).double()


def _parts(
    flat: Tensor, plan: Plan, sizes: list[torch.Size] | None, strides: list[tuple[int, ...]] | None
) -> list[Tensor]:
    """The runs' stretches of a flat buffer; kept as long as the buffer lives, for the next call with the same runs."""
    key = (flat.data_ptr(), flat.dtype, plan.stretches, sizes, strides)
    found: tuple[object, list[Tensor]] | None = _views.get(flat)
    if found is None or found[0] != key:
        home, offset = flat.detach(), flat.storage_offset()  # detached, or its views would keep the key alive
        if sizes is None or strides is None:
            parts = [home.as_strided((numel,), (1,), offset + start) for start, numel in plan.stretches]
        else:
            shapes = zip(sizes, strides, plan.stretches, strict=True)
            parts = [home.as_strided(size, stride, offset + start) for size, stride, (start, _) in shapes]
        _views[flat] = found = key, parts
    return found[1]


def piece_size() -> int:
    """The elements of one piece for all threads."""
    return PIECE * torch.get_num_threads()


def pieces(plan: Plan, kind: int, *columns: list[Tensor]) -> Iterator[tuple[list[int], list[list[Tensor]]]]:
    """The lists at the runs of one kind, or of ALL, in batches of about one piece: several runs, or a part of one in
    memory order. Each comes with the places of its runs.
    """
    size = piece_size()
    if (kind, size) not in plan.batches:
        plan.batches[kind, size] = _batches(plan, kind, size)
    for places in plan.batches[kind, size]:
        if plan.rows[places[0]][1] > size:
            for parts in zip(*(line(x[places[0]]).split(size) for x in columns), strict=True):
                yield places, [[part] for part in parts]
        else:
            yield places, [at(places, x) for x in columns]


def at(places: list[int], column: list[Tensor]) -> list[Tensor]:
    """The tensors at these places."""
    return column if len(places) == len(column) else [column[i] for i in places]


def _batches(plan: Plan, kind: int, size: int) -> list[list[int]]:
    batches: list[list[int]] = []
    room = 0
    for place in range(len(plan.rows)) if kind == ALL else plan.kinds.get(kind, ()):
        numel = plan.rows[place][1]
        if not batches or numel > room:
            batches.append([])
            room = size
        batches[-1].append(place)
        room -= numel
    return batches


def filter_pieces(row: Sequence[int], t: Tensor, *tensors: Tensor) -> Iterator[list[Tensor]]:
    """T of one run's filters, and its tensors, in pieces where the filters are whole: of shape [filters, 1] and
    [times, filters, filter_length].
    """
    _, numel, length, count, first = row
    t = t[first : first + count].view(count, 1)
    shaped = [line(x).view(-1, count, length) for x in tensors]
    if numel <= piece_size() or shaped[0].shape[0] > 1:
        yield [t, *shaped]
    else:
        step = max(1, piece_size() // length)
        yield from map(list, zip(t.split(step), *(x.split(step, 1) for x in shaped), strict=True))
