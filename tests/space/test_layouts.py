"""How lists of tensors lie: read in C through DLPack's functions, and by calls of Python, with the same answers."""

import array
import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lets_kernels import _C
from lets_kernels.ops import layouts, native
from lets_kernels.ops.layouts import _Plain, layout_of

LIKE = [(2, 3), (), (0, 4), (5,), (2, 1, 3)]


def tensors(dtype=torch.float32):
    return [torch.zeros(shape, dtype=dtype) for shape in LIKE]


def with_one(place, other):
    found = tensors()
    found[place] = other
    return found


FIT = {
    "others": tensors(),
    "parameters": [torch.nn.Parameter(t) for t in tensors()],
    "another-shape-of-the-same-strides": with_one(4, torch.zeros(2, 3, 1).as_strided((2, 1, 3), (3, 3, 1))),
    "views": [torch.zeros(64)[7:].as_strided(t.shape, t.stride()) for t in tensors()],
}
DO_NOT = {
    "transposed": with_one(0, torch.zeros(3, 2).T),
    "fewer-elements": with_one(3, torch.zeros(4)),
    "more-dimensions": with_one(1, torch.zeros(1)),
    "dtype": tensors(torch.bfloat16),
    "dtype-of-as-many-bits": with_one(3, torch.zeros(5, dtype=torch.int32)),
    "meta": [t.to("meta") for t in tensors()],
    "sparse": with_one(0, torch.zeros(2, 3).to_sparse()),
    "missing": with_one(3, None),
    "no-tensor": with_one(3, 3.0),
    "too-few": tensors()[:-1],
    "too-many": [*tensors(), torch.zeros(1)],
    "none": [],
}


def test_this_torch_lets_lists_be_read():
    """Otherwise everything works, too, and slower, so nothing else would say it."""
    assert _C.reads_lists() and type(layout_of(tensors())) is _C.Layout


@pytest.mark.parametrize("kind", [_C.Layout, _Plain], ids=["compiled", "plain"])
def test_what_lies_so_and_what_does_not(kind):
    layout = kind(tensors())
    for name, these in FIT.items():
        assert layout.addresses(these) is not None, name
    for name, these in DO_NOT.items():
        assert layout.addresses(these) is None, name


@pytest.mark.parametrize("kind", [_C.Layout, _Plain], ids=["compiled", "plain"])
def test_the_same_tensors_have_the_same_addresses_until_one_moves(kind):
    these = tensors()
    layout = kind(these)
    before = layout.addresses(these)
    assert before == layout.addresses(list(these)) != layout.addresses(tensors())
    these[3].data = torch.zeros(5)
    assert layout.addresses(these) not in (None, before)
    these[3].data = torch.zeros(6)
    assert layout.addresses(these) is None


def test_the_addresses_are_those_of_data_ptr():
    these = FIT["views"]
    expected = array.array("q", [t.data_ptr() for t in these])
    assert layout_of(these).addresses(these) == _C.addresses(these, 0) == expected.tobytes()
    assert _Plain(these).addresses(these) == tuple(expected)


def test_a_layout_without_memory_is_read_in_python():
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in tensors()]
    for these in (fake, DO_NOT["meta"]):
        layout = layout_of(these)
        assert type(layout) is _Plain
        assert layout.addresses(these) is not None and layout.addresses(tensors()[:-1]) is None
    assert layout_of(fake).addresses([fake[0].T, *fake[1:]]) is None


def test_without_the_library_layouts_are_read_in_python(monkeypatch):
    monkeypatch.setattr(layouts, "_compiled", lambda: None)
    assert type(layout_of(tensors())) is _Plain


def test_tensors_whose_memory_was_given_back_have_no_address():
    these = [torch.zeros(4) for _ in range(5)]
    these[2].untyped_storage().resize_(0)
    assert _C.addresses(these, native._LEAST_ADDRESS) is None
    assert native.pack(these, torch.tensor(0)) is these  # the op then says what is wrong
    these[2] = torch.zeros(0)
    assert _C.addresses(these, native._LEAST_ADDRESS) is not None


@pytest.mark.parametrize("reads", [True, False])
def test_a_packed_list_is_the_same_however_it_was_read(monkeypatch, reads):
    these = [torch.full((3,), float(i)) for i in range(6)]
    monkeypatch.setattr(native, "_READS", reads)
    packed = native.pack(these, torch.tensor(0))
    assert packed[0].tolist()[3:] == [t.data_ptr() for t in these]
    assert packed.tensors is these


def test_every_pair_of_dtypes_is_told_apart():
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for one, other in itertools.product(dtypes, dtypes):
        assert (layout_of(tensors(one)).addresses(tensors(other)) is not None) is (one is other)


