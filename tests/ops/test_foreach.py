"""What foreach has of its own: it goes by memory order, keeps no memory alive, leaves to the reference what it cannot
do itself, and its steps are the reference's."""

import gc
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import lets_kernels as lk
from lets_kernels.ops import foreach, reference
from lets_kernels.ops.foreach import shared
from support.guard_bands import DTYPES, LAYOUTS, Bucket, Run, arithmetic, assert_within, same_bits, storage

SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
ADAMW = {"lr": 0.01, "weight_decay": 0.1}
METHODS = {
    "sgd": lambda p, **o: lk.SAM(p, torch.optim.SGD, rho=0.5, **SGD, **o),
    "nesterov": lambda p, **o: lk.SAM(p, torch.optim.SGD, rho=0.5, nesterov=True, **SGD, **o),
    "adam": lambda p, **o: lk.SAM(p, torch.optim.Adam, rho=0.5, **ADAMW, **o),
    "adamw": lambda p, **o: lk.SAM(p, torch.optim.AdamW, rho=0.5, **ADAMW, **o),
    "element-wise": lambda p, **o: lk.ASAM(p, torch.optim.SGD, rho=0.5, **SGD, **o),
    "filter-wise": lambda p, **o: lk.ASAM(p, torch.optim.SGD, rho=0.5, filterwise=True, **SGD, **o),
}


def scalar(x):
    return torch.tensor(x, dtype=torch.float64)


def flag(x=0):
    return torch.tensor(x, dtype=torch.int64)


def without_the_reference(monkeypatch):
    """Its functions are not found any more where foreach would leave something to them."""
    for stem in ("norm", "perturb", "rho", "step"):
        monkeypatch.setattr(f"lets_kernels.ops.foreach.{stem}.reference", None)


def parameters(dtype=torch.float32):
    """Of every kind of layout, in two groups; one is larger than a piece."""
    torch.manual_seed(1)
    shapes = [(8, 3, 5, 5), (70001,), (), (0,), (6, 5), (17, 300)]
    tensors = [torch.randn(s).to(dtype) for s in shapes]
    tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    params = [torch.nn.Parameter(t) for t in (*tensors, torch.randn(12, 4).to(dtype).t())]
    return params, [{"params": params[:4]}, {"params": params[4:], "lr": 0.05}]


def train(method, steps=3, dtype=torch.float32, **options):
    """The weights after every half of a step, and the state at the end, name by name."""
    params, groups = parameters(dtype)
    opt, found = METHODS[method](groups, **options), []
    for i in range(steps):
        for half in (opt.first_step, opt.second_step):
            torch.manual_seed(10 + i)
            for p in params:
                p.grad = torch.randn_like(p)
            half()
            found.append([p.detach().clone() for p in params])
    assert opt.fused
    names = sorted(opt.state[params[0]])
    assert all(sorted(opt.state[p]) == names and opt.state[p][names[0]].dtype == dtype for p in params)
    return found, [[opt.state[p][name] for p in params] for name in names]


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_the_steps_are_those_of_the_reference(method, dtype, flatten, monkeypatch):
    """And none of its ops takes part: what is compared is not the reference itself."""
    expected, theirs = train(method, dtype=dtype, backend="reference", flatten=flatten)
    without_the_reference(monkeypatch)
    found, ours = train(method, dtype=dtype, backend="foreach", flatten=flatten)
    for mine, other in zip([*found, *ours], [*expected, *theirs], strict=True):
        check(mine, other, dtype)


def check(mine, other, dtype):
    """A step's sums and quotients have at most eight roundings, of weights, moments, moves of at most 5 each, and six
    half steps hand on what they have, with gradients that do not depend on it. In 16 bits a number may be stored to the
    other side, if a float32 rounding takes it there: less than one in a thousand.
    """
    if dtype == torch.bfloat16:
        same = [(x == y).flatten() for x, y in zip(mine, other, strict=True)]
        assert torch.cat(same).double().mean() > 0.999
    else:
        bound = [6 * 8 * arithmetic(dtype) * (5 + x.double().abs()) for x in other]
        assert_within(
            [x.reshape(-1) for x in mine], [x.double().reshape(-1) for x in other], [b.reshape(-1) for b in bound]
        )


def test_a_gradient_that_is_not_finite_is_skipped_and_counted_without_the_reference(monkeypatch):
    params, groups = parameters()
    opt, before = METHODS["adamw"](groups, backend="foreach"), [p.detach().clone() for p in params]
    for half, worst in ((opt.first_step, 1.0), (opt.second_step, torch.nan)):
        for p in params:
            p.grad = torch.ones_like(p)
        params[1].grad[5] = worst
        without_the_reference(monkeypatch)
        half()
    assert same_bits([p.detach() for p in params], before) and opt.skipped.item() == 1
    assert all(opt.state[p]["step"].item() == 0 and not opt.state[p]["exp_avg"].any() for p in params)


