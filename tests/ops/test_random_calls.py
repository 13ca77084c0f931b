"""Calls of the registered ops with arguments of every kind: each returns or raises, and writes what it may write only.

The calls are made in a process of its own, which says of each what it is before it is made, since a crash leaves
nothing else. The same calls at every run; LETS_KERNELS_EXAMPLES=n makes n new ones of each op.
"""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from support.drawn_examples import drawn

CALLS = 300  # of each op
CLEAN = (RuntimeError, ValueError, TypeError, IndexError)  # NotImplementedError is a RuntimeError

ARENA, GAP = 1 << 17, 64  # bytes in all, and between two tensors
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OTHERS = (torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.complex64, torch.float8_e5m2)
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SIZES = (0, 1, 3, 15, 16, 17, 33, 100)


def registered():
    """The names of all ops that there are, of which some may be new."""
    from lets_kernels.ops import native

    assert native.OPS
    names = torch._C._dispatch_get_all_op_names()
    return sorted(n.removeprefix("lets_kernels::") for n in names if n.startswith("lets_kernels::"))


class Arena:
    """One piece of memory for all tensors of a call, with gaps between them that nobody may write."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self._fresh = torch.randint(0, 256, (ARENA,), generator=generator, dtype=torch.uint8)
        self._bytes, self._allowed = self._fresh.clone(), torch.zeros(ARENA, dtype=torch.bool)
        self._end = GAP

    def clear(self):
        self._bytes.copy_(self._fresh)
        self._end = GAP

    def tensor(self, shape, dtype, strides=None, shift=0):
        """A tensor full of bits that may be any number; its first element is `shift` elements past a round address."""
        item = dtype.itemsize
        if strides is None:
            strides = torch.empty(shape, device="meta").stride()
        reach = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if 0 not in shape else 0
        begin = self._end + shift * item
        self._end = -(-(begin + reach * item + GAP) // GAP) * GAP
        assert self._end <= ARENA
        return self._bytes[begin : begin + reach * item].view(dtype).as_strided(shape, strides)

    def settle(self):
        """The call comes now: remember what is there."""
        self._before = self._bytes.clone()
        self._allowed.zero_()

    def allow(self, t):
        """The call may write the elements of this tensor."""
        if t.layout is torch.strided and t.device.type == "cpu" and t.data_ptr() and t.numel():
            offset = t.data_ptr() - self._bytes.data_ptr()
            if 0 <= offset < ARENA and t.dtype.itemsize in INTEGERS:
                same = self._allowed.view(torch.uint8).view(INTEGERS[t.dtype.itemsize])
                same.as_strided(t.shape, t.stride(), offset // t.dtype.itemsize).fill_(-1)

    def written(self):
        """The bytes that have changed, and those among them that should not have."""
        changed = self._bytes != self._before
        return changed, changed & ~self._allowed.view(torch.uint8).ne(0)


class Call:
    """The arguments of one call: those that go together, some of which are then changed."""

    arena = None

    def __init__(self, op, seed, changes):
        self.op, self.random = getattr(torch.ops.lets_kernels, op).default, random.Random(seed)
        self.arguments = self.op._schema.arguments
        if Call.arena is None:
            Call.arena = Arena()
        self.arena.clear()
        self.alive = []  # what addresses point to
        self.dtype = self.random.choice(DTYPES)
        self._rows()
        self.plain = [self._argument(a) for a in self.arguments]
        self.given = list(self.plain)
        packs = set()
        for where, what in changes:
            where %= len(self.arguments)
            if not isinstance(self.given[where], list) and self.given[where] is not self.plain[where]:
                continue
            kinds = self._changes(self.arguments[where])
            name = kinds[what % len(kinds)]
            if name == "packed":
                packs.add(where)
            else:
                self.given[where] = getattr(self, "to_" + name)(self.given[where])
        # Addresses say nothing of what lies there: they go with the table and the tensors that they were made for.
        table = [i for i, a in enumerate(self.arguments) if a.name == "table"]
        if all(self.given[i] is self.plain[i] for i in table):
            for i in packs:
                if self.given[i] is self.plain[i]:
                    self.given[i] = self._pack(self.given[i])

    def _rows(self):
        rows, start, first = [], 0, 0
        kinds = self.random.choice([(-1,), (0,), (-2,), (1,), (1, 0, -1, -2)])
        for i in range(self.random.choice([0, 1, 1, 2, 4, 6])):
            numel, kind, count = self.random.choice(SIZES), kinds[i % len(kinds)], 0
            if kind == 1:
                count = self.random.choice([c for c in (1, 3, 4) if numel % c == 0])
                kind = max(1, numel // count // self.random.choice([1, 1, 5]))
                if numel % kind or numel // kind % count:
                    kind, count = max(1, numel), 1
            rows.append((start, numel, kind, count, first if kind > 0 else 0))
            start += -(-numel // 16) * 16
            first += count
        self.numels, self.size, self.filters, self.rows = [r[1] for r in rows], start, first, rows

    # ---- arguments that go together

    def _new(self, shape, dtype, low=-2.0, high=2.0, shift=0):
        t = self.arena.tensor(shape, dtype, shift=shift)
        if dtype in DTYPES and self.random.random() < 0.9:
            t.uniform_(low, high)
        return t

    def _argument(self, argument):
        kind = str(argument.type)
        if kind == "List[Tensor]":
            return self._list(argument.name)
        if kind in ("Tensor", "Optional[Tensor]"):
            return self._tensor(argument.name)
        if kind == "bool":
            return self.random.random() < 0.5
        if kind == "int":
            return self.random.choice([0, 1, 2, 7])
        if kind == "List[float]":  # one for all runs, or one a run
            count = self.random.choice([0, 0, 1, len(self.numels)])
            return [self._float() for _ in range(count)] if count else self._float()
        assert kind == "float", f"{self.op}: {argument.name} is a {kind}, of which nothing is known here"
        return self._float()

    def _float(self):
        return self.random.choice([2.0, 2.0, 1.0, 1.5, 0.9, 0.5, 0.0])

    def _list(self, name):
        if name == "values":
            return [self._number(torch.float64) for _ in self.numels]
        if name == "steps":
            return [self._number(torch.float32) for _ in self.numels]
        if name in ("momenta", "train", "vectors") and self.random.random() < 0.2:
            return []
        if self.random.random() < 0.2:
            return [self._new((self.size,), self.dtype)]
        return [self._new((n,), self.dtype, shift=self.random.choice([0, 0, 1, 3])) for n in self.numels]

    def _number(self, dtype):
        t = self.arena.tensor((), dtype)
        return t.fill_(self.random.choice([0, 1, 1, 3]))

    def _tensor(self, name):
        wide = torch.float64 if self.dtype is torch.float64 else torch.float32
        kinds = {
            "table": lambda: self._table(),
            "flat": lambda: self._new((self.size,), self.dtype),
            "norms": lambda: self._new((self.filters,), wide, 0.1, 2.0),
            "bytes": lambda: self.arena.tensor((self.size,), torch.uint8),
            "number": lambda: self._number(torch.float64),
            "count": lambda: self._number(torch.int64),
            "numbers": lambda: self._new((2,), torch.float64),
            "radii": lambda: self._new((len(self.numels),), torch.float64, 0.0),
            "counts": lambda: self.arena.tensor((2,), torch.int64),
        }
        names = {
            "table": "table", "saved": "flat", "mask": "bytes", "filter_norms": "norms", "out": "norms",
            "random": "counts", "coefficients": "numbers",
            **dict.fromkeys(("dirty", "updates", "threshold", "skipped"), "count"),
            **dict.fromkeys(("gate", "total", "rho", "largest"), "number"),
        }  # fmt: skip
        if name == "rho" and self.random.random() < 0.5:
            return kinds["radii"]()
        return kinds[names.get(name) or self.random.choice(list(kinds))]()

    def _table(self):
        table = self.arena.tensor((len(self.rows), 5), torch.int64)
        return table.copy_(torch.tensor(self.rows, dtype=torch.int64).reshape(-1, 5))

    def _pack(self, tensors):
        from lets_kernels.ops import native

        self.alive.append(tensors)
        return native.pack(tensors, self.arena.tensor((), torch.int64))

    # ---- and what may be wrong with one

    def _changes(self, argument):
        kind = str(argument.type)
        if argument.name == "table":
            return (*TABLE, *TENSOR)
        if kind == "List[Tensor]":
            return LIST
        if kind in ("Tensor", "Optional[Tensor]"):
            return TENSOR
        return {"float": FLOAT, "List[float]": NUMBERS, "int": INT, "bool": BOOL}[kind]

    def to_none(self, _):
        return None

    def to_text(self, _):
        return "1"

    def to_another_argument(self, _):
        return self.random.choice(self.plain)

    def to_meta(self, t):
        return t.to("meta") if torch.is_tensor(t) else t

    def to_given_back(self, t):
        """Memory that the storage does not have any more; a vector begins after the beginning of its own."""
        if not torch.is_tensor(t) or t.layout is not torch.strided or t.device.type != "cpu":
            return t
        offset, left = 1, self.random.choice([0, t.numel() * t.dtype.itemsize // 2])
        freed = torch.empty(t.numel() + offset, dtype=t.dtype)[offset:].view(t.shape)
        freed.untyped_storage().resize_(left)
        return freed

    def to_sparse(self, t):
        return torch.ones(3, dtype=self.dtype).to_sparse()

    def to_another_dtype(self, t):
        if not torch.is_tensor(t):
            return t
        return self.arena.tensor(t.shape, self.random.choice([d for d in (*DTYPES, *OTHERS) if d is not t.dtype]))

    def to_another_size(self, t):
        if not torch.is_tensor(t):
            return t
        n = max(0, t.numel() + self.random.choice([-17, -1, 1, 16, 200]))
        return self.arena.tensor((n,), t.dtype)

    def to_holes(self, t):
        if not torch.is_tensor(t):
            return t
        return self.arena.tensor((t.numel(),), t.dtype, (self.random.choice([2, 3]),))

    def to_overlap(self, t):
        if not torch.is_tensor(t):
            return t
        return self.arena.tensor((t.numel(),), t.dtype, (0,)) if t.numel() > 1 else t

    def to_matrix(self, t):
        """As many elements, in columns; a dense tensor."""
        if not torch.is_tensor(t) or t.numel() % 3:
            return t
        return self.arena.tensor((3, t.numel() // 3), t.dtype, (1, 3))

    def to_negated(self, t):
        """Whose memory holds other numbers than it has."""
        strided = torch.is_tensor(t) and t.is_floating_point() and t.layout is torch.strided
        if not strided or (t.device.type == "cpu" and t.untyped_storage().nbytes() < ARENA):
            return t
        return torch._neg_view(t)

    def to_empty(self, _):
        return []

    def to_one_less(self, tensors):
        return tensors[:-1] if isinstance(tensors, list) else tensors

    def to_one_more(self, tensors):
        return [*tensors, self._new((16,), self.dtype)] if isinstance(tensors, list) else tensors

    def to_one_changed(self, tensors):
        if not isinstance(tensors, list) or not tensors:
            return tensors
        i = self.random.randrange(len(tensors))
        change = getattr(self, "to_" + self.random.choice(ONE))
        return [*tensors[:i], change(tensors[i]), *tensors[i + 1 :]]

    def to_all_of_another_dtype(self, tensors):
        if not isinstance(tensors, list):
            return tensors
        dtype = self.random.choice((*DTYPES, *OTHERS))
        return [self.arena.tensor(t.shape, dtype) if torch.is_tensor(t) else t for t in tensors]

    def to_one_for_all(self, tensors):
        return tensors[:1] * len(tensors) if isinstance(tensors, list) else tensors

    def to_flat(self, _):
        return [self._new((max(0, self.size + self.random.choice([-16, -1, 0, 5])),), self.dtype)]

    def to_integers(self, _):
        """What only looks like addresses: vectors of int64, with one of the two words, with both and a wrong rest."""
        from lets_kernels.ops import native

        words, count = list(native._PACKED), len(self.numels)
        number = native._NUMBERS[self.dtype]
        found = self.random.choice(
            [
                [number, *range(4096, 4096 + count)],
                [words[0], 0, number, *range(count)],
                [*reversed(words), number, *range(count)],
                [*words, number, *range(100)],  # more than any table has rows
                [*words, number],
                [*words, self.random.choice([-1, 4, 2**62]), *range(count)],
                [*words],
                [],
            ]
        )
        vector = self.arena.tensor((len(found),), torch.int64).copy_(torch.tensor(found, dtype=torch.int64))
        return [vector, self.arena.tensor((), torch.int64)]

    def to_entry(self, table):
        """Another number in one place."""
        if not torch.is_tensor(table) or table.dtype is not torch.int64 or table.dim() != 2 or not table.numel():
            return table
        changed = self.arena.tensor(table.shape, torch.int64).copy_(table)
        i, j = self.random.randrange(table.shape[0]), self.random.randrange(table.shape[1])
        old = int(table[i, j])
        numbers = (-1, -2, -3, 0, 1, 7, 2**31, 2**40, 2**56, 2**56 + 1, 2**62, 2**63 - 16, 2**63 - 1, -(2**63))
        changed[i, j] = self.random.choice((*numbers, min(old + 1, 2**62), max(old - 1, -(2**62)), old // 2))
        return changed

    def to_overlapping(self, table):
        """Every run at the beginning of the bucket."""
        if not torch.is_tensor(table) or table.dim() != 2 or table.dtype is not torch.int64:
            return table
        changed = self.arena.tensor(table.shape, torch.int64).copy_(table)
        changed[:, :1] = 0
        return changed

    def to_fewer_rows(self, table):
        return table[:-1] if torch.is_tensor(table) and table.dim() else table

    def to_more_rows(self, table):
        return torch.cat([table, table]) if torch.is_tensor(table) and table.layout is torch.strided else table

    def to_fewer_columns(self, table):
        return table[:, :4] if torch.is_tensor(table) and table.dim() == 2 else table

    def to_nan(self, _):
        return math.nan

    def to_number(self, _):
        return self.random.choice([math.inf, -math.inf, 0.0, -0.0, -1.0, 5e-324, 1e308, -1e308, 1e-300, 16.0])

    def to_whole(self, _):
        return self.random.choice([-(2**63), 2**63 - 1, -(2**31), 2**32, -3, -2, -1, 255, 256])

    # ---- the call

    def make(self):
        """True if it returned, False if it was refused; anything else is an error."""
        self.arena.settle()
        for argument, value in zip(self.arguments, self.given, strict=True):
            if argument.is_write:
                for t in value if isinstance(value, list) else [value]:
                    if torch.is_tensor(t):
                        self.arena.allow(t)
        for argument, value, plain in zip(self.arguments, self.given, self.plain, strict=True):
            if argument.is_write and value is not plain and any(plain is kept for kept in self.alive):
                for t in plain:  # given by its address
                    self.arena.allow(t)
        try:
            self.op(*self.given)
            refused = None
        except CLEAN as error:
            refused = f"{error}"
        changed, wild = self.arena.written()
        assert not bool(wild.any()), f"wrote {int(wild.sum())} bytes that are none of its own"
        assert refused is None or not bool(changed.any()), f"wrote {int(changed.sum())} bytes, and raised {refused}"
        assert refused != "", "raised without a word"
        return refused is None


TABLE = ("entry", "entry", "entry", "entry", "overlapping", "fewer_rows", "more_rows", "fewer_columns")
ONE = ("meta", "given_back", "another_dtype", "another_size", "holes", "overlap", "matrix", "negated", "sparse")
TENSOR = ("none", "text", "number", "another_argument", *ONE)
LIST = (
    "empty", "one_less", "one_more", "one_changed", "one_changed", "one_changed", "all_of_another_dtype", "flat",
    "one_for_all", "integers", "integers", "packed", "packed", "another_argument", "none",
)  # fmt: skip
FLOAT = ("nan", "number", "number", "whole", "none", "text")
NUMBERS = (*FLOAT, "empty", "one_less", "one_more", "one_for_all", "another_argument")
INT = ("whole", "whole", "nan", "none", "text")
BOOL = ("none", "whole", "text")


def run(said):
    """In the process that may crash: all calls. What comes is written to `said`, what came of it is returned."""
    ops = registered()
    counts = {op: [0, 0] for op in ops}
    torch.set_num_threads(1)
    changes = st.lists(st.tuples(st.integers(0, 15), st.integers(0, 31)), max_size=3)

    @drawn(CALLS)
    @given(seed=st.integers(0, 2**32), changes=changes)
    def calls(seed, changes):
        for op in ops:
            call = Call(op, seed, changes)
            words = f"Call({op!r}, {seed}, {changes}).make()".encode()
            os.pwrite(said, words + b"\n", 0)
            os.ftruncate(said, len(words) + 1)
            counts[op][call.make()] += 1

    calls()
    return counts


@pytest.mark.skipif(os.environ.get("LETS_KERNELS_TESTS_WITHOUT_EXTENSION") == "1", reason="nothing is registered")
def test_no_call_crashes_or_writes_what_it_may_not(tmp_path):
    """Of every op some calls are taken and some refused, so that neither half of the promise is empty."""
    said, found = tmp_path / "said", tmp_path / "found"
    here = Path(__file__)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.resolve().parents[2]), *sys.path])}
    done = subprocess.run(
        [sys.executable, str(here), str(said), str(found)], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        last = said.read_text() if said.exists() else "no call"
        pytest.fail(f"ended with {done.returncode}; the last call was\n{last}\n{done.stdout}\n{done.stderr}")
    counts = json.loads(found.read_text())
    assert counts and all(min(refused, taken) > 0 for refused, taken in counts.values()), counts


def test_the_arena_notices_a_write_between_tensors():
    arena = Arena()
    t = arena.tensor((4, 2), torch.float32, (4, 1))
    arena.settle()
    arena.allow(t)
    t.fill_(1.0)
    changed, wild = arena.written()
    assert bool(changed.any()) and not bool(wild.any())
    t.as_strided((1,), (1,), t.storage_offset() + 2).fill_(1.0)  # a hole of its own
    assert int(arena.written()[1].sum()) == 4


if __name__ == "__main__":
    handle = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
    Path(sys.argv[2]).write_text(json.dumps(run(handle)))
