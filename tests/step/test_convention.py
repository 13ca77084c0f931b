"""Whose the gradients are that lie there before ``step(closure)``: told by what the closure does, or said aloud."""

import copy
import functools
import gc
import warnings
import weakref

import pytest
import torch

import lets_kernels as lk
from support import family
from support.conv_net import Task
from support.given_gradients import snapshot, weights
from support.guard_bands import same_bits
from support.inside import held
from support.spawned_ranks import spawn

ZEROING = (
    *("optimizer", "base", "module", "in-place", "module-in-place", "none", "after-the-forward", "in-a-function"),
    *("by-hand", "through-data", "through-numpy", "other-data"),
)


def other_data(p):
    p.grad.data = torch.zeros_like(p.grad)


BY_HAND = {
    "by-hand": lambda p: p.grad.zero_(),
    "through-data": lambda p: p.grad.data.zero_(),
    "through-numpy": lambda p: p.grad.numpy().fill(0.0),
    "other-data": other_data,
}


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error", lk.ClosureWarning)
        yield


def built(task, backend, base=torch.optim.SGD, **options):
    options = {"rho": 0.1, "lr": 0.1, "backend": backend.name, **options}
    return lk.SAM(task.net.parameters(), base, **options)


def zero(task, opt, how):
    if how == "optimizer":
        opt.zero_grad()
    elif how == "base":
        opt.base_optimizer.zero_grad()
    elif how == "in-place":
        opt.zero_grad(set_to_none=False)
    elif how == "module-in-place":
        task.net.zero_grad(set_to_none=False)
    elif how == "none":
        for p in task.net.parameters():
            p.grad = None
    elif how in BY_HAND:
        for p in (p for p in task.net.parameters() if p.grad is not None):
            BY_HAND[how](p)
    else:
        task.net.zero_grad()


def zeroing(task, opt, batch, how="optimizer", calls=None):
    """A closure that zeroes, in one of the ways there are."""

    def clear():
        zero(task, opt, how)

    def run():
        if calls is not None:
            calls.append(batch)
        if how == "after-the-forward":
            loss = task.loss(batch)
            opt.zero_grad()
        else:
            clear()
            loss = task.loss(batch)
        loss.backward()
        return loss

    return run


def adding(task, batch, calls=None):
    """A closure that does not zero."""

    def run():
        if calls is not None:
            calls.append(batch)
        loss = task.loss(batch)
        loss.backward()
        return loss

    return run


def expected(task_of, backend, steps, base=torch.optim.SGD):
    """What the steps lead to where nothing lies in anyone's way."""
    task = task_of()
    opt = built(task, backend, base)
    for batch, _ in task.batches[:steps]:
        opt.step(zeroing(task, opt, batch))
    return snapshot(opt)


def a_backward_by_others(task, batch):
    """As for an adversarial input, or the other network of a GAN."""
    (task.loss(batch) * 3).backward()


@pytest.mark.parametrize("how", ZEROING)
@pytest.mark.parametrize("left_by", ["others", "plain-steps", "both"])
def test_a_closure_that_zeroes_is_called_for_every_gradient_whatever_lay_there(backend, how, left_by):
    task_of = functools.partial(Task, torch.float32, steps=4)
    task = task_of()
    opt, other = built(task, backend), task.batches[-1][0]
    for batch, _ in task.batches[:3]:
        if left_by != "others":
            kept = [p.detach().clone() for p in task.net.parameters()]
            a_backward_by_others(task, other)
            opt.base_optimizer.step()
            with torch.no_grad():
                for p, old in zip(task.net.parameters(), kept, strict=True):
                    p.copy_(old)
        if left_by != "plain-steps":
            a_backward_by_others(task, other)
        calls, loss = [], task.loss(batch).item()
        assert opt.step(zeroing(task, opt, batch, how, calls)).item() == loss
        assert calls == [batch, batch]
    assert same_bits(snapshot(opt), expected(task_of, backend, 3))
    assert opt.metrics()["gradients"] == 6


