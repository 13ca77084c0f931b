"""Memory that changed under the optimizer's hands: never a wild write, never a silent nothing."""

import time

import pytest
import torch

import lets_kernels as lk
from lets_kernels.space.memory import check_apart
from support.conv_net import Task
from support.guard_bands import same_bits
from support.inside import now


def bands(sizes=(16,) * 6, whole=64):
    """Parameters that are the beginnings of larger tensors, whose ends nobody may write."""
    homes = [torch.full((whole,), 7.0) for _ in sizes]
    return homes, [torch.nn.Parameter(home[:size]) for home, size in zip(homes, sizes, strict=True)]


def one_step(opt, params, value=1.0):
    for _ in range(2):
        for p in params:
            p.grad = torch.full_like(p, value)
        opt.first_step() if now(opt).step is None else opt.second_step()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("size", [8, 32])
def test_a_parameter_that_was_resized_through_data_is_stepped_in_its_new_size(backend, size, momentum):
    homes, params = bands()
    opt = lk.SAM(params, torch.optim.SGD, backend=backend.name, lr=0.1, momentum=momentum)
    one_step(opt, params)
    new = torch.full((64,), 7.0)
    params[3].grad, params[3].data = None, new[:size]
    if momentum:  # whose buffer has the old size: torch's own optimizer gets it, and refuses
        with pytest.raises(RuntimeError, match="must match"):
            one_step(opt, params)
        assert now(opt).step is None
    else:
        one_step(opt, params)
        assert bool((new[:size] < 7).all()), "some of the new elements were not stepped"
    assert bool((new[size:] == 7).all())
    assert all(bool((home[16:] == 7).all()) for home in homes)


def test_state_that_was_retyped_through_data_is_not_handed_to_the_kernels(backend):
    homes, params = bands()
    opt = lk.SAM(params, torch.optim.SGD, backend=backend.name, lr=0.1, momentum=0.9)
    one_step(opt, params)
    assert opt.fused
    buffer = opt.state[params[2]]["momentum_buffer"]
    buffer.data = buffer.data.to(torch.bfloat16)
    one_step(opt, params)
    assert not opt.fused
    assert opt.fused_reason == "the state has another memory layout than the parameters"
    assert all(bool((home[16:] == 7).all()) for home in homes)


def test_a_parameter_whose_memory_was_freed_is_an_error(backend):
    _, params = bands()
    params = [torch.nn.Parameter(p.detach().clone()) for p in params]
    opt = lk.SAM(params, torch.optim.SGD, backend=backend.name, lr=0.1)
    one_step(opt, params)
    params[1].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"no memory of its own|storage|out of bounds"):
        one_step(opt, params)


def test_another_default_device_changes_nothing(backend):
    results = []
    for device in ("cpu", "meta"):
        _, params = bands()
        with torch.device(device):
            opt = lk.SAM(params, torch.optim.SGD, backend=backend.name, lr=0.1, momentum=0.9)
            one_step(opt, params)
        results.append([p.detach().clone() for p in params])
    assert same_bits(*results)
    assert bool((results[0][0] < 7).all())


def test_a_parameter_that_is_resized_within_a_step_is_an_error_and_nothing_is_written_past_it(backend):
    _, params = bands()
    opt = lk.SAM(params, torch.optim.SGD, backend=backend.name, lr=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.first_step(zero_grad=True)
    small = torch.full((64,), 7.0)
    params[3].data = small[:8]
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="resized"):
        opt.second_step()
    assert bool((small[8:] == 7).all())


def test_a_waiting_hypergradient_of_another_model_is_dropped(backend):
    """Its gradients are smaller than the parameters that they are loaded for: the ops would read past their ends."""

    def optimizer(size):
        params = [torch.nn.Parameter(torch.ones(size)) for _ in range(6)]
        radius = lk.LearnedRadius(0.1, reuse_train_gradient=True, lr=0.5)
        return params, lk.SAM(params, torch.optim.SGD, radius, backend=backend.name, lr=0.1)

    def closure(params, factor):
        def run():
            for p in params:
                p.grad = None
            loss = factor * sum((p**2).sum() for p in params)
            loss.backward()
            return loss

        return run

    learned = []
    for size in (16, 512):  # the state's own model, and a wider one
        params, opt = optimizer(16)
        opt.step(closure(params, 1.0), closure(params, 2.0))
        state = opt.state_dict()
        params, other = optimizer(size)
        other.load_state_dict(state)
        before = other.rho
        other.step(closure(params, 1.0), closure(params, 2.0))
        learned.append(bool(other.rho != before))
    assert learned == [True, False]


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("move", ["first_step", "restore", "second_step", "context"])
def test_autograd_notices_weights_that_moved_between_forward_and_backward(backend, move, flatten):
    """In every parameter, wherever the ops write it: as one of a list, or within the one buffer."""
    for which in range(6):
        _, params = bands()
        opt = lk.SAM(params, torch.optim.SGD, backend=backend.name, flatten=flatten, lr=0.1, momentum=0.9)
        one_step(opt, params)
        if move in ("restore", "second_step"):
            for p in params:
                p.grad = torch.ones_like(p)
            opt.first_step()
        loss = (params[which] ** 2).sum()
        if move == "context":
            with opt.perturbed():
                pass
        else:
            getattr(opt, move)()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        opt.restore()


