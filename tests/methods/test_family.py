"""Every method of the family against a float64 transcription of its paper: ten steps on a conv net with batch norm."""

import copy
import math

import pytest
import torch
from torch import nn

import lets_kernels as lk
from support import family, oracle, papers
from support.backends import Backend
from support.conv_net import Task, conv_net
from support.core_methods import BASES
from support.family import FAMILY, ONE_EACH, SEED, STEPS, build, closure
from support.inside import held
from support.nearness import assert_near, norm

# As in test_methods.py: disturbing every weight of the start by 1e-13 of itself moves the end of a transcription's ten
# steps by 1e-12 at most, what it keeps by 2e-13 (measured, all methods, both bases). Rounding disturbs a step by 5e-16.
TIGHT = 1e-12

# The compiled ops by which each class is told from SAM, on the backend that is watched.
OPS = {
    lk.LookSAM: ("dots", "combine_"),
    lk.AELookSAM: ("dots", "combine_"),
    lk.GSAM: ("dots", "combine_"),
    lk.RGSAM: ("noise_", "filter_norms", "dots", "combine_"),
    lk.GradientNormPenalty: ("combine_",),
    lk.StableSAM: ("combine_",),
    lk.WSAM: ("combine_",),
    lk.RSAM: ("noise_", "filter_norms"),
    lk.RandomSAM: ("noise_",),
    lk.FriendlySAM: ("average_",),
    lk.VaSSO: ("average_",),
    lk.SparseSAM: ("count_above", "select_", "masked_"),
    lk.BSAM: ("noise_", "posterior_ascent_"),
}


def transcribe(name, task, base="momentum", **changes):
    """The paper's run of a method on the task, before the method itself has moved its net."""
    member, (_, transcription, options, _) = FAMILY[name], BASES[base]
    run = papers.Run(copy.deepcopy(task.net), task.weights(), task.batches, transcription(**options), SEED)
    member.paper(run, **{**member.arguments, **changes})
    return run


def assert_agrees(task, opt, run, own_base=False):
    """Weights, the base optimizer's state, and what the method itself keeps."""
    assert_near(task, opt, run.theta, oracle.SGD(lr=0.0) if own_base else run.base, TIGHT)
    for name, expected in run.held.items():
        state = opt.state if own_base else held(opt)
        found = {k: state[p][name] for k, p in task.net.named_parameters()}
        strayed = norm([found[k].double() - expected[k].double() for k in expected])
        assert strayed <= (0 if name == "mask" else TIGHT), f"{name}: off by {strayed:.3g}"


def task_for(name, backend):
    """Ten steps on the conv net. The reference makes the random numbers of each of a selection's 64 rounds with a
    hundred torch ops a parameter: there three steps on three parameters do, with two selections of each mask."""
    if backend.name == "reference" and FAMILY[name].cls is lk.SparseSAM:
        layers = nn.Linear(72, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)
        return Task(steps=3, net=nn.Sequential(nn.Flatten(), *layers).double())
    return Task(steps=STEPS)


def check(backend, name, base, **options):
    task = task_for(name, backend)
    run = transcribe(name, task, base, **options)
    opt = build(name, task, base, backend=backend.name, **options)
    with backend.watch("perturb_", *OPS.get(FAMILY[name].cls, ())):
        family.run(opt, task)
    assert opt.fused is (BASES[base][3] is not None)
    assert_agrees(task, opt, run, own_base=not FAMILY[name].base)
    passes = 1 if name in family.ONE_PASS else 1 + opt.direction.ascents
    assert opt.metrics()["gradients"] == sum(passes if perturbed else 1 for perturbed in run.perturbed)
    return task, opt, run


def test_every_method_has_a_transcription():
    """In papers.py, under the name that its page has for the command line, where it has no line in FAMILY."""
    assert [name for name, member in FAMILY.items() if member.paper is None] == []


@pytest.mark.parametrize("name", FAMILY)
def test_every_method_takes_its_papers_ten_steps(backend, name):
    check(backend, name, "momentum")