def test_plain_steps_between_leave_no_stale_gradient(backend):
    """Two of three steps are the base optimizer's own, and the closure of the third zeroes first."""
    task = Task(torch.float64, steps=9)
    opt, theta = built(task, backend), task.weights()
    loss = task.functional()
    for i, (batch, _) in enumerate(task.batches):
        calls = []
        g = torch.autograd.grad(loss(with_grad(theta), batch), list(theta.values()))
        if i % 3 < 2:
            task.net.zero_grad()
            task.loss(batch).backward()
            opt.base_optimizer.step()
        else:
            assert opt.step(zeroing(task, opt, batch, calls=calls)) is not None
            assert len(calls) == 2
            norm = torch.stack([x.square().sum() for x in g]).sum().sqrt()
            moved = {k: (v.detach() + 0.1 * x / norm) for (k, v), x in zip(theta.items(), g, strict=True)}
            g = torch.autograd.grad(loss(with_grad(moved), batch), list(moved.values()))
        theta = {k: (v.detach() - 0.1 * x) for (k, v), x in zip(theta.items(), g, strict=True)}
    for name, p in task.net.named_parameters():
        torch.testing.assert_close(p.detach(), theta[name], rtol=0, atol=1e-12)  # nine steps of float64


def with_grad(theta):
    for x in theta.values():
        x.requires_grad_(True)
    return theta


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_the_older_convention_calls_the_closure_once_a_step_from_the_first_on(backend, base, in_place):
    task_of = functools.partial(Task, torch.float32, steps=4)
    task = task_of()
    opt = built(task, backend, base)
    for batch, _ in task.batches:
        calls = []
        task.loss(batch).backward()
        assert opt.step(adding(task, batch, calls)) is None
        assert calls == [batch]
        opt.zero_grad(set_to_none=not in_place)
    assert same_bits(snapshot(opt), expected(task_of, backend, 4, base))
    assert opt.metrics()["gradients"] == 8


def test_the_older_convention_keeps_parameters_without_gradients_out_of_the_step(backend):
    """The zeros by which a closure is watched must not become gradients: a weight decay would act on them."""
    used, unused = (torch.nn.Parameter(torch.full((3,), 2.0)) for _ in range(2))
    opt = lk.SAM([used, unused], torch.optim.SGD, backend=backend.name, lr=0.1, weight_decay=0.5)
    unused.grad = torch.ones(3)  # the first pass reaches it, the second does not
    used.square().sum().backward()
    opt.step(lambda: used.square().sum().backward())
    assert unused.tolist() == [2.0] * 3
    assert unused.grad is None


def test_one_who_only_looks_like_zeroing_is_found_out(backend):
    """The closure zeroes somebody else's gradients: those before it are the caller's, and each step is right."""
    task_of = functools.partial(Task, torch.float32, steps=3)
    task, other = task_of(), torch.nn.Linear(2, 2)
    opt, counts = built(task, backend), []
    for batch, _ in task.batches:
        calls = []
        task.loss(batch).backward()
        inner = adding(task, batch, calls)

        def closure(inner=inner):
            other.zero_grad()
            return inner()

        assert opt.step(closure) is None
        counts.append(len(calls))
        opt.zero_grad()
    assert counts == [2, 1, 1]  # found out once
    assert same_bits(snapshot(opt), expected(task_of, backend, 3))
    assert opt.metrics()["gradients"] == 7


def test_one_who_zeroes_out_of_sight_is_found_out(backend):
    """What the closure calls cannot be read; the step that finds out is taken once more from its beginning."""
    task_of = functools.partial(Task, torch.float32, steps=3)
    task = task_of()
    opt, counts = built(task, backend), []
    hidden = {"clear": task.net.zero_grad}
    for batch, _ in task.batches:
        calls = []
        a_backward_by_others(task, batch)
        inner = adding(task, batch, calls)

        def closure(inner=inner):
            hidden["clear"]()
            return inner()

        loss = task.loss(batch).item()
        assert opt.step(closure).item() == loss
        counts.append(len(calls))
    assert counts == [3, 2, 2]
    assert same_bits(snapshot(opt), expected(task_of, backend, 3))


