"""Steps captured in CUDA graphs: replays give the bits of eager steps, and what cannot be captured says so."""

import math

import pytest
import torch

import lets_kernels as lk
from support.accelerator import BACKENDS, DEVICE, DRY, Graph, litter, on_a_gpu
from support.conv_net import Pointwise, Task
from support.core_methods import CURVATURES, METRICS
from support.given_gradients import Toy, snapshot, weights
from support.guard_bands import same_bits

REPLAYS = 6

BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "adamw": (torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.1}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "capturable": not DRY}),
    "amsgrad": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True, "capturable": not DRY}),
}
METHODS = {
    "sam": (lk.SAM, {"rho": 0.1}),
    "sam-p-inf": (lk.SAM, {"rho": 0.01, "direction": lk.Gradient(p=math.inf)}),
    "asam": (lk.ASAM, {"rho": 0.5}),
    "asam-filterwise": (lk.ASAM, {"rho": 0.3, "filterwise": True}),
    "unchecked": (lk.SAM, {"rho": 0.1, "check_finite": False}),
    "flattened": (lk.ASAM, {"rho": 0.5, "flatten": True}),
}


def make(params, name, method="sam", base="momentum", **options):
    cls, arguments = METHODS[method]
    optimizer, base_options = BASES[base]
    return cls(params, optimizer, **{**arguments, **options}, backend=name, **base_options)


class Static:
    """A Toy's two-step step on gradients that stay where they are: `load` writes others into the same memory."""

    def __init__(self, name, **options):
        self.toy, self.bad = Toy(device=DEVICE), False
        self.opt = make(self.toy.params, name, **options)
        self.second = [torch.empty_like(p.detach()) for p in self.toy.params]
        for p in self.toy.params:
            p.grad = torch.empty_like(p)

    def load(self, i):
        first, second = self.toy.grads(2 * i), self.toy.grads(2 * i + 1)
        if self.bad:
            second[0][0, 0, 0, 0] = torch.nan
        for p, s, g, h in zip(self.toy.params, self.second, first, second, strict=True):
            p.grad.copy_(g)
            s.copy_(h)

    def step(self):
        self.opt.first_step()
        for p, s in zip(self.toy.params, self.second, strict=True):
            p.grad.copy_(s)
        self.opt.second_step()

    def end(self):
        return [*snapshot(self.opt), *(self.opt.metrics()[k] for k in ("grad_norm", "rho", "skipped_steps"))]


class Whole:
    """`step(closure)` with the passes in it, on batches that `load` writes into the same memory."""

    def __init__(self, name, learning=None, **options):
        self.task = Task(torch.float32, steps=16, net=Pointwise(), device=DEVICE)
        self.batches, self.learned = self.task.batches, learning is not None
        self.static = tuple(tuple(t.clone() for t in batch) for batch in self.batches[0])
        rho = {"rho": lk.LearnedRadius(0.1, **learning)} if self.learned else {}
        self.opt = make(self.task.net.parameters(), name, **{**options, **rho})

    def load(self, i):
        for batch, new in zip(self.static, self.batches[i], strict=True):
            for held, t in zip(batch, new, strict=True):
                held.copy_(t)

    def step(self):
        self.task.run(self.opt, [self.static], learned=self.learned)

    def end(self):
        metrics = self.opt.metrics()
        return [*snapshot(self.opt), *(metrics[k] for k in sorted(metrics))]


def compare(make_one, replays=REPLAYS, between=lambda one, i: None):
    """Two eager steps and then replays, against as many eager steps: after each the same bits everywhere."""
    captured, eager = make_one(), make_one()
    graph = Graph(captured.step, captured.load)
    for i in range(2):
        eager.load(i)
        eager.step()
    starts = weights(eager.opt.param_groups[0]["params"])
    for i in range(2, 2 + replays):
        for one, run in ((captured, graph.replay), (eager, eager.step)):
            between(one, i)
            one.load(i)
            run()
        assert same_bits(captured.end(), eager.end()), f"replay {i - 1}"
        litter()
    ends = weights(eager.opt.param_groups[0]["params"])
    assert not any(same_bits(a, b) for a, b in zip(starts, ends, strict=True) if a.numel())
    return captured