#: Options that are not those of a member's line in FAMILY.
OTHERWISE = [
    ("norm-penalty", {"normalized": True}),
    ("esam-tensor", {"drawn_norm": True}),
    ("esam-tensor", {"drawn_norm": True, "adaptive": True}),
    ("esam-tensor", {"adaptive": True}),
    ("esam", {"adaptive": True}),
    ("friendly", {"adaptive": True}),
    ("vasso", {"adaptive": True}),
]


@pytest.mark.parametrize("name, options", OTHERWISE, ids=lambda x: x if isinstance(x, str) else "-".join(x))
def test_every_method_takes_its_papers_ten_steps_with_other_options(backend, name, options):
    check(backend, name, "momentum", **options)


@pytest.mark.parametrize("name", [name for name in ONE_EACH if FAMILY[name].base])
def test_and_with_adamw(name):
    check(Backend("cpu"), name, "adamw")


@pytest.mark.parametrize(
    "name", ["looksam", "looksam-per-tensor", "gsam", "norm-penalty", "stable-sam", "wsam", "friendly", "rsam", "esam"]
)
def test_and_with_a_base_optimizer_that_steps_by_itself(name):
    """It reads what the descent has made from the parameters' own gradients."""
    check(Backend("cpu"), name, "rmsprop")


def test_bsams_step_in_pytorch_is_the_papers_too():
    """A hook on the base optimizer keeps its step from being fused with the restore."""
    task = Task()
    run, opt = transcribe("bsam", task), build("bsam", task)
    opt.base_optimizer.register_step_post_hook(lambda *_: None)
    family.run(opt, task)
    assert not opt.fused
    assert_agrees(task, opt, run, own_base=True)


@pytest.mark.parametrize("name", ONE_EACH)
def test_weights_that_lie_in_memory_channels_last(name):
    """What is kept and drawn lies as they do, also after it has been saved and loaded; filters are those of before."""
    net = conv_net().to(memory_format=torch.channels_last)
    task = Task(steps=4, net=net)
    run = transcribe(name, task)
    opt = build(name, task)
    family.run(opt, task, task.batches[:2])
    saved = copy.deepcopy(opt.state_dict())
    opt = build(name, task)
    opt.load_state_dict(saved)
    family.run(opt, task, task.batches[2:])
    assert not net[0].weight.is_contiguous()
    assert_agrees(task, opt, run, own_base=not FAMILY[name].base)


@pytest.mark.parametrize("name", FAMILY)
def test_groups_with_radii_of_their_own(name):
    """Norms, products, draws and masks are over all groups; only the radius is a group's."""
    task = Task(steps=4)
    names = list(task.weights())
    groups = [names[:3], names[3:]]
    radii = {**dict.fromkeys(groups[0], 0.02), **dict.fromkeys(groups[1], 0.2)}
    run = transcribe(name, task, rho=radii)
    parameters = dict(task.net.named_parameters())
    own = [{"params": [parameters[k] for k in group], "rho": radii[group[0]]} for group in groups]
    opt = build(name, own, model=task.net)
    family.run(opt, task)
    assert_agrees(task, opt, run, own_base=not FAMILY[name].base)


@pytest.mark.parametrize("name", ["aesam", "aelooksam"])
def test_the_mean_and_the_variance_of_ae_sam(backend, name):
    """Weights that are off by 1e-12 have a squared norm of the gradient that is off by a few times that, in parts of
    itself: a curvature of about ten over a gradient of about one."""
    _, opt, run = check(backend, name, "momentum")
    assert set(run.perturbed) == {False, True}, "the rule said the same at every step: nothing was tested"
    found = opt.schedule.state_dict()
    assert found["mean"] == pytest.approx(run.mean, rel=1e-11)
    assert found["variance"] == pytest.approx(run.variance, rel=1e-11)


