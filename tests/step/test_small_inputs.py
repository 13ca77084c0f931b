"""Small inputs that are legal and rare: lazily negated gradients, groups without one, radii that run away, ..."""

import contextlib
import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.utils import _pytree

import lets_kernels as lk
from lets_kernels.learning.learned import MOST_NU
from support import family
from support.conv_net import Task
from support.family import FAMILY, ONE_EACH
from support.given_gradients import Toy, closures, weights
from support.guard_bands import same_bits
from support.inside import now

SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW


# ---- a learned radius, and a group that the second pass does not reach ---------------------------------------------


@pytest.mark.filterwarnings("ignore::lets_kernels.step.precision.PrecisionWarning")
@pytest.mark.parametrize("direction", ["epsilon", "algorithm1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_group_without_a_second_gradient_adds_nothing_to_the_radius(backend, dtype, direction):
    """As with that group's ĝ = 0; the step goes on, and ν moves by what the others say."""
    found = []
    for whole in (False, True):
        torch.manual_seed(0)
        a, b = (nn.Parameter(torch.randn(n).to(backend.device, dtype)) for n in (5, 3))
        radius = lk.LearnedRadius(0.05, direction=direction)
        groups = [{"params": [a]}, {"params": [b]}]
        opt = lk.SAM(groups, SGD, radius, adaptive=True, lr=0.1, backend=backend.name)

        def loss(i, a=a, b=b, whole=whole):
            other = b.square().sum() if i != 1 else 0 * b.sum() if whole else 0
            return a.square().sum() + other

        train, val = closures(opt, loss, lambda _, a=a, b=b: (a - 1).square().sum() + (b - 1).square().sum())
        opt.step(train, val)
        found.append([*weights([a, b]), opt.rho])
        assert float(opt.rho) != 0.05
    assert same_bits(*found)


# ---- lazily negated and conjugated tensors -------------------------------------------------------------------------


def negated(t):
    """The same numbers, which memory holds with the other sign."""
    return torch._neg_view(t.neg())


def conjugated(t):
    return t.conj().resolve_conj().conj()


LAZY = {
    "real": (torch.float32, negated),
    "double": (torch.float64, negated),
    "complex": (torch.complex64, negated),
    "conjugated": (torch.complex64, conjugated),
}
PASSES = ("first", "second", "validation", "training", "state")


@pytest.mark.parametrize("count", [2, 5], ids=["a-list", "packed"])
@pytest.mark.parametrize("kind", LAZY)
@pytest.mark.parametrize("base", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("where", PASSES)
def test_lazily_negated_tensors_are_what_they_say(backend, base, where, kind, count):
    dtype, lazily = LAZY[kind]
    found = []
    for lazy in (False, True):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(4, dtype=dtype).to(backend.device)) for _ in range(count)]
        options = {"momentum": 0.9} if base is SGD else {}
        opt = lk.SAM(params, base, lk.LearnedRadius(0.1, lr=0.1), lr=0.1, backend=backend.name, **options)

        def gradients(name, params=params, lazy=lazy):
            for p in params:
                g = torch.randn(p.shape, dtype=dtype).to(p.device)
                p.grad = lazily(g) if lazy and name == where else g
            return torch.randn(()).to(params[0].device)

        for _ in range(3):
            if lazy and where == "state":
                for own in opt.state.values():
                    for name, t in own.items():
                        own[name] = lazily(t) if t.is_complex() or lazily is negated else t
            loss = gradients("first")
            opt.first_step(zero_grad=True, loss=loss)
            gradients("second")
            opt.second_step()
            opt.radius_step(lambda: gradients("training"), lambda: gradients("validation"))
        assert opt.fused
        state = [t.resolve_conj().resolve_neg() for own in opt.state.values() for t in own.values()]
        found.append([*weights(params), *state, opt.rho])
    assert same_bits(*([torch.view_as_real(t) if t.is_complex() else t for t in each] for each in found))


def test_a_parameter_that_became_negated_is_refused(backend):
    toy = Toy(shapes=((3,), (2, 2)), device=backend.device)
    opt = lk.SAM(toy.params, SGD, lr=0.1, backend=backend.name)
    toy.steps(opt, 1)
    toy.params[1].data = negated(toy.params[1].data)
    toy.set_grads(toy.grads(2))
    with pytest.raises(ValueError, match="resolve_neg"):
        opt.first_step()
    toy.params[1].data = toy.params[1].data.resolve_neg()
    toy.steps(opt, 1)
    toy.set_grads(toy.grads(2))
    opt.first_step()
    toy.params[1].data = negated(toy.params[1].data)
    with pytest.raises(RuntimeError, match=r"lazily negated.*resolve_neg"):
        opt.second_step()


# ---- radii that run away -------------------------------------------------------------------------------------------


def adversary(kind, sign, **options):
    """A step of ν that goes as far as numbers do, upwards or downwards."""
    p, q = (nn.Parameter(torch.linspace(-1, 1, 5, dtype=torch.float64)) for _ in range(2))
    radius = lk.LearnedRadius(0.05, optimizer=kind, lr=1e300, metric="validation_loss", **options)
    opt = lk.SAM([{"params": [p]}, {"params": [q]}], SGD, radius, lr=0.01)

    def loss(shift):
        return lambda _: (p + shift).square().sum() + (q + shift).square().sum()

    return opt, closures(opt, loss(0), lambda i: sign * loss(1)(i))


@pytest.mark.parametrize("per_group", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.Adam, SGD, torch.optim.RMSprop])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_learned_radius_stays_in_float32(kind, sign, per_group):
    opt, passes = adversary(kind, sign, per_group=per_group)
    for _ in range(4):
        opt.step(*passes)
        assert all(abs(nu.item()) == MOST_NU for nu in opt.radius.nu)
        assert bool(torch.isfinite(opt.rho.float()).all() & (opt.rho.float() > torch.finfo(torch.float32).tiny).all())
    saved = io.BytesIO()
    torch.save(opt.state_dict(), saved)
    saved.seek(0)
    twin, _ = adversary(kind, sign, per_group=per_group)
    twin.load_state_dict(torch.load(saved, weights_only=True))
    assert same_bits(twin.rho, opt.rho)