@pytest.mark.parametrize("who", ["base", "module"])
def test_zeros_that_were_left_outside_are_no_first_gradient(backend, who):
    """After a warm-up with zero_grad(set_to_none=False) outside the closure no step may be plain SGD."""
    task_of = functools.partial(Task, torch.float32, steps=5)
    task, plain = task_of(), task_of()
    opt, reference = built(task, backend), built(plain, backend)
    for i, (batch, _) in enumerate(task.batches):
        (opt.base_optimizer if who == "base" else task.net).zero_grad(set_to_none=False)
        calls = []
        if i < 2:
            task.loss(batch).backward()
            opt.base_optimizer.step()
            plain.net.zero_grad()
            plain.loss(batch).backward()
            reference.base_optimizer.step()
        else:
            assert opt.step(adding(task, batch, calls)) is not None
            assert len(calls) == 2
            reference.step(zeroing(plain, reference, batch))
    assert same_bits(snapshot(opt), snapshot(reference))


def test_what_is_ambiguous_is_said_once_and_the_closure_makes_every_gradient(backend):
    task_of = functools.partial(Task, torch.float32, steps=4)
    task = task_of()
    opt, warned = built(task, backend), []
    for batch, _ in task.batches:
        calls = []
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            assert opt.step(adding(task, batch, calls)) is not None
        warned += [w for w in found if w.category is lk.ClosureWarning]
        assert len(calls) == 2
        task.loss(batch).backward()  # by whom?
    assert len(warned) == 1
    assert "first_backward=True" in str(warned[0].message)
    assert "first_backward=False" in str(warned[0].message)
    assert warned[0].filename == __file__
    assert same_bits(snapshot(opt), expected(task_of, backend, 4))


@pytest.mark.parametrize("zeroes", [False, True])
def test_said_aloud_it_holds_whatever_the_closure_does(backend, zeroes):
    for caller in (True, False):
        task_of = functools.partial(Task, torch.float32, steps=3)
        task = task_of()
        opt = built(task, backend)
        for i, (batch, _) in enumerate(task.batches):
            calls = []
            (task.loss(batch) if caller else 3 * task.loss(task.batches[i - 1][0])).backward()
            make = zeroing(task, opt, batch, calls=calls) if zeroes else adding(task, batch, calls)
            opt.step(make, first_backward=caller)
            assert len(calls) == (1 if caller else 2)
            opt.zero_grad()
        assert same_bits(snapshot(opt), expected(task_of, backend, 3))


def test_saying_what_cannot_be_is_refused(backend):
    task = Task(torch.float32, steps=1)
    batch = task.batches[0][0]
    opt = built(task, backend)
    with pytest.raises(RuntimeError, match="no new gradient: call backward"):
        opt.step(adding(task, batch), first_backward=True)
    opt.step(zeroing(task, opt, batch))
    assert all(p.grad is not None for p in task.net.parameters())
    with pytest.raises(RuntimeError, match="no new gradient"):  # those of the last step are there
        opt.step(adding(task, batch), first_backward=True)
    task.loss(batch).backward()
    with pytest.raises(ValueError, match="a list makes every gradient itself"):
        opt.step([adding(task, batch)], first_backward=True)
    random = lk.RandomSAM(task.net.parameters(), torch.optim.SGD, lr=0.1, backend=backend.name)
    with pytest.raises(ValueError, match="has no first pass"):
        random.step(adding(task, batch), first_backward=True)
    chosen = lk.ESAM(task.net.parameters(), torch.optim.SGD, lr=0.1, backend=backend.name)
    with pytest.raises(ValueError, match="let step\\(closure\\) call the closure for the first pass"):
        chosen.step(lambda subset=None: None, first_backward=True)


def test_closures_that_return_the_losses_of_samples_make_every_gradient(backend):
    ends = []
    for left in (False, True):
        task = Task(torch.float32, steps=2)
        opt = lk.ESAM(task.net.parameters(), torch.optim.SGD, lr=0.1, backend=backend.name, seed=1)
        for (x, y), _ in task.batches:
            if left:
                a_backward_by_others(task, (x, y))

            def closure(subset=None, x=x, y=y):
                chosen = slice(None) if subset is None else subset
                return torch.nn.functional.cross_entropy(task.net(x[chosen]), y[chosen], reduction="none")

            assert opt.step(closure).shape == y.shape
        ends.append(snapshot(opt))
    assert same_bits(*ends)