def test_gsams_radius_follows_the_learning_rate(backend):
    task, base = Task(), oracle.SGD(lr=0.1, momentum=0.9)

    def falling():
        for t, pair in enumerate(task.batches):
            base.lr = 0.1 * 0.8**t
            yield pair

    run = papers.Run(copy.deepcopy(task.net), task.weights(), falling(), base, SEED)
    papers.gsam(run, lambda lr: 0.05 + (0.3 - 0.05) * (lr - 0.01) / (0.1 - 0.01), 0.4)
    radius = lk.LearningRateRadius(0.3, 0.05, lr_min=0.01)
    opt = lk.GSAM(task.net.parameters(), torch.optim.SGD, radius, 0.4, backend=backend.name, lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.8)
    for batch, _ in task.batches:
        opt.step(closure(opt, task.net, batch))
        scheduler.step()
    assert_near(task, opt, run.theta, base, TIGHT)


def test_the_shapes_of_rsts_probability():
    """Bounds at both ends, half way in the middle, a straight line and half a cosine in between; then it stays."""
    linear = lk.Bernoulli(0.2, end=0.8, steps=4, shape="linear")
    cosine = lk.Bernoulli(0.2, end=0.8, steps=4, shape="trigonometric")
    assert [linear.probability(t) for t in range(6)] == pytest.approx([0.2, 0.35, 0.5, 0.65, 0.8, 0.8])
    quarter = 0.2 + 0.6 * (1 - math.sqrt(0.5)) / 2
    expected = [0.2, quarter, 0.5, 1.0 - quarter, 0.8, 0.8]
    assert [cosine.probability(t) for t in range(6)] == pytest.approx(expected)


def test_the_fisher_mask_of_single_samples(backend):
    """The elements with the largest sum of squares over n samples' own gradients, as the paper selects them."""
    task = Task(steps=3)
    task.net.eval()  # batch norm takes no batch of one
    (x, y), _ = task.batches[0]
    sums, theta = {}, task.weights()
    for i in range(len(x)):
        _, g = oracle.gradient(task.functional(), theta, (x[i : i + 1], y[i : i + 1]))
        sums = {k: sums.get(k, 0) + g[k] ** 2 for k in g}
    flat = torch.cat([sums[k].reshape(-1) for k in theta])
    expected = torch.zeros_like(flat, dtype=torch.bool).index_fill(0, flat.topk(round(0.3 * len(flat))).indices, True)

    opt = build("sparse", task, sparsity=0.7, backend=backend.name)
    samples = iter(range(len(x)))

    def one():
        i = next(samples)
        return closure(opt, task.net, (x[i : i + 1], y[i : i + 1]))()

    closure(opt, task.net, task.batches[1][0])()
    before = [p.grad.clone() for p in task.net.parameters()]
    opt.update_mask(one, samples=len(x))
    assert all(torch.equal(p.grad, g) for p, g in zip(task.net.parameters(), before, strict=True))
    found = torch.cat([held(opt)[p]["mask"].reshape(-1) for p in task.net.parameters()])
    assert torch.equal(found.bool(), expected)
    family.run(opt, task)  # and it stays: interval=None
    found = torch.cat([held(opt)[p]["mask"].reshape(-1) for p in task.net.parameters()])
    assert torch.equal(found.bool(), expected)


@pytest.mark.parametrize("name", ["sparse", "sparse-dynamic"])
def test_the_mask_is_there_from_the_first_step_and_keeps_its_share(name):
    task = Task(steps=3)
    opt = build(name, task, sparsity=0.9)
    total = sum(p.numel() for p in task.net.parameters())
    masks = []
    for batch, _ in task.batches:
        opt.step(closure(opt, task.net, batch))
        masks.append(torch.cat([held(opt)[p]["mask"].reshape(-1) for p in task.net.parameters()]))
        assert masks[-1].sum() == round(0.1 * total)
        assert set(masks[-1].unique().tolist()) == {0, 1}
    assert torch.equal(masks[0], masks[2]) is (name == "sparse")
