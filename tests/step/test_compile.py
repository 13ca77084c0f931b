"""Under torch.compile: the ops inside one graph, and steps, which run as plain Python between graphs."""

import copy

import pytest
import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import lets_kernels as lk
from support import family
from support.conv_net import Pointwise, Task
from support.family import FAMILY
from support.given_gradients import Toy, snapshot, weights
from support.guard_bands import LAYOUTS, Bucket, same_bits
from support.op_arguments import SHAPES, WRITES, arguments, overload, scalar

BACKENDS = ("aot_eager", "inductor")


@pytest.fixture(autouse=True)
def fresh():
    """No graph of another test, nor of another day: what the caches on disk go by does not include the ops' fakes."""
    torch.compiler.reset()
    with inductor_config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
        yield
    torch.compiler.reset()


class Counting:
    """A compile backend that runs what it is given, and keeps the graphs."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return graph.forward


# ---- ops inside a graph


@pytest.mark.parametrize("op", WRITES)
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_every_op_goes_into_a_graph_whole_and_gives_its_bits(op, compiler):
    given = arguments(op, torch.float32)
    expected = copy.deepcopy(given)
    result = torch.compile(overload(op), fullgraph=True, backend=compiler)(*given)
    wanted = overload(op)(*expected)
    tensors = [[t for t in tree_leaves(x) if torch.is_tensor(t)] for x in ((result, given), (wanted, expected))]
    assert len(tensors[0]) == len(tensors[1]) > 1 and same_bits(*tensors)


def a_step(params, grads, second, momenta, saved, dirty, skipped, table, rho):
    """One SAM step in ops, with arithmetic around them: what a compiler may fuse, reorder or functionalise wrongly."""
    total = torch.ops.lets_kernels.grad_norm(grads, [], table, None, 0.0, 2.0)
    torch.ops.lets_kernels.perturb_(params, grads, saved, dirty, table, None, 0.0, 2.0, total, rho * 2)
    moved = [p * 1 for p in params]
    hats = [g + 0.5 * p for g, p in zip(second, params, strict=True)]
    squares = torch.ops.lets_kernels.grad_norm(hats, [], table, None, 0.0, 2.0)
    gate = torch.ops.lets_kernels.all_finite_([total, squares], skipped)
    torch.ops.lets_kernels.restore_sgd_(params, hats, momenta, saved, dirty, table, gate, 0.1, 0.9, 0.01, False, False)
    return moved, squares.sqrt(), [p + 1 for p in params]


@pytest.mark.parametrize("compiler", BACKENDS)
def test_a_step_of_ops_is_one_graph_with_the_bits_of_eager(compiler):
    # Inductor (torch 2.13) computes what reads a 0-d input, between two custom ops that write to it, after the second:
    # with any custom op, so that is no promise of these. The fifth run is 0-d.
    bucket = Bucket(LAYOUTS["several"][: 4 if compiler == "inductor" else 5], torch.float32)

    def tensors():
        return [t.clone() for t in bucket.give(bucket.values(zeros=False), "list")]

    given = tensors(), tensors(), tensors(), tensors(), torch.zeros(bucket.total), torch.tensor(0), torch.tensor(0)
    given = (*given, bucket.table, scalar(0.05))
    expected = copy.deepcopy(given)
    compiled = torch.compile(a_step, fullgraph=True, backend=compiler)
    for _ in range(2):  # the second time from the compiler's cache
        results = compiled(*given), a_step(*expected)
        assert same_bits(*(tree_leaves(r) for r in results))
        assert same_bits(tree_leaves(given), tree_leaves(expected))
    assert not same_bits(results[0][0], results[0][2])


@pytest.mark.parametrize("op", WRITES)
def test_fake_tensors_go_through_every_op_and_nothing_is_computed(op):
    given = arguments(op, torch.float32)
    before = copy.deepcopy(given)
    with FakeTensorMode() as mode:
        fakes = tree_map_only(torch.Tensor, mode.from_tensor, given)
        result = overload(op)(*fakes)
    assert same_bits(*([t for t in tree_leaves(x) if torch.is_tensor(t)] for x in (given, before)))
    if result is not None:
        assert result.shape == SHAPES[op] and result.dtype == torch.float64 and result.device.type == "cpu"


# ---- steps between graphs


def learner(method):
    task = Task(torch.float32, steps=4, net=Pointwise())
    options = {"lr": 0.1, "momentum": 0.9}
    if method in FAMILY:
        return task, family.build(method, task)
    if method == "lets":
        return task, lk.LETSASAM(task.net.parameters(), torch.optim.SGD, lk.LearnedRadius(0.1, lr=0.05), **options)
    return task, lk.ASAM(task.net.parameters(), torch.optim.SGD, **options)


def by_closure(task, opt):
    def train(batch, val_batch):
        scale = batch[0].mean() * 2
        closures = [task.closure(b) for b in ((batch, val_batch) if opt.radius.learns else (batch,))]
        return opt.step(*closures).detach() + scale

    return train


def in_two_steps(task, opt):
    def train(batch, val_batch):
        with opt.first_pass():
            loss = task.closure(batch)()
        opt.first_step(zero_grad=True, loss=loss)
        task.closure(batch)()
        opt.second_step()
        if opt.radius.learns:
            opt.radius_step(task.closure(batch), task.closure(val_batch))
        return loss.detach() * 2

    return train


def in_a_context(task, opt):
    def train(batch, val_batch):
        with opt.first_pass():
            loss = task.closure(batch)()
        with opt.perturbed(loss=loss):
            opt.zero_grad()
            task.closure(batch)()
        opt.step()
        if opt.radius.learns:
            opt.radius_step(task.closure(batch), task.closure(val_batch))
        return loss.detach() * 2

    return train


COMPILED = [(method, shape) for method in ("asam", "lets") for shape in (by_closure, in_two_steps, in_a_context)]
COMPILED += [("looksam", in_two_steps), ("rsam", by_closure), ("rsam", in_two_steps), ("friendly", in_a_context)]
COMPILED += [("aesam", by_closure), ("sparse", in_two_steps), ("bsam", in_a_context), ("gsam", by_closure)]


@pytest.mark.parametrize("method, shape", COMPILED)
def test_a_step_inside_a_compiled_function_is_the_eager_step(method, shape):
    ends, compiler = [], Counting()
    for compiled in (False, True):
        task, opt = learner(method)
        train = shape(task, opt)
        train = torch.compile(train, backend=compiler) if compiled else train
        losses = [train(*pair) for pair in task.batches]
        ends.append([*losses, *snapshot(opt), *(v for _, v in sorted(opt.metrics().items()))])
    assert same_bits(*ends)
    assert compiler.graphs, "nothing was compiled: nothing was tested"
    inside = {str(node.target) for graph in compiler.graphs for node in graph.graph.nodes}
    assert not any("lets_kernels" in name for name in inside), "a step was traced"


@pytest.mark.parametrize("compiler", ["aot_eager"])
@pytest.mark.parametrize("method", ["asam", "lets"])
def test_a_compiled_model_sees_the_perturbed_weights(method, compiler):
    """The usual way round: the model is compiled, the training loop is not."""
    ends = []
    for compiled in (False, True):
        task, opt = learner(method)
        if compiled:
            task.net.compile(backend=compiler)
        task.run(opt, learned=method == "lets")
        ends.append(snapshot(opt))
    assert same_bits(*ends)


def test_an_exception_in_a_compiled_training_function_restores_the_weights():
    task, opt = learner("asam")
    batch = task.batches[0][0]

    def train():
        task.closure(batch)()
        with opt.perturbed():
            raise ValueError("stop")

    before = weights(task)
    with pytest.raises(ValueError, match="stop"):
        torch.compile(train, backend="eager")()
    assert same_bits(weights(task), before)


def test_one_graph_with_a_step_in_it_is_refused_with_a_reason():
    """fullgraph=True allows no plain Python in between, and a step is that; no weight has been touched then."""
    toy = Toy()
    opt = lk.SAM(toy.params, torch.optim.SGD, lr=0.1)
    toy.set_grads(toy.grads(0))
    before = weights(toy)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="first_step"):
        torch.compile(lambda: opt.first_step(), fullgraph=True, backend="eager")()
    assert same_bits(weights(toy), before)