def test_the_gradients_that_a_copy_takes_along_are_no_new_ones(backend):
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    opt = lk.SAM([x], torch.optim.SGD, rho=0.1, lr=0.1, backend=backend.name)
    opt.step(lambda: (x**2).sum().backward())
    y, twin = copy.deepcopy((x, opt))
    calls = []

    def closure_of(x):
        def closure():
            calls.append(x)
            loss = (x**2).sum()
            loss.backward()
            return loss

        return closure

    for each, o in ((x, opt), (y, twin)):
        o.step(closure_of(each))
    assert len(calls) == 4
    assert same_bits(x.detach(), y.detach())


@pytest.mark.parametrize("kind", ["partial", "method", "object", "lambda"])
def test_closures_of_every_kind_are_told_apart(backend, kind):
    task = Task(torch.float32, steps=3)
    opt = built(task, backend)

    class Holder:
        def __init__(self, batch):
            self.batch = batch

        def run(self):
            opt.zero_grad()
            loss = task.loss(self.batch)
            loss.backward()
            return loss

        __call__ = run

    def of(batch):
        opt.zero_grad()
        loss = task.loss(batch)
        loss.backward()
        return loss

    for batch, _ in task.batches:
        a_backward_by_others(task, batch)
        holder = Holder(batch)
        closure = {
            "partial": functools.partial(of, batch),
            "method": holder.run,
            "object": holder,
            "lambda": lambda batch=batch: of(batch),
        }[kind]
        before = opt.metrics()["gradients"].item()
        assert opt.step(closure) is not None
        assert opt.metrics()["gradients"].item() == before + 2


def test_nothing_of_the_closures_is_kept_alive(backend):
    task = Task(torch.float32, steps=1)
    opt, batch = built(task, backend), task.batches[0][0]
    a_backward_by_others(task, batch)
    closure = zeroing(task, opt, batch)
    opt.step(closure)
    assert not any(p._post_accumulate_grad_hooks for p in task.net.parameters())
    known = weakref.ref(closure)
    del closure
    gc.collect()
    assert known() is None


@pytest.mark.parametrize("where", ["first", "second"])
def test_a_closure_that_fails_while_it_is_watched_leaves_nothing_behind(backend, where):
    task = Task(torch.float32, steps=1)
    batch = task.batches[0][0]
    opt, before = built(task, backend), task.bits()
    a_backward_by_others(task, batch)
    calls = []

    def closure():
        if where == "first":
            opt.zero_grad()
        calls.append(1)
        raise KeyError("no more data")

    with pytest.raises(KeyError, match="no more data"):
        opt.step(closure)
    assert same_bits(task.bits(), before)
    assert all(not p._post_accumulate_grad_hooks for p in task.net.parameters())
    assert opt.step(adding(task, batch)) is not None, "what a failed pass left is no first gradient"


@pytest.mark.parametrize("learns", [{}, {"metric": "gap", "reuse_train_gradient": True}, {"validation": "next"}])
def test_a_learned_radius_too(backend, learns):
    ends = []
    for left in (False, True):
        task = Task(torch.float32, steps=4)
        opt = built(task, backend, rho=lk.LearnedRadius(0.1, **learns))
        for batch, val_batch in task.batches:
            if left:
                a_backward_by_others(task, val_batch)
            closures = [zeroing(task, opt, batch)]
            if opt.radius.learns:
                closures.append(zeroing(task, opt, val_batch))
            assert opt.step(*closures) is not None
        ends.append(snapshot(opt))
    assert same_bits(*ends)


def clipping(task, batch, calls):
    """Writes to gradients after the backward."""
    inner = adding(task, batch, calls)

    def closure():
        loss = inner()
        torch.nn.utils.clip_grad_norm_(task.net.parameters(), 0.1)
        return loss

    return closure