@pytest.fixture
def swapping():
    """torch's other way to convert and to load a module: a parameter stays who it is and exchanges its memory."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("change", ["to", "channels_last", "load", "assign"])
def test_a_parameter_that_is_swapped_is_noticed(backend, swapping, change, flatten):
    """As a fresh optimizer on the changed net would go on."""
    ends = []
    for fresh in (False, True):
        task = Task(torch.float32, steps=4)
        net, make = task.net, {"rho": 0.3, "backend": backend.name, "flatten": flatten, "lr": 0.1}
        make |= {"filterwise": True, "model": net}  # filters of a transposed convolution lie otherwise in channels_last
        opt = lk.ASAM(net.parameters(), torch.optim.SGD, **make)
        task.run(opt, task.batches[:2])
        opt.zero_grad()
        before = [id(p) for p in net.parameters()]
        if change == "to":
            net.to(torch.float64)
            task.batches = [[(x.double(), y) for x, y in pair] for pair in task.batches]
        elif change == "channels_last":
            net.to(memory_format=torch.channels_last)
        else:
            halves = {name: value.clone() * 0.5 for name, value in net.state_dict().items()}
            net.load_state_dict(halves, assign=change == "assign")
        assert before == [id(p) for p in net.parameters()]
        if fresh:
            opt = lk.ASAM(net.parameters(), torch.optim.SGD, **make)
        task.run(opt, task.batches[2:])
        ends.append([p.detach().clone() for p in net.parameters()])
    assert same_bits(*ends)


def test_a_model_that_was_given_other_parameters_is_noticed(backend):
    """``load_state_dict(assign=True)`` replaces a module's parameters; ours would get no gradient and train nothing."""
    net = torch.nn.Linear(3, 2)
    opt = lk.SAM(net.parameters(), torch.optim.SGD, model=net, backend=backend.name, lr=0.1)

    def closure():
        opt.zero_grad()
        loss = net(torch.ones(4, 3)).square().sum()
        loss.backward()
        return loss

    opt.step(closure)
    net.load_state_dict({name: t.clone() for name, t in net.state_dict().items()}, assign=True)
    with pytest.raises(RuntimeError, match="without assign=True"):
        opt.step(closure)


def test_a_pass_without_any_gradient_is_no_error_while_the_parameters_are_the_models(backend):
    net = torch.nn.Linear(3, 2)
    opt = lk.SAM(net.parameters(), torch.optim.SGD, model=net, backend=backend.name, lr=0.1)
    before = [p.detach().clone() for p in net.parameters()]
    opt.step(lambda: torch.zeros(()))
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


# ---- memory that changes between the passes


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 4 * 4, 5))


def begun(backend, flatten, holes=False):
    """A network whose weights are perturbed, and what they were."""
    model = net()
    if holes:
        model[2].weight.data = torch.empty(5, 64, 2)[:, :, 0].copy_(model[2].weight.data)
    opt = lk.SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1, backend=backend.name, flatten=flatten)
    model(torch.randn(2, 3, 6, 6)).square().mean().backward()
    before = [p.detach().clone() for p in model.parameters()]
    opt.first_step()
    assert not any(map(torch.equal, model.parameters(), before))
    return model, opt, before


def columns(model):
    home = torch.full((64, 5, 2), 7.0)
    model[2].weight.data = home[:, :, 0].copy_(model[2].weight.data.t()).t()
    return home[:, :, 1]


CHANGES = {
    "bfloat16": lambda model: model[2].bfloat16(),
    "float64": lambda model: model.double(),
    "channels last": lambda model: model.to(memory_format=torch.channels_last),
    "columns of another tensor": columns,
}