def test_a_learned_radius_that_waits_stays_in_its_bounds_and_takes_in_those_that_were_not():
    opt, (train, _) = adversary(SGD, 1, validation="next")
    for _ in range(3):
        opt.step(train)
    assert abs(opt.radius.nu[0].item()) == MOST_NU
    state = opt.state_dict()
    state["lets_kernels"]["radius"]["nu"][0].fill_(-1e6)
    opt.load_state_dict(state)
    assert opt.radius.nu[0].item() == -MOST_NU


@pytest.mark.parametrize("rho", [1e-36, 1e36])
def test_a_learned_radius_begins_in_its_bounds(rho):
    with pytest.raises(ValueError, match="stays within"):
        lk.LearnedRadius(rho)


# ---- steps that wait in a saved state ------------------------------------------------------------------------------


def waiting(cls=lk.SAM, dtype=torch.float32, **options):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(4, 2, dtype=dtype)) for _ in range(5)]
    radius = lk.LearnedRadius(0.1, lr=0.1, reuse_train_gradient=True, **options)
    return params, cls(params, ADAMW, radius, lr=0.05)


def train(params, opt, numbers):
    for i in numbers:
        generator = torch.Generator().manual_seed(i)
        at = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in params]

        def distance(sign, at=at):
            return lambda _: sum((p - sign * a).abs().pow(3).sum() for p, a in zip(params, at, strict=True))

        opt.step(*closures(opt, distance(1), distance(-1)))