def with_a_graph(task, batch, calls):
    """Adds to gradients out of place, as create_graph=True does."""

    def closure():
        calls.append(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            task.loss(batch).backward(create_graph=True)

    return closure


@pytest.mark.parametrize("made", [clipping, with_a_graph])
def test_neither_clipping_nor_a_graph_of_the_backward_is_zeroing(backend, made):
    task = Task(torch.float32, steps=3)
    opt, counts = built(task, backend), []
    for batch, _ in task.batches:
        calls = []
        closure = made(task, batch, calls)
        task.loss(batch).backward()
        assert opt.step(closure) is None
        counts.append(len(calls))
        opt.zero_grad()
    assert counts == [1, 1, 1]


def test_the_callers_gradient_is_kept_while_it_is_found_out_whose_it_is(backend):
    """Another batch than the closure's: it is the caller's along which the weights are perturbed."""
    ends = []
    for said in (None, True):
        task, other = Task(torch.float32, steps=2), torch.nn.Linear(2, 2)
        opt = built(task, backend)
        for batch, other_batch in task.batches:
            inner = adding(task, batch)

            def closure(inner=inner):
                other.zero_grad()
                return inner()

            task.loss(other_batch).backward()
            assert opt.step(closure, first_backward=said) is None
            opt.zero_grad()
        ends.append(snapshot(opt))
    assert same_bits(*ends)


@pytest.mark.parametrize("shape", ["closure", "two-steps"])
def test_a_first_pass_of_a_step_that_was_refused_counts_for_no_other(backend, shape):
    a, b = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    opt, calls = lk.SAM([a, b], torch.optim.SGD, rho=0.1, lr=0.1, backend=backend.name), []

    def closure():
        opt.zero_grad()
        loss = (a**2).sum() + (b**2).sum()
        loss.backward()
        calls.append(1)
        return loss

    old, b.data = b.data, a.data
    if shape == "closure":
        with pytest.raises(ValueError, match="share memory"):
            opt.step(closure)
    else:
        with opt.first_pass():
            closure()
        with pytest.raises(ValueError, match="share memory"):
            opt.first_step()
    b.data = old.clone()
    (7 * (a.sum() - b.sum())).backward()
    calls.clear()
    assert opt.step(closure).item() == 6
    assert len(calls) == 2


# ---- what is not undone, what looks the same, what is seen of gradients


def hidden_zeroing(task, batch, calls):
    """Nobody can read from its code that it zeroes."""
    hidden = {"clear": task.net.zero_grad}

    def run():
        calls.append(1)
        hidden["clear"]()
        loss = task.loss(batch)
        loss.backward()
        return loss

    return run


@pytest.mark.parametrize("name", [n for n in family.FAMILY if n not in family.PER_SAMPLE])
def test_a_wrong_guess_leaves_no_trace_in_any_method(name):
    """Averages, masks, decisions: nothing has counted the stranger's gradient."""
    ends = []
    for left in (False, True):
        task = Task(torch.float32, steps=5)
        opt = family.build(name, task)
        for batch, _ in task.batches:
            calls = []
            if left:
                a_backward_by_others(task, batch)
                for p in task.net.parameters():
                    p.grad.mul_(torch.linspace(-3, 3, p.numel()).view_as(p))
            assert opt.step(hidden_zeroing(task, batch, calls)) is not None
            assert calls
        ends.append([*snapshot(opt), *(t for own in held(opt).values() for t in own.values())])
    assert same_bits(*ends)


@pytest.mark.parametrize("options", [{"reuse_train_gradient": True, "metric": "gap"}, {"validation": "next"}])
def test_a_radius_that_waits_does_not_learn_from_a_stranger(backend, options):
    ends = []
    for left in (False, True):
        task = Task(torch.float32, steps=4)
        opt = built(task, backend, rho=lk.LearnedRadius(0.1, curvature="secant", **options))
        for i, (batch, val_batch) in enumerate(task.batches):
            if i == 2:
                opt.load_state_dict(copy.deepcopy(opt.state_dict()))  # forgets what closures do
            if left and i >= 2:
                a_backward_by_others(task, val_batch)
            closures = [hidden_zeroing(task, batch, [])]
            opt.step(*closures, *([zeroing(task, opt, val_batch)] if opt.radius.learns else []))
        ends.append(snapshot(opt))
    assert same_bits(*ends)


def test_closures_that_share_their_outer_code_are_told_apart(backend):
    task = Task(torch.float32, steps=6)
    opt, flag = built(task, backend), {"zero": False}
    twin = Task(torch.float32, steps=6)
    expecting = built(twin, backend)

    class Both:
        def __init__(self, batch):
            self.batch = batch

        def __call__(self):
            if flag["zero"]:
                flag["clear"]()
            loss = task.loss(self.batch)
            loss.backward()
            return loss

    flag["clear"] = task.net.zero_grad
    for i, (batch, other) in enumerate(task.batches):
        flag["zero"] = i >= 3
        opt.zero_grad()
        (task.loss(batch) if i < 3 else 100 * task.loss(other)).backward()
        assert (opt.step(Both(batch)) is None) == (i < 3)
        expecting.step(zeroing(twin, expecting, batch))
    assert same_bits(snapshot(opt), snapshot(expecting))


@pytest.mark.parametrize("wrapper", [torch.enable_grad(), functools.partial(torch.compile, backend="eager")])
def test_what_is_wrapped_is_told_apart(backend, wrapper):
    task = Task(torch.float32, steps=4)
    opt, calls = built(task, backend), []
    for i, (batch, other) in enumerate(task.batches):
        inner = adding(task, batch) if i < 2 else zeroing(task, opt, batch)
        calls.append(wrapper(inner))
        opt.zero_grad()
        (task.loss(batch) if i < 2 else 100 * task.loss(other)).backward()
        assert (opt.step(calls[-1]) is None) == (i < 2)


def test_planted_zeros_do_not_become_gradients_where_a_closure_touches_all_of_them(backend):
    """A parameter that the second pass does not reach is not stepped, though the closure scales every gradient."""
    ends = []
    for said in (None, True):
        p, q = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(1))
        opt = lk.SAM([p, q], torch.optim.AdamW, lr=0.1, backend=backend.name)

        def closure(p=p, q=q):
            loss = p.square().sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p, q], 1.0)

        (p.square().sum() + q.sum()).backward()
        opt.step(closure, first_backward=said)
        assert q.item() == 1.0
        assert q not in opt.state
        ends.append(snapshot(opt))
    assert same_bits(*ends)