@pytest.mark.parametrize("end", ["restore", "second_step", "radius_step"])
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_weights_come_home_to_where_the_parameters_lie_by_now(backend, change, flatten, end):
    if end == "radius_step":
        model = net()
        radius = lk.LearnedRadius(0.1)
        opt = lk.SAM(model.parameters(), torch.optim.SGD, radius, lr=0.1, backend=backend.name, flatten=flatten)
        for half in (opt.first_step, opt.second_step):
            opt.zero_grad()
            model(torch.randn(2, 3, 6, 6)).square().mean().backward()
            half()
        before = [p.detach().clone() for p in model.parameters()]
    else:
        model, opt, before = begun(backend, flatten)
    beside = CHANGES[change](model)

    def closure():
        opt.zero_grad()
        first = model[0](torch.randn(2, 3, 6, 6, dtype=model[0].weight.dtype)).to(model[2].weight.dtype)
        loss = model[2](model[1](first)).square().mean()
        loss.backward()
        return loss

    if end == "restore":
        opt.restore()
    else:
        with pytest.raises(RuntimeError, match="was changed between the passes of a step: it is now torch"):
            opt.second_step() if end == "second_step" else opt.radius_step(closure, closure)
    assert all(torch.equal(p, old.to(p.dtype)) for p, old in zip(model.parameters(), before, strict=True))
    if isinstance(beside, torch.Tensor) and beside.dim() == 2:
        assert bool((beside == 7).all())
    opt.step(*[closure] * (1 + opt.radius.learns))  # the next step is one of the parameters as they are
    assert not any(torch.equal(p, old.to(p.dtype)) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("kind", ["flat", "holes"])
def test_weights_come_home_to_memory_that_took_the_place_of_the_old(backend, kind):
    """As ``flatten_parameters`` of an RNN does."""
    model, opt, before = begun(backend, flatten=kind == "flat", holes=kind == "holes")
    for p in model.parameters():
        if kind == "flat":
            p.data = p.data.clone()
        else:
            p.data = torch.empty_strided(p.shape, p.stride()).copy_(p.data)
    opt.restore()
    assert all(map(torch.equal, model.parameters(), before))


def test_a_flat_parameter_that_was_taken_out_is_no_silent_step(backend):
    model, opt, before = begun(backend, flatten=True)
    model[2].weight.data = model[2].weight.data.clone()
    with pytest.raises(RuntimeError, match="taken out of the buffer of flatten=True"):
        opt.second_step()
    assert all(map(torch.equal, model.parameters(), before))


def test_what_was_resized_comes_home_once_it_has_its_size_again(backend):
    model, opt, before = begun(backend, flatten=False)
    weight = model[2].weight
    weight.data = torch.zeros(2, 2)
    with pytest.raises(RuntimeError, match=r"Give it a tensor of shape \(5, 64\) again"):
        opt.restore()
    weight.data = torch.zeros(5, 64)
    opt.restore()
    assert all(map(torch.equal, model.parameters(), before))


def test_a_network_that_is_retyped_within_the_context_goes_on(backend):
    model = net()
    opt = lk.SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1, backend=backend.name)
    model(torch.randn(2, 3, 6, 6)).square().mean().backward()
    before = [p.detach().clone() for p in model.parameters()]
    with opt.perturbed():
        model.double()
    assert all(torch.equal(p, old.double()) for p, old in zip(model.parameters(), before, strict=True))
    with pytest.raises(RuntimeError, match=r"it is now torch\.float64"):
        opt.step()
    opt.zero_grad()
    model(torch.randn(2, 3, 6, 6).double()).square().mean().backward()
    with opt.perturbed():
        opt.zero_grad()
        model(torch.randn(2, 3, 6, 6).double()).square().mean().backward()
    opt.step()
    assert not any(torch.equal(p, old.double()) for p, old in zip(model.parameters(), before, strict=True))


# ---- memory that the optimizer sees twice


def tied():
    x = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    return [x, torch.nn.Parameter(x.data)]


def twice():
    x = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    return [x, x]


def sliced():
    x = torch.ones(4, 4)
    return [torch.nn.Parameter(x), torch.nn.Parameter(x[1])]


def interleaved(step):
    x = torch.ones(4, 4)
    return [torch.nn.Parameter(x[:, 1]), torch.nn.Parameter(x[:, ::step])]


SHARED = {"tied": tied, "twice": twice, "slice": sliced, "columns": lambda: interleaved(1)}


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("kind", SHARED)
def test_parameters_that_share_memory_are_refused(backend, kind, flatten):
    params = SHARED[kind]()
    before = [p.detach().clone() for p in params]
    opt = lk.SAM(params, torch.optim.SGD, rho=0.5, lr=0.0, backend=backend.name, flatten=flatten)
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"parameter \d of param_groups\[0\] and .* share memory"):
        opt.first_step()
    assert all(map(torch.equal, params, before))


def test_parameters_that_come_to_share_memory_are_refused(backend):
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    opt = lk.SAM(params, torch.optim.SGD, rho=0.5, lr=0.1, backend=backend.name)
    one_step(opt, params)
    params[1].data = params[0].data
    with pytest.raises(ValueError, match="share memory"):
        one_step(opt, params)


