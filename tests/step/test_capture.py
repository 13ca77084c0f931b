"""What cannot be captured in a CUDA graph says so, and what is captured keeps its memory; here without a GPU too."""

import contextlib
import copy
import gc
import weakref

import pytest
import torch

import lets_kernels as lk
from support.accelerator import BACKENDS, DEVICE, DRY, needs_gpu
from support.given_gradients import Toy, weights
from support.guard_bands import same_bits
from support.inside import progress, space, work
from support.moving_radii import following


class Alternating(lk.Schedule):
    def perturbs(self, step):
        return step % 2 == 0


REFUSED = {
    "random-schedule": ({"schedule": lk.Bernoulli(0.5)}, "Bernoulli decides on the host.*schedule=Always"),
    "norm-schedule": ({"schedule": lk.NormThreshold(10)}, "NormThreshold decides on the host.*schedule=Always"),
    "mask": ({"direction": lk.Masked(interval=2)}, "interval=2: the host decides whether the mask"),
    "tensors": ({"direction": lk.Dropped(granularity="tensor")}, "granularity='tensor' draws on the host"),
    "schedule": ({"schedule": Alternating()}, "Alternating decides on the host.*schedule=Always"),
    "scheduled-radius": ({"rho": lk.ScheduledRadius.linear(0.2, 0.1, 9)}, "ScheduledRadius computes rho on the host"),
    "next": ({"rho": following}, "learns at the beginning of a step"),
    "warmup": ({"rho_warmup": 9}, "rho still rises over the first 9 steps.*take 9 steps before"),
    "interval": ({"rho": lambda: lk.LearnedRadius(0.1, interval=2)}, "interval=2"),
    "reuse": ({"rho": lambda: lk.LearnedRadius(0.1, reuse_train_gradient=True)}, "learns at the beginning of a step"),
}