@on_a_gpu(*BACKENDS)
class TestStaticGradients:
    """Gradients stay where they are, as `torch.cuda.make_graphed_callables` leaves them."""

    @pytest.mark.parametrize("base", BASES)
    @pytest.mark.parametrize("method", METHODS)
    def test_replays_are_eager_steps(self, name, method, base):
        compare(lambda: Static(name, method=method, base=base))

    def test_gradients_that_are_not_finite_skip_a_replay(self, name):
        def spoil(one, i):
            one.bad = i == 4

        one = compare(lambda: Static(name, method="asam", base="adamw"), between=spoil)
        assert one.opt.metrics()["skipped_steps"].item() == 1

    def test_a_radius_on_the_device_follows_what_is_written_there(self, name):
        def built():
            one = Static(name)
            one.opt.param_groups[0]["rho"] = torch.full((), 0.1, dtype=torch.float64, device=DEVICE)
            return one

        one = compare(built, between=lambda one, i: one.opt.param_groups[0]["rho"].fill_(0.1 * i))
        assert one.opt.rho.item() == 0.1 * (1 + REPLAYS)

    @pytest.mark.parametrize("what", ["rho", "rebuilt"])
    def test_eager_steps_between_replays_leave_the_graph_its_memory(self, name, what):
        """A graph keeps the radius and the buckets that it was captured with, whatever replaces them for others."""

        def other_step(one, i):
            params, group = one.toy.params, one.opt.param_groups[0]
            held, kept = group["rho"], params[0].grad
            if what == "rho":
                group["rho"] = 0.02 * i
            else:
                params[0].requires_grad_(False)
            one.load(20 + i)
            one.step()
            group["rho"] = held
            params[0].requires_grad_(True)
            assert params[0].grad is kept
            litter()

        compare(lambda: Static(name, method="asam"), between=other_step)


@on_a_gpu("cuda", "reference")
class TestWholeSteps:
    """The passes are captured too, and make their gradients inside the graph."""

    @pytest.mark.parametrize("base", BASES)
    @pytest.mark.parametrize("method", METHODS)
    def test_replays_are_eager_steps(self, name, method, base):
        compare(lambda: Whole(name, method=method, base=base))

    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("curvature", CURVATURES)
    @pytest.mark.parametrize("method", ["sam", "asam-filterwise"])
    def test_a_learned_radius_is_learned_by_replays(self, name, method, curvature, metric):
        learning = {"metric": metric, **CURVATURES[curvature][0]}
        one = compare(lambda: Whole(name, learning, method=method))
        assert one.opt.rho.item() != pytest.approx(0.1, rel=1e-3)

    @pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.NAdam])
    @pytest.mark.parametrize("per_group", [False, True])
    def test_the_radius_has_any_optimizer_that_torch_can_capture(self, name, optimizer, per_group):
        compare(lambda: Whole(name, {"optimizer": optimizer, "per_group": per_group}))

    def test_learning_goes_on_eagerly_after_replays_and_the_other_way_round(self, name):
        one, eager = (Whole(name, {"lr": 0.05}) for _ in range(2))
        graph = Graph(one.step, one.load)
        for i in range(2):
            eager.load(i)
            eager.step()
        radii = [one.opt.rho.item()]
        for i in range(2, 10):
            for x, run in ((one, one.step if i % 3 == 0 else graph.replay), (eager, eager.step)):
                x.load(i)
                run()
            assert same_bits(snapshot(one.opt), snapshot(eager.opt))
            radii.append(one.opt.rho.item())
        assert len(set(radii)) == len(radii)


@pytest.mark.gpu
@pytest.mark.skipif(DRY or not torch.cuda.is_available(), reason="no GPU to capture on")
def test_triton_asks_for_gradients_that_stay_where_they_are():
    """Its kernels find the gradients by a table, which nothing uploads during a capture."""
    one = Whole("triton")
    before = weights(one.task)
    with pytest.raises(RuntimeError, match="set_to_none=False"):
        Graph(one.step, one.load)
    assert not same_bits(weights(one.task), before)  # the two steps before the capture
    one.load(3)
    one.step()
