"""The pages of the methods say what is so: every line runs, takes the gradients it says, and keeps what it says."""

import gc
import inspect
import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lets_kernels as lk
from lets_kernels.__main__ import main
from lets_kernels.methods import catalogue
from support.inside import held, space, work

ROOT = Path(__file__).resolve().parents[2]
NAMES = {name: getattr(lk, name) for name in lk.__all__}
SIZE = 128


class Line:
    """One linear layer of SIZE x SIZE weights under a method, and the closure that goes with it."""

    def __init__(self, method, row, **names):
        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(SIZE, SIZE))
        self.inputs, self.targets = torch.randn(4, SIZE), torch.randn(4, SIZE)
        self.calls = self.quiet = 0
        scope = {"params": [self.weight], "SGD": torch.optim.SGD, **NAMES, **names}
        self.opt = eval(method.line(row), scope)

    def closure(self, subset=None):
        self.calls += torch.is_grad_enabled()
        self.quiet += not torch.is_grad_enabled()
        rows = slice(None) if subset is None else subset
        outputs = self.inputs[rows] @ self.weight
        losses = (outputs - self.targets[rows]).square().mean(dim=1)
        if self.opt.samples.per_sample:
            return losses, outputs
        self.opt.zero_grad()
        losses.mean().backward()
        return losses.mean()

    def step(self):
        if self.opt.radius.learns:
            return self.opt.step(self.closure, self.closure)
        return self.opt.step(self.closure)


METHODS = catalogue.methods()
LINES = [pytest.param(method, row, id=row.name) for method in METHODS for row in method.rows]
ENTRIES = pytest.mark.parametrize("method, row", LINES)
EACH = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.key)


def test_the_document_holds_the_tables_and_the_command_prints_them(capsys):
    text = (ROOT / "docs" / "methods.md").read_text()
    current = f"\n\n{catalogue.table()}\n" in text and f"\n\n{catalogue.defaults()}\n" in text
    assert current, "replace the two tables of docs/methods.md by what `python -m lets_kernels methods` prints"
    assert main(["methods"]) == 0
    assert capsys.readouterr().out == catalogue.text() + "\n"


def test_every_method_that_is_exported_has_its_page_and_no_other():
    exported = {thing for thing in NAMES.values() if isinstance(thing, type) and issubclass(thing, lk.SAM)}
    assert [m.cls for m in METHODS if m.cls not in exported] == []
    assert len(METHODS) == len(exported) == len({m.cls for m in METHODS}) == len({m.key for m in METHODS})


@EACH
def test_the_parts_of_a_method_are_exported_too(method):
    assert [part for part in method.parts if NAMES.get(part.__name__) is not part] == []


@EACH
def test_a_page_stands_in_the_file_of_its_class(method):
    """But for SAM's, whose class all methods have in common."""
    module = inspect.getmodule(method.cls)
    assert method in getattr(module, "METHODS", ()) or method.cls is lk.SAM


@EACH
def test_every_default_of_the_signature_says_whose_it_is_and_no_other(method):
    assert list(method.defaults) == list(method.values)
    assert all(method.defaults.values()) and "rho" in method.values


@EACH
def test_a_constructor_takes_its_parts_and_its_first_row_its_defaults(method):
    """The parts are those in which the optimizer differs from plain SAM; what the first row shows is the defaults."""
    opt, plain = Line(method, method.rows[0]).opt, lk.SAM([torch.nn.Parameter(torch.ones(2))], torch.optim.SGD, lr=0.1)
    parts = [(o.direction, o.schedule, o.descent, o.samples, o.radius, o.length) for o in (opt, plain)]
    others = {type(mine) for mine, its in zip(*parts, strict=True) if type(mine) is not type(its)}
    if type(opt.direction) is lk.Adaptive and opt.direction.defaults != plain.direction.defaults:
        others.add(lk.Adaptive)
    assert set(method.parts) == others
    shown = eval(f"dict({method.rows[0].arguments})", dict(NAMES))
    assert shown["rho"] == method.values["rho"]
    assert all(method.values[name] == value for name, value in shown.items() if name in method.values)


STEPS = 20


def expected_gradients(row, opt):
    """How many gradients STEPS steps take, from the table's words: the least and the most."""
    words = row.gradients.split(",")[0].replace("1 + γ", "2")  # a gradient of fewer samples is one all the same
    if words == "1 to 2":
        return STEPS, 2 * STEPS
    if words == "1 + p":  # four standard deviations of a binomial: wrong once in 16,000 seeds, and the seed is fixed
        mean, deviation = opt.schedule.p * STEPS, math.sqrt(STEPS * opt.schedule.p * (1 - opt.schedule.p))
        return STEPS + mean - 4 * deviation, STEPS + mean + 4 * deviation
    if words == "1 + k":
        return ((1 + opt.direction.ascents) * STEPS,) * 2
    if words == "1 + f":  # f STEPS is rounded to a whole number
        late = STEPS * (1 + opt.schedule.fraction)
        return late - 0.5, late + 0.5
    if words == "1 + 1/k":
        return (STEPS + STEPS // opt.schedule.k,) * 2
    return (int(words) * STEPS,) * 2


@ENTRIES
def test_it_takes_the_gradients_that_the_table_says_and_counts_them(method, row):
    line = Line(method, replace(row, arguments=row.arguments.replace("steps=1000", f"steps={STEPS}")))
    for _ in range(STEPS):
        line.step()
    least, most = expected_gradients(row, line.opt)
    assert least <= line.calls <= most
    assert int(line.opt.metrics()["gradients"]) == line.calls
    assert (line.quiet > 0) == ("forward" in row.gradients)
    assert bool(torch.isfinite(line.weight).all())


@ENTRIES
def test_it_keeps_what_the_table_says(method, row):
    line = Line(method, row)
    for _ in range(6):
        line.step()
    saved = space(line.opt).buckets[0].saved.untyped_storage().data_ptr()  # what every method has
    own = [t for kept in held(line.opt).values() for t in kept.values()]
    own = [t for t in own if t.untyped_storage().data_ptr() != saved]
    if method.own_base:  # it is part of the method
        own += [t for kept in line.opt.base_optimizer.state.values() for t in kept.values()]
    assert sum(t.numel() * t.element_size() for t in own) == row.state * SIZE * SIZE * 4
    holds = line.opt.descent.holds_first or line.opt.radius.learns or work(line.opt).setting.comparing is not None
    assert row.holds == holds


def weights_alive():
    """The tensors with at least as many elements as the weight, of whomever."""
    gc.collect()
    return [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter) and t.numel() >= SIZE**2]