def test_many_interleaved_parameters_are_looked_at_in_no_time():
    home = torch.randn(400, 400)
    columns = [torch.nn.Parameter(home[:, i]) for i in range(400)]
    halves = torch.ones(64)
    others = [torch.nn.Parameter(halves[::2]), torch.nn.Parameter(halves.view(torch.float16)[2::4])]
    start = time.perf_counter()
    check_apart((f"column {i}", p) for i, p in enumerate([*columns, *others]))
    assert time.perf_counter() - start < 5  # 0.05 s; pair by pair it would be 40
    with pytest.raises(ValueError, match=r"column 7 and .*a row"):
        check_apart([*((f"column {i}", p) for i, p in enumerate(columns)), ("a row", home[200, 7:8])])


def test_memory_that_comes_to_be_shared_between_the_passes_is_refused_before_it_is_stepped(backend):
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    opt = lk.SAM(params, torch.optim.SGD, rho=0.5, lr=0.1, backend=backend.name)
    for p in params:
        p.grad = torch.ones(3)
    opt.first_step(zero_grad=True)
    params[1].data = params[0].data
    for p in params:
        p.grad = torch.ones(3)
    with pytest.raises(ValueError, match="share memory"):
        opt.second_step()
    assert bool((params[0] == 1).all())


def test_complex_parameters_come_home_wherever_they_lie_by_now(backend):
    a = torch.nn.Parameter(torch.randn(4, 6, dtype=torch.complex64)[:, ::2])
    b = torch.nn.Parameter(torch.randn(5, dtype=torch.complex64))
    opt = lk.SAM([a, b], torch.optim.SGD, rho=1.0, lr=0.1, backend=backend.name)
    before = [a.detach().clone(), b.detach().clone()]
    for p in (a, b):
        p.grad = torch.ones_like(p)
    opt.first_step()
    b.data = b.data.clone()
    opt.restore()
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])


def test_one_parameter_that_was_resized_keeps_no_other_perturbed(backend):
    a, b = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    opt = lk.SAM([a, b], torch.optim.SGD, rho=1.0, lr=0.1, backend=backend.name)
    for p in (a, b):
        p.grad = torch.ones_like(p)
    opt.first_step()
    a.data = torch.zeros(5)
    with pytest.raises(RuntimeError, match="Give it a tensor of shape"):
        opt.restore()
    assert bool((b == 1).all())
    a.data = torch.zeros(3)
    opt.restore()
    assert bool((a == 1).all())


def test_parameters_whose_memory_was_given_back_are_refused():
    home = torch.zeros(5 * 65536)
    params = [torch.nn.Parameter(home[65536 * i :][:10]) for i in range(1, 5)]
    opt = lk.SAM(params, torch.optim.SGD, rho=1.0, lr=0.1)
    for p in params:
        p.grad = torch.ones(10)
    home.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="no memory of its own"):
        opt.first_step()


def test_parameters_in_one_memory_that_lie_apart_are_stepped(backend):
    params = interleaved(2)
    opt = lk.SAM(params, torch.optim.SGD, rho=0.5, lr=0.0, backend=backend.name)
    before = [p.detach().clone() for p in params]
    one_step(opt, params)
    assert all(map(torch.equal, params, before))
    assert opt.metrics()["gradients"] == 2


@pytest.mark.parametrize("method", [lk.GSAM, lk.GradientNormPenalty])
def test_one_gradient_tensor_of_two_parameters_is_written_once(backend, method):
    stepped = []
    for shared in (False, True):
        params = [torch.nn.Parameter(torch.full((6,), value)) for value in (1.0, 2.0)]
        opt = method(params, torch.optim.SGD, rho=0.5, lr=0.1, backend=backend.name)
        for half, value in ((opt.first_step, 1.0), (opt.second_step, 3.0)):
            grad = torch.linspace(-1, value, 6)
            for p in params:
                p.grad = grad if shared else grad.clone()
            half()
        stepped.append([p.detach().clone() for p in params])
    assert same_bits(*stepped)


@pytest.mark.parametrize("end", ["restore", "second_step", "closure"])
def test_the_others_come_home_where_one_was_resized(backend, end):
    """And it too, once it has its shape again."""
    a, b, c = (torch.nn.Parameter(torch.full((3,), float(i))) for i in range(1, 4))
    opt = lk.SAM([a, b, c], torch.optim.SGD, lr=0.1, rho=0.5, backend=backend.name)
    (a.sum() + b.sum() + c.sum()).backward()
    opt.first_step(zero_grad=True)
    perturbed, b.data = b.data, torch.ones(4)
    (a.sum() + b.sum() + c.sum()).backward()
    call = {"restore": opt.restore, "second_step": opt.second_step, "closure": lambda: opt.step(lambda: None)}[end]
    with pytest.raises(RuntimeError, match="the others are restored"):
        call()
    assert a.tolist() == [1.0] * 3
    assert c.tolist() == [3.0] * 3
    b.data = perturbed
    opt.restore()
    assert b.tolist() == [2.0] * 3