def test_without_vectors_they_stand_in_the_buffer_that_the_weights_overwrite():
    ends = []
    for swapped in (False, True):
        bucket = Bucket(LAYOUTS["several"], torch.float32, "mixed")
        thetas, vectors, norms = bucket.values(), bucket.values(), bucket.norms()
        params, (saved,) = bucket.give(thetas, "list"), bucket.give(vectors if swapped else None, "flat")
        given = [] if swapped else bucket.give(vectors, "list")
        numbers = 0.01, 2.0, scalar(3.0), scalar(0.7)
        foreach.perturb_(params, given, saved, flag(), bucket.table, norms, *numbers)
        ends.append([*bucket.read(params), *bucket.read([saved])])
    assert same_bits(*ends)
    assert same_bits(ends[1][len(thetas) :], [t.float() for t in thetas])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lists_in_other_memory_orders_go_together_element_by_element_as_they_lie(dtype):
    """The third element in memory of one is the third of the others, whatever their shapes and strides."""
    shapes = [(6, 4), (2, 3, 5)]
    orders = [[(4, 1), (15, 5, 1)], [(1, 6), (1, 10, 2)]]

    def given(order):
        return [torch.randn(s).to(dtype).as_strided(s, o) for s, o in zip(shapes, order, strict=True)]

    table = torch.tensor([[0, 24, -1, 0, 0], [32, 30, -1, 0, 0]])
    ends = []
    for ops in (reference, foreach):
        torch.manual_seed(3)
        params, grads, momenta = given(orders[0]), given(orders[1]), given(orders[0])
        saved, dirty = torch.zeros(64, dtype=dtype), flag()
        total = ops.grad_norm(grads, [], table, None, 0.0, 2.0)
        ops.perturb_(params, grads, saved, dirty, table, None, 0.0, 2.0, total, scalar(0.5))
        perturbed = [p.clone() for p in params]
        step = table, scalar(1.0), 0.1, 0.9, 0.01, False, False
        ops.restore_sgd_(params, grads, momenta, saved, dirty, *step)
        ends.append([*perturbed, *params, *momenta])
    # Sums of a handful of numbers of at most 5: eight roundings; storage may round to the other side.
    bound = [8 * arithmetic(dtype) * 5 + 2 * storage(dtype, x.double()) for x in ends[0]]
    assert_within(ends[1], [x.double() for x in ends[0]], bound)


def test_views_of_a_buffer_live_as_long_as_the_buffer():
    """They are kept for the next step, and must not keep the weights' copy of an optimizer that is gone."""
    gc.collect()
    before = len(shared._views), len(shared._plans)
    table, params = torch.tensor([[0, 5, -1, 0, 0], [16, 3, -1, 0, 0]]), [torch.ones(5), torch.ones(3)]
    saved, dirty = torch.zeros(32), flag(1)
    foreach.restore_(params, saved, dirty, table)
    assert (len(shared._views), len(shared._plans)) == (before[0] + 1, before[1] + 1)
    storage_of = weakref.ref(saved.untyped_storage())
    dead = weakref.ref(saved)
    del saved, table
    gc.collect()
    assert dead() is None and storage_of() is None
    assert (len(shared._views), len(shared._plans)) == before


def test_a_table_or_a_buffer_that_has_changed_is_read_anew():
    table, params = torch.tensor([[0, 4, -1, 0, 0], [16, 4, -1, 0, 0]]), [torch.zeros(4), torch.zeros(4)]
    saved = torch.arange(32.0)
    foreach.restore_(params, saved, flag(1), table)
    table[1, 0] = 8
    foreach.restore_(params, saved, flag(1), table)
    assert torch.equal(params[1], saved[8:12])
    saved.set_(torch.arange(32.0) + 100)
    foreach.restore_(params, saved, flag(1), table)
    assert torch.equal(params[1], saved[8:12]) and params[1][0] == 108


def test_numbers_that_change_from_call_to_call_do_not_pile_up_parts_of_a_table():
    table = torch.tensor([[0, 4, -1, 0, 0], [16, 4, -1, 0, 0]])
    for i in range(100):
        parts = shared.alike(table, [0.1, 0.1 + i])
        assert [part.places for part in parts] == ([[0], [1]] if i else [[0, 1]])
        assert shared.alike(table, [0.1, 0.1 + i])[0].table is parts[0].table
    assert len(shared.plan_of(table).alike) < 20


def test_fake_tensors_have_no_numbers_to_read_and_go_through_the_reference():
    table = torch.tensor([[0, 4, -1, 0, 0]])
    with FakeTensorMode() as fake:
        p, g, m, saved = (torch.zeros(n) for n in (4, 4, 4, 16))
        dirty, gate = flag(1), scalar(1.0)
    with fake:
        fake.allow_non_fake_inputs = True
        foreach.restore_sgd_([p], [g], [m], saved, dirty, table, gate, 0.1, 0.9, 0.0, False, False)
        assert foreach.grad_norm([g], [], table, None, 0.0, 2.0).shape == ()