@ENTRIES
def test_all_that_it_keeps_for_a_parameter_is_in_the_state(method, row):
    """Nothing else of the weight's size outlives a step but the buffer of the weights before ε, which all have."""
    others = weights_alive()
    known = {id(t) for t in others}
    line = Line(method, row)
    for _ in range(3):
        line.step()
    line.opt.zero_grad()
    found = {t.untyped_storage().data_ptr() for t in weights_alive() if id(t) not in known}
    shown = {t.untyped_storage().data_ptr() for t in line.opt.state[line.weight].values() if t.numel() >= SIZE**2}
    saved = space(line.opt).buckets[0].saved
    assert found == shown | {t.untyped_storage().data_ptr() for t in (line.weight, saved)}


def peak(line, steps):
    """The most bytes above those before and after some steps; before and after them, nothing waits to be learned from.
    Gradients are None between them."""
    line.opt.zero_grad()
    line.opt.radius._pending = None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        for _ in range(steps):
            line.step()
            line.opt.zero_grad()
        line.opt.radius._pending = None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = list(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
    assert abs(sizes[-1]) < SIZE * SIZE, "the steps kept or gave back memory"
    return max(sizes)


@ENTRIES
def test_the_peak_of_a_step_is_what_the_table_says(method, row):
    """Beside the activations of four samples, 1/32 of a weight each time: outputs, differences, squares, and theirs."""
    line = Line(method, row)
    for _ in range(3):
        line.step()
    found = peak(line, STEPS) / (4 * SIZE * SIZE)
    assert row.peak <= found < row.peak + 0.25


#: The gradients that are there at once, as docs/methods.md says. What waits are two of them, and three in the last one.
LEARNED = {
    "secant": ({"curvature": "secant"}, 3),
    "algorithm1": ({"direction": "algorithm1"}, 3),
    "reuse": ({"reuse_train_gradient": True}, 3),
    "reuse-secant": ({"reuse_train_gradient": True, "curvature": "secant"}, 3),
    "next": ({"validation": "next"}, 3),
    "reuse-algorithm1": ({"reuse_train_gradient": True, "direction": "algorithm1"}, 4),
}


@pytest.mark.parametrize("kind", LEARNED)
def test_the_peak_of_a_learned_radius_of_any_kind(kind):
    options, gradients = LEARNED[kind]
    method = next(m for m in METHODS if m.cls is lk.LETSSAM)
    line = Line(method, replace(method.rows[0], arguments="rho=radius, lr=0.1"), radius=lk.LearnedRadius(**options))
    for _ in range(3):
        line.step()
    found = peak(line, 4) / (4 * SIZE * SIZE)
    assert gradients <= found < gradients + 0.25


class Allocations(TorchDispatchMode):
    """What is as large as a weight and was made by an operator; nothing while ``off``."""

    def __init__(self):
        super().__init__()
        self.off, self.found = False, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs or {}))}
        result = func(*args, **(kwargs or {}))
        for t in tensors(result):
            storage = t.untyped_storage()
            if not self.off and storage.nbytes() >= SIZE * SIZE and storage.data_ptr() not in given:
                self.found.append(str(func))
        return result


def tensors(tree):
    return [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]


def allocations(line, steps):
    """The weight-sized allocations of some steps, without those of the passes."""
    call = work(line.opt).call
    with Allocations() as seen:

        def without(closure, scaler=None):
            seen.off = True
            try:
                return call(closure, scaler)
            finally:
                seen.off = False

        work(line.opt).call = without
        for _ in range(steps):
            line.step()
    return seen.found


@ENTRIES
def test_a_steady_step_allocates_nothing_of_the_weights_size(method, row):
    line = Line(method, row)
    for _ in range(6):
        line.step()
    # What several ascents carry along lives for a step only, and is counted in the table's peak.
    carried = 6 * (row.peak - 1) if line.opt.direction.ascents > 1 else 0
    assert len(allocations(line, 6)) == carried


def test_the_count_of_allocations_sees_what_the_reference_allocates():
    """Whose formulas are written for reading: the same steps there are full of temporaries."""
    method = next(m for m in METHODS if m.cls is lk.GSAM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LETS_KERNELS_BACKEND", "reference")
        line = Line(method, method.rows[0])
        line.step()
        assert len(allocations(line, 1)) > 3


def test_a_method_is_described_by_its_lines_of_both_tables(capsys):
    for method in catalogue.methods():
        assert main(["methods", method.key]) == 0
        said = capsys.readouterr().out
        assert said.startswith(f"{method.name}: {method.paper}\n")
        assert all(method.line(row) in said and f"gradients a step: {row.gradients};" in said for row in method.rows)
        assert all(f"{name}={value!r}: {method.defaults[name]}" in said for name, value in method.values.items())
    with pytest.raises(SystemExit):
        main(["methods", "gsam", "nonsense"])
    assert "no method 'nonsense'; there are sam, " in capsys.readouterr().err