def test_a_pass_too_many_is_not_counted_in_running_statistics(backend):
    net, other = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)), torch.nn.Linear(2, 2)
    opt = lk.SAM(net.parameters(), torch.optim.SGD, lr=0.1, model=net, backend=backend.name)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))

    def closure():
        other.zero_grad()
        net(x).square().sum().backward()

    for _ in range(3):
        net(x).square().sum().backward()
        assert opt.step(closure) is None
        opt.zero_grad()
    assert net[1].num_batches_tracked == 3


def test_a_closure_that_assigns_its_gradients_makes_all_of_them(backend):
    """torch.autograd.grad runs hooks of the parameters and adds nothing; what it gives replaces what lay there."""
    task_of = functools.partial(Task, torch.float32, steps=3)
    task = task_of()
    opt, params = built(task, backend), list(task.net.parameters())
    for batch, other in task.batches:
        opt.zero_grad()
        a_backward_by_others(task, other)

        def closure(batch=batch):
            loss = task.loss(batch)
            for p, g in zip(params, torch.autograd.grad(loss, params), strict=True):
                p.grad = g
            return loss

        assert opt.step(closure) is not None
    assert same_bits(snapshot(opt), expected(task_of, backend, 3))


def test_gradients_written_by_hand_are_gradients(backend):
    """As torch.func's are, and those of kernels that add to p.grad by themselves."""
    ends = []
    for said in (None, True):
        params = [torch.nn.Parameter(torch.linspace(1, 2, n)) for n in (1, 3, 5)]
        opt = lk.SAM(params, torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9, backend=backend.name)

        @torch.no_grad()
        def fill(params=params):
            for p in params:
                p.grad = 2 * p if p.grad is None else p.grad.add_(2 * p)

        for _ in range(3):
            opt.zero_grad()
            fill()
            assert opt.step(fill, first_backward=said) is None
        ends.append(snapshot(opt))
        assert all(bool((p < torch.linspace(1, 2, p.numel())).all()) for p in params)
    assert same_bits(*ends)