DAMAGES = {
    "duplicate": lambda ascent, trial: ascent.update(indices=[0, 1, 2, 3, 3]),
    "negative": lambda ascent, trial: ascent.update(indices=[0, 1, 2, 3, -1]),
    "fractional": lambda ascent, trial: ascent.update(indices=[0, 1, 2, 3, 4.0]),
    "a-flag": lambda ascent, trial: ascent.update(indices=[0, True, 2, 3, 4]),
    "short-behind-a-duplicate": lambda ascent, trial: ascent.update(
        indices=[0, 0, 2, 3, 4], vectors=[torch.zeros(1), *ascent["vectors"][1:]]
    ),
    "short": lambda ascent, trial: ascent.update(vectors=[torch.zeros(1), *ascent["vectors"][1:]]),
    "another-dtype": lambda ascent, trial: ascent.update(vectors=[v.double() for v in ascent["vectors"]]),
    "no-vectors": lambda ascent, trial: ascent.update(vectors=[]),
    "short-gradient": lambda ascent, trial: trial["first"][0].update({2: torch.zeros(3)}),
    "twice": lambda ascent, trial: trial["ascents"].append(dict(ascent)),
    "large-scalar": lambda ascent, trial: trial.update(gate=torch.ones(2, dtype=torch.float64)),
    "q": lambda ascent, trial: ascent.update(q="2"),
    "lr": lambda ascent, trial: trial.update(lr=["fast"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_waiting_step_that_is_damaged_is_refused_before_anything_is_loaded(damage):
    params, opt = waiting()
    train(params, opt, range(2))
    state = copy.deepcopy(opt.state_dict())
    trial = state["lets_kernels"]["radius"]["pending"]["trial"]
    DAMAGES[damage](trial["ascents"][0], trial)
    twin_params, twin = waiting()
    train(twin_params, twin, range(1))
    before = [twin.rho.clone(), *(t.clone() for own in twin.state.values() for t in own.values())]
    with pytest.raises(ValueError, match="nothing of it was loaded: the step that waits"):
        twin.load_state_dict(state)
    assert same_bits(before, [twin.rho, *(t for own in twin.state.values() for t in own.values())])
    train(twin_params, twin, range(1, 2))


@pytest.mark.parametrize(
    "damage",
    [
        {"indices": [0, 1, 2, 3, 5]},
        {"indices": [0, 1, 2, 3, 5], "vectors": []},
        {"saved": torch.zeros(3)},
        {"saved": None},
    ],
    ids=["a-place-beyond", "a-place-beyond-without-vectors", "short-weights", "no-weights"],
)
def test_a_waiting_step_of_other_parameters_is_not_learned_from(damage):
    """They may have been frozen since; nothing is read by places that are not there."""
    params, opt = waiting(lk.ASAM, curvature="secant" if damage.get("vectors") == [] else "diagonal")
    train(params, opt, range(2))
    state = copy.deepcopy(opt.state_dict())
    state["lets_kernels"]["radius"]["pending"]["trial"]["ascents"][0].update(damage)
    opt.load_state_dict(state)
    rho = opt.rho.clone()
    opt.zero_grad()
    params[0].square().sum().backward()
    opt.first_step(loss=torch.zeros(()))
    assert same_bits(opt.rho, rho)
    opt.restore()


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.float32], ids=str)
@pytest.mark.parametrize("curvature", ["diagonal", "secant"])
@pytest.mark.parametrize("cls", [lk.VaSSO, lk.FriendlySAM, lk.ASAM])
def test_a_waiting_step_is_saved_beside_what_it_shares_memory_with(cls, curvature, dtype, weights_only):
    params, opt = waiting(cls, dtype, curvature=curvature)
    train(params, opt, range(3))
    saved = io.BytesIO()
    torch.save((opt.state_dict(), weights(params)), saved)
    train(params, opt, range(3, 6))
    saved.seek(0)
    state, start = torch.load(saved, weights_only=weights_only)
    twin_params, twin = waiting(cls, dtype, curvature=curvature)
    with torch.no_grad():
        for p, value in zip(twin_params, start, strict=True):
            p.copy_(value)
    twin.load_state_dict(state)
    train(twin_params, twin, range(3, 6))
    assert same_bits(
        *([torch.view_as_real(t) if t.is_complex() else t for t in weights(ps)] for ps in (params, twin_params))
    )
    assert same_bits(opt.rho, twin.rho)


# ---- classes of tensors --------------------------------------------------------------------------------------------


class TwoInside(torch.Tensor):
    """A tensor that is the sum of two others."""

    @staticmethod
    def __new__(cls, a, b):
        return torch.Tensor._make_wrapper_subclass(cls, a.shape, dtype=a.dtype, requires_grad=a.requires_grad)

    def __init__(self, a, b):
        self.a, self.b = a, b

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        sides = [_pytree.tree_map_only(cls, lambda t, side=side: getattr(t, side), args) for side in "ab"]
        found = [func(*side, **(kwargs or {})) for side in sides]
        return cls(*found) if isinstance(found[0], torch.Tensor) else found[0]


class Quantised(torch.Tensor):
    """Eight bits and a scale, which say they are float32."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scale)
        plain = _pytree.tree_map_only(cls, lambda t: t.values * t.scale, (args, kwargs or {}))
        return func(*plain[0], **plain[1])


WRAPPED = {
    "two-inside": lambda: TwoInside(torch.randn(4), torch.randn(4)),
    "quantised": lambda: Quantised(torch.ones(4, dtype=torch.int8), 0.1),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_tensor_that_keeps_its_numbers_elsewhere_is_refused(kind):
    p, q = nn.Parameter(WRAPPED[kind](), requires_grad=True), nn.Parameter(torch.ones(3))
    before = q.detach().clone()
    with pytest.raises(TypeError, match=rf"class .*{type(p).__name__} .*out of the groups.*train.*dequantize"):
        lk.SAM([q, p], SGD, lr=0.1)
    assert same_bits(q.detach(), before)
    p.requires_grad_(False)  # frozen, so nobody moves it
    opt = lk.SAM([q, p], SGD, lr=0.1)
    for _ in range(2):
        q.square().sum().backward()
        opt.first_step(zero_grad=True) if now(opt).step is None else opt.second_step(zero_grad=True)
    p.requires_grad_(True)
    q.square().sum().backward()
    with pytest.raises(TypeError, match=type(p).__name__):
        opt.first_step()


class OwnParameter(nn.Parameter):
    pass


class OwnTensor(torch.Tensor):
    pass


def test_a_class_without_dispatch_of_its_own_is_a_tensor_like_any_other(backend):
    found = []
    for make in (nn.Parameter, OwnParameter, lambda t: nn.Parameter(t.as_subclass(OwnTensor))):
        toy = Toy(device=backend.device)
        toy.params = [make(p.detach().clone()) for p in toy.params]
        toy.steps(lk.ASAM(toy.params, ADAMW, lr=0.1, backend=backend.name), 2)
        found.append([w.as_subclass(torch.Tensor) for w in weights(toy)])
    assert same_bits(found[0], found[1]) and same_bits(found[0], found[2])


# ---- another default device ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def default_device():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


ELSEWHERE = {
    "set_default_device": default_device,
    "with": lambda: torch.device("meta"),
    "nothing": contextlib.nullcontext,
}
BUILT = {
    "sgd": lambda net: lk.SAM(net.parameters(), SGD, lr=0.1, momentum=0.9),
    "adamw": lambda net: lk.SAM(net.parameters(), ADAMW, lr=0.01, model=net, same_rng=True),
    "rmsprop": lambda net: lk.ASAM(net.parameters(), torch.optim.RMSprop, lr=0.01),
    "flat": lambda net: lk.ASAM(net.parameters(), ADAMW, lr=0.01, flatten=True, rho_warmup=3),
    "reference": lambda net: lk.ASAM(net.parameters(), ADAMW, lr=0.01, backend="reference"),
    "foreach": lambda net: lk.ASAM(net.parameters(), ADAMW, lr=0.01, backend="foreach"),
    "lets": lambda net: lk.LETSSAM(net.parameters(), ADAMW, lr=0.01),
    "lets-reuse": lambda net: lk.LETSSAM(
        net.parameters(), ADAMW, lk.LearnedRadius(0.1, reuse_train_gradient=True, per_group=True), lr=0.01
    ),
    "lets-rmsprop": lambda net: lk.LETSSAM(
        net.parameters(), ADAMW, lk.LearnedRadius(0.1, curvature="secant", optimizer=torch.optim.RMSprop), lr=0.01
    ),
    "auto": lambda net: lk.SAM(net.parameters(), SGD, rho="auto", lr=0.1),
    "p1": lambda net: lk.SAM(net.parameters(), SGD, lr=0.1, direction=lk.Gradient(p=1)),
    "p1.05": lambda net: lk.SAM(net.parameters(), SGD, lr=0.1, direction=lk.Gradient(p=1.05)),
}


@pytest.mark.parametrize("method", [*BUILT, *ONE_EACH])
def test_the_device_that_torch_makes_tensors_on_does_not_matter(method):
    found = {}
    for name, elsewhere in ELSEWHERE.items():
        for inside in (True, False):
            task = Task(torch.float32, steps=5)
            with elsewhere() if inside else contextlib.nullcontext():
                torch.manual_seed(1)
                opt = BUILT[method](task.net) if method in BUILT else family.build(method, task, "adamw")
            with elsewhere():
                steps = family.run if method in FAMILY else lambda o, t, batches: t.run(o, batches, o.radius.learns)
                steps(opt, task, task.batches[:3])
                saved = io.BytesIO()
                torch.save(opt.state_dict(), saved)
                saved.seek(0)
                opt.load_state_dict(torch.load(saved))
                steps(opt, task, task.batches[3:])
                copy.deepcopy(opt)
                rho = opt.rho.clone()
                assert int(opt.skipped) == 0 and opt.metrics()
            found[name, inside] = [*weights(task), rho]
    assert all(same_bits(each, found["nothing", True]) for each in found.values())


def test_a_nested_parameter_is_refused_in_words(backend):
    parts = [torch.ones(2), torch.ones(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        p = torch.nn.Parameter(torch.nested.nested_tensor(parts))
    with pytest.raises(TypeError, match="a nested parameter cannot be perturbed"):
        lk.SAM([p], torch.optim.SGD, lr=0.1, backend=backend.name)