@pytest.mark.parametrize("value", [1.0, 1 / 3, 0.7])
def test_rows_of_equal_numbers_add_up_as_the_docstring_says(value):
    """The roundings are the same in every row, so no two of them make up for each other: at most some twenty."""
    v = torch.full((64 * 5000 + 17,), value)
    table = torch.tensor([[0, v.numel(), -1, 0, 0]])
    exact = v.numel() * v[0].double().item() ** 2
    found = foreach.grad_norm([v], [], table, None, 0.0, 2.0).item()
    assert abs(found / exact - 1) <= 21 * arithmetic(v.dtype) + v.numel() * 2.0**-53


@pytest.mark.parametrize("size", [1e-25, 1e20])
def test_squares_beyond_float32_are_taken_in_float64(size):
    bucket = Bucket([Run((9000,))], torch.float32)
    (values,) = bucket.values()
    v = (values * size).float()
    expected = v.double().square().sum().item()
    found = foreach.grad_norm([v], [], bucket.table, None, 0.0, 2.0).item()
    assert found == pytest.approx(expected, rel=9000 * 2.0**-53, abs=0)


def test_pieces_of_whole_filters_are_about_as_large_as_a_piece():
    row = [0, 700 * 1000, 1000, 700, 5]
    t, x = torch.arange(800.0), torch.arange(700_000.0)
    found = list(shared.filter_pieces(row, t, x))
    assert torch.equal(torch.cat([each[0] for each in found]).flatten(), t[5:705])
    assert torch.equal(torch.cat([each[1].flatten() for each in found]), x)
    sizes = [each[1].numel() for each in found]
    assert max(sizes) <= shared.piece_size() < 2 * min(sizes[:-1])


@pytest.mark.parametrize("with_train", [True, False])
@pytest.mark.parametrize("form", ["list", "flat"])
def test_the_radius_s_gradient_is_that_of_the_formula_without_the_reference(form, with_train, monkeypatch):
    without_the_reference(monkeypatch)
    bucket = Bucket(LAYOUTS["several"], torch.float32)
    val, train, h, v = (bucket.values() for _ in range(4))
    given = [bucket.give(x, form) for x in (val, train, h, v)]
    given[1] = given[1] if with_train else []
    diagonal = foreach.rho_grad_diagonal(*given, [], bucket.table, None, 0.0, 2.0)
    secant = foreach.rho_grad_secant(*given, bucket.table)
    val, train, h, v = map(torch.cat, (val, train, h, v))
    outer = val - train if with_train else val
    for found, terms in ((diagonal, outer * h * h * v), (secant, outer * (h - v))):
        # Terms of float64: four roundings each, and those of the sum.
        bound = (4 + terms.numel()) * 2.0**-53 * terms.abs().sum().item()
        assert found.item() == pytest.approx(terms.sum().item(), rel=0, abs=bound)


def test_the_radius_s_gradient_along_another_norm_is_the_reference_s():
    bucket = Bucket(LAYOUTS["several"], torch.float32)
    given = [bucket.give(bucket.values(), "list") for _ in range(4)]
    ours, theirs = (ops.rho_grad_diagonal(*given, [], bucket.table, None, 0.0, 1.5) for ops in (foreach, reference))
    assert same_bits(ours, theirs)


@pytest.mark.parametrize("scale", ["plain", "element", "filter"])
def test_a_norm_has_the_same_bits_whatever_the_form_of_the_argument(scale):
    """Sums go by memory order in both forms; another order would round to the same now and then, but not every time."""
    for seed in range(20):
        found = []
        for form in ("list", "flat"):
            bucket = Bucket(LAYOUTS["channels-last"] + LAYOUTS["dense-permuted"], torch.float64, scale, seed=seed)
            vectors, thetas = bucket.give(bucket.values(), form), bucket.give(bucket.values(), form)
            found.append(foreach.grad_norm(vectors, thetas, bucket.table, bucket.norms(), 0.01, 2.0))
        assert same_bits(*found)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_at_a_learning_rate_of_zero_zeros_keep_their_sign(sign):
    """Where torch's fused steps would subtract a zero of some sign from one of the other."""
    table, zeros = torch.tensor([[0, 40, -1, 0, 0]]), torch.tensor([0.0, -0.0]).repeat(20)
    p, g, m, v, saved = torch.ones(40), *(torch.full((40,), x) for x in (sign, sign, 1.0)), torch.zeros(48)
    saved[:40] = zeros
    foreach.restore_sgd_([p], [g], [m], saved, flag(1), table, scalar(1.0), 0.0, 0.9, 0.0, False, False)
    assert same_bits(p, zeros) and torch.equal(m, torch.full((40,), 1.9 * sign))
    numbers = scalar(1.0), 0.0, 0.9, 0.99, 1e-8, 0.0
    for decoupled in (False, True):
        p = torch.ones(40)
        steps = [torch.tensor(3.0)]
        foreach.restore_adamw_([p], [g], [m], [v], steps, saved, flag(1), table, *numbers, decoupled, False)
        assert same_bits(p, zeros) and steps[0] == 4