def test_under_a_scaler_a_strangers_gradient_is_not_unscaled(backend):
    task_of = functools.partial(Task, torch.float32, steps=2)
    task = task_of()
    opt, scaler = built(task, backend), torch.amp.GradScaler("cpu", init_scale=1024.0)
    for batch, other in task.batches:
        opt.zero_grad()
        (100 * task.loss(other)).backward()

        def closure(batch=batch):
            for p in task.net.parameters():
                p.grad = None
            loss = task.loss(batch)
            scaler.scale(loss).backward()
            return loss

        assert opt.step(closure, scaler=scaler) is not None
        scaler.update()
    assert scaler.get_scale() == 1024
    assert same_bits(snapshot(opt), expected(task_of, backend, 2))


def test_gradients_of_another_dtype_than_the_parameters(backend):
    if not hasattr(torch.Tensor, "grad_dtype"):
        assert torch.__version__ < "2.12"
        return
    ends = []
    for said in (None, True):
        p = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        p.grad_dtype = torch.float32
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opt = lk.SAM([p], torch.optim.SGD, lr=0.1, backend=backend.name)
            p.square().sum().backward()
            opt.step(lambda p=p: p.square().sum().backward(), first_backward=said)
        ends.append(p.detach().clone())
    assert same_bits(*ends)
    assert (ends[0] < 1).all()


def _unused(rank, view, said):
    torch.manual_seed(0)
    task = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4), "b": torch.nn.Linear(4, 1)})
    e = torch.nn.Parameter(torch.ones(1))
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(rank))

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.parts, self.e = task, e

        def forward(self, x, use):
            h = self.parts["a"](x)
            return self.parts["b"](h * self.e if use else h)

    model = torch.nn.parallel.DistributedDataParallel(Net(), find_unused_parameters=True, gradient_as_bucket_view=view)
    opt = lk.SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.3, model=model)

    def closure():
        model(x, rank == 0).square().mean().backward()

    for _ in range(3):
        opt.zero_grad()
        closure()
        opt.step(closure, first_backward=said)
    return weights(model)


@pytest.mark.parametrize("view", [False, True])
def test_ranks_agree_though_each_reaches_other_parameters(view, tmp_path):
    found = {}
    for said in (None, True):
        (tmp_path / str(said)).mkdir()
        found[said] = spawn(_unused, 2, tmp_path / str(said), view, said)
    assert same_bits(found[None][0], found[None][1])
    for a, b in zip(found[None][0], found[True][0], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_first_pass_without_a_loss_counts_for_no_other_step(backend):
    """Refused between the two passes: what lies there afterwards is not the first gradient of the next step."""
    task = Task(torch.float32, steps=2)
    opt = lk.LETSSAM(task.net.parameters(), torch.optim.SGD, lr=0.1, backend=backend.name)
    batch, val_batch = task.batches[0]
    with pytest.raises(ValueError, match="closure must return the loss"):
        opt.step(lambda: task.loss(batch).backward(), zeroing(task, opt, val_batch))
    opt.base_optimizer.zero_grad()
    a_backward_by_others(task, val_batch)
    calls, loss = [], task.loss(batch).item()
    assert opt.step(zeroing(task, opt, batch, calls=calls), zeroing(task, opt, val_batch)).item() == loss
    assert len(calls) == 3


def test_a_first_pass_before_a_state_was_loaded_counts_for_no_step(backend):
    """What went on is forgotten together with the state that it went on from: a closure that adds makes both passes."""
    ends = []
    for interrupted in (True, False):
        p, calls = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0])), []
        opt = lk.SAM([p], torch.optim.SGD, rho=0.1, lr=0.1, backend=backend.name)

        def adding(p=p, calls=calls):
            loss = (p**4).sum()
            loss.backward()
            calls.append(1)
            return loss

        if interrupted:
            with opt.first_pass():
                adding()
            opt.load_state_dict(opt.state_dict())
            p.grad = None
            calls.clear()
        opt.step(adding)
        ends.append((p.detach(), len(calls)))
    assert same_bits(ends[0][0], ends[1][0]) and ends[0][1] == ends[1][1] >= 2