class Pretended:
    """Says that the stream is being captured, so that what refuses that can be seen to do so on the CPU."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch

    @contextlib.contextmanager
    def capture(self):
        with self.monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_initialized", lambda: True)
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            yield


class Real:
    """Captures on the current GPU."""

    def capture(self):
        return torch.cuda.graph(torch.cuda.CUDAGraph())


@pytest.fixture(params=["pretended", *(pytest.param(name, marks=needs_gpu) for name in BACKENDS)])
def where(request, monkeypatch):
    """(how to capture, device, backend)."""
    if request.param == "pretended":
        return Pretended(monkeypatch), "cpu", "auto"
    return Pretended(monkeypatch) if DRY else Real(), DEVICE, request.param


def small(device, backend, steps=2, base=torch.optim.SGD, **options):
    """An optimizer after some steps, and what takes another; its gradients stay where they are."""
    toy = Toy(device=device)
    rho = options.pop("rho", 0.1)
    rho = rho() if callable(rho) else rho
    base_options = {"lr": 0.1, **({"momentum": 0.9} if base is torch.optim.SGD else {})}
    opt = lk.SAM(toy.params, base, rho, backend=backend, **base_options, **options)
    first, second, loss = toy.grads(0), toy.grads(1), torch.ones((), device=device)
    toy.set_grads(first)

    def step():
        for p, g in zip(toy.params, first, strict=True):
            p.grad.copy_(g)
        opt.first_step(loss=loss)
        for p, g in zip(toy.params, second, strict=True):
            p.grad.copy_(g)
        opt.second_step()
        if opt.radius.learns:
            opt.radius_step(lambda: loss, lambda: loss)

    for _ in range(steps):
        step()
    return toy, opt, step


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_host_decides_step_by_step_cannot_be_captured(where, case):
    how, device, backend = where
    options, message = REFUSED[case]
    toy, opt, step = small(device, backend, **options)
    before = weights(toy)
    said = f"cannot be captured in a CUDA graph: .*{message}.*outside of the graph"
    with pytest.raises(RuntimeError, match=said), how.capture():
        step()
    calls = []
    closures = [lambda: calls.append(1)] * (2 if opt.radius.learns else 1)
    with pytest.raises(RuntimeError, match="cannot be captured"), how.capture():
        opt.step(*closures)
    assert not calls and same_bits(weights(toy), before)
    step()
    assert not same_bits(weights(toy), before)


def test_a_step_that_makes_its_memory_must_have_been_taken_before(where):
    how, device, backend = where
    for base in (torch.optim.SGD, torch.optim.AdamW):
        toy, opt, step = small(device, backend, steps=0, base=base)
        before = weights(toy)
        with pytest.raises(RuntimeError, match=r"tables of the parameters .* take a step or two"), how.capture():
            step()
        opt.first_step()
        opt.restore()
        said = r"the optimizer's (momentum_buffer|exp_avg) .* take a step or two"
        with pytest.raises(RuntimeError, match=said), how.capture():
            step()
        opt.restore()
        assert same_bits(weights(toy), before)


def test_parts_of_a_step_are_captured_together_or_not_at_all(where):
    how, device, backend = where
    _, opt, step = small(device, backend, rho=lambda: lk.LearnedRadius(0.1))
    loss = torch.ones((), device=device)
    opt.first_step()
    with pytest.raises(RuntimeError, match=r"second_step\(\) in a CUDA graph needs first_step\(\)"), how.capture():
        opt.second_step()
    opt.second_step()
    with pytest.raises(RuntimeError, match=r"radius_step\(\) in a CUDA graph needs the step before it"), how.capture():
        opt.radius_step(lambda: loss, lambda: loss)
    step()
    _, opt, step = small(device, backend)
    with how.capture():
        opt.first_step()
    with pytest.raises(RuntimeError, match=r"first_step\(\) in a CUDA graph needs second_step\(\)"):
        opt.second_step()
    opt.restore()
    step()


def test_what_a_part_counts_in_is_the_same_memory_from_step_to_step(where):
    """A replay then counts on, and a loaded state stands where it reads."""
    how, device, backend = where
    for direction in (lk.Friendly(), lk.RandomStart(gamma=0.0)):
        _, opt, step = small(device, backend, direction=direction, seed=3)
        counts = [
            progress(opt).random.at(torch.device(device), 0),
            getattr(direction, "_updates", torch.zeros(())),
        ]
        before = [c.data_ptr() for c in counts]
        with how.capture():
            step()
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        step()
        after = [
            progress(opt).random.at(torch.device(device), 0),
            getattr(direction, "_updates", counts[1]),
        ]
        assert before == [c.data_ptr() for c in after]


def test_a_number_becomes_part_of_the_graph_and_not_of_later_steps(where):
    """What a capture makes is filled by replays only: no eager step may find it."""
    how, device, backend = where
    _, opt, step = small(device, backend)
    (bucket,) = space(opt).buckets
    eager = bucket.numbers({0: 0.1})
    with how.capture():
        step()
        inside = bucket.numbers({0: 0.1})
    assert inside is not eager and bucket.numbers({0: 0.1}) is eager


def test_the_buckets_of_a_graph_outlive_a_rebuilding(where):
    how, device, backend = where
    toy, opt, step = small(device, backend)
    with how.capture():
        step()
    tables = space(opt)
    toy.params[0].requires_grad_(False)
    assert space(opt) is not tables and [kept[0] for kept in work(opt).tables.captured] == [tables]


def test_what_a_graph_counts_in_outlives_a_loaded_state(where):
    """Adam's step counts and averages: a stale replay must not write where somebody else's memory is by now."""
    how, device, backend = where
    _, opt, step = small(device, backend, base=torch.optim.Adam)
    with how.capture():
        step()
    seen = [weakref.ref(t) for entry in opt.state.values() for t in entry.values()]
    assert len(seen) >= 3
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    gc.collect()
    assert all(ref() is not None for ref in seen)