@pytest.mark.parametrize("kind", [_C.Layout, _Plain], ids=["compiled", "plain"])
def test_gradients_come_with_their_addresses_where_all_lie_as_the_parameters(kind):
    params = [torch.nn.Parameter(t) for t in tensors()]
    layout = kind(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    grads, addresses = layout.gradients(params)
    assert all(g is p.grad for g, p in zip(grads, params, strict=True))
    assert addresses == layout.addresses(grads) is not None
    other = {
        "negated": (0, torch._neg_view(torch.zeros(2, 3))),
        "transposed": (0, torch.zeros(3, 2).T),
        "missing": (3, None),
        "sparse": (0, torch.zeros(2, 3).to_sparse()),
    }
    for name, (place, grad) in other.items():
        before, params[place].grad = params[place].grad, grad
        grads, addresses = layout.gradients(params)
        assert addresses is None, name
        assert all(g is p.grad for g, p in zip(grads, params, strict=True)), name
        params[place].grad = before
    assert layout.gradients(params)[1] is not None
    assert layout.gradients(params[:-1])[1] is None


@pytest.fixture(params=["compiled", "plain"])
def either(request, monkeypatch):
    """The functions of ``layouts``, by either way."""
    if request.param == "plain":
        monkeypatch.setattr(layouts, "_compiled", lambda: None)
    return layouts


def test_the_gradients_of_what_is_trained(either):
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    params[0].grad = params[2].grad = torch.ones(2)
    assert [g is params[0].grad for g in either.gradients(params)] == [True, True]
    params[2].requires_grad_(False)
    assert len(either.gradients(params)) == 1 and either.gradients([]) == []


def test_parameters_that_are_no_longer_the_known_ones(either):
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    known, trained = list(params), [True] * 3
    assert either.unchanged(params, known, trained)
    assert not either.unchanged(params[:2], known, trained) and not either.unchanged(params[::-1], known, trained)
    params[1].requires_grad_(False)
    assert not either.unchanged(params, known, trained) and either.unchanged(params, known, [True, False, True])


def test_a_state_that_holds_other_objects(either):
    a, b = torch.zeros(2), torch.zeros(2)
    state = {"p": {"m": a}, "q": {}, "r": {"m": b, "n": a}}
    assert either.held(state, "m") == [a, None, b] and either.holds(state, "m", [a, None, b])
    for known in ([a, None, a], [a, b, b], [a, None], [a, None, b, None]):
        assert not either.holds(state, "m", known)
    state["q"]["m"] = b
    assert not either.holds(state, "m", [a, None, b])


def test_a_mark_is_the_version_and_only_of_plain_gradients(either):
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(4)]
    grads = params[0].grad, params[1].grad, params[3].grad = torch.zeros(2), torch.zeros(2).add_(1), torch.zeros(2)
    params[3].requires_grad_(False)
    assert either.mark_gradients(params, "_seen_here")
    assert [g._seen_here for g in grads[:2]] == [0, 1] and not hasattr(grads[2], "_seen_here")
    params[2].grad = torch.nn.Parameter(torch.zeros(2))  # a class of its own, as a DTensor is
    assert not either.mark_gradients(params, "_seen_here") and not hasattr(params[2].grad, "_seen_here")


def test_packed_addresses_are_written_again_only_where_nobody_holds_them():
    made = []

    def make(number, addresses):
        made.append(native._table(number, addresses))
        return made[-1]

    words = _C.Words(make)
    one, two, three = (array.array("q", [x] * 5).tobytes() for x in (1 << 40, 1 << 41, 1 << 42))
    held = words.of(0, one, 0)
    assert words.of(0, one, 0) is held and held.tolist()[2:] == [0, *[1 << 40] * 5]
    other = words.of(0, two, 0)
    assert other is not held and len(made) == 2 and words.of(1, one, 0) is not held and len(made) == 3
    place = other.data_ptr()
    made.clear()
    del other
    again = words.of(0, three, 0)  # in the tensor of two, which nobody holds
    assert not made and again.data_ptr() == place and again.tolist()[3:] == [1 << 42] * 5
    assert held.tolist()[3:] == [1 << 40] * 5
    assert words.of(0, two, 1 << 42) is None


def test_a_list_is_packed_by_the_addresses_that_were_read_already():
    these = tensors()
    del these[2]  # the one without elements
    addresses = layout_of(these).addresses(these)
    packed = native.pack(these, torch.tensor(0), addresses)
    assert packed[0] is native.pack(these, torch.tensor(0))[0] and packed.tensors is these
    assert packed[0].tolist()[3:] == [t.data_ptr() for t in these]
    these[1].untyped_storage().resize_(0)
    assert native.pack(these, torch.tensor(0), layout_of(these).addresses(these)) is these
