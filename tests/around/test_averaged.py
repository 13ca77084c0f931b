"""torch.optim.swa_utils around the optimizers: averages are of restored weights, SWALR and update_bn do as ever."""

import copy

import pytest
import torch
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

import lets_kernels as lk
from support.conv_net import Task
from support.given_gradients import weights
from support.guard_bands import same_bits

METHODS = {
    "sam": (lk.SAM, {"rho": 0.3}),
    "asam-flat": (lk.ASAM, {"rho": 0.5, "flatten": True}),
    "gsam": (lk.GSAM, {"rho": lk.LearningRateRadius}),
    "looksam": (lk.LookSAM, {"rho": 0.3, "k": 2}),
    "rsam": (lk.RSAM, {"rho": 0.3, "gamma": 0.1, "seed": 3}),
}
SHAPES = ("closure", "two-steps", "context")
STEPS = 6


def made(method):
    cls, options = METHODS[method]
    options = {k: v(0.3, 0.1) if isinstance(v, type) else v for k, v in options.items()}
    task = Task(torch.float64, steps=STEPS)
    return task, cls(task.net.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, model=task.net, **options)


def step(task, opt, batch, shape):
    """One step in this call shape."""

    def closure():
        opt.zero_grad()
        loss = task.loss(batch)
        loss.backward()
        return loss

    if shape == "closure":
        opt.step(closure)
        return
    with opt.first_pass():
        closure()
    if shape == "two-steps":
        if opt.first_step(zero_grad=True):
            closure()
        opt.second_step()
    else:
        with opt.perturbed() as needed:
            if needed:
                closure()
        opt.step()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_the_average_is_that_of_the_weights_between_steps(method, shape):
    """By hand: the mean, and the decayed mean, of copies taken after each step of a run without any average."""
    alone, opt = made(method)
    copies = []
    for batch, _ in alone.batches:
        step(alone, opt, batch, shape)
        copies.append(weights(alone))
    task, opt = made(method)
    mean, decayed = AveragedModel(task.net), AveragedModel(task.net, multi_avg_fn=get_ema_multi_avg_fn(0.7))
    for batch, _ in task.batches:
        step(task, opt, batch, shape)
        for average in (mean, decayed):
            average.update_parameters(task.net)
    assert same_bits(weights(task), copies[-1])  # an average that looks on changes no step
    by_hand = copies[0]
    for later in copies[1:]:
        by_hand = [0.7 * a + 0.3 * b for a, b in zip(by_hand, later, strict=True)]
    # Six float64 values of size one, added up otherwise: a few units of 2^-53.
    for i, (a, b) in enumerate(zip(weights(mean), weights(decayed), strict=True)):
        assert torch.allclose(a, torch.stack([c[i] for c in copies]).mean(0), rtol=1e-14, atol=1e-15)
        assert torch.allclose(b, by_hand[i], rtol=1e-14, atol=1e-15)
    spread = max((c[0] - copies[0][0]).abs().max() for c in copies)
    assert spread > 1e-3  # else the average of anything would do


@pytest.mark.parametrize("method", METHODS)
def test_an_average_is_not_begun_at_perturbed_weights(method):
    """AveragedModel copies the model, which `model=` refuses while the weights are perturbed."""
    task, opt = made(method)
    with opt.first_pass():
        task.loss(task.batches[0][0]).backward()
    with opt.perturbed(), pytest.raises(RuntimeError, match="perturbed"):
        AveragedModel(task.net)
    AveragedModel(task.net)


@pytest.mark.parametrize("method", METHODS)
def test_update_bn_gives_the_averaged_model_statistics_of_its_own(method):
    task, opt = made(method)
    average = AveragedModel(task.net)
    inputs = [x for (x, _), _ in task.batches]
    for batch, _ in task.batches:
        step(task, opt, batch, "closure")
        average.update_parameters(task.net)
    twin = copy.deepcopy(average.module)
    update_bn(inputs, average)
    seen = {}
    for name in ("1", "4"):
        seen[name] = []
        twin.get_submodule(name).register_forward_pre_hook(lambda m, x, kept=seen[name]: kept.append(x[0].detach()))
    twin.train()
    for x in inputs:
        twin(x)
    for name, kept in seen.items():
        layer = average.module.get_submodule(name)
        assert layer.num_batches_tracked == len(inputs) and layer.momentum == 0.1
        # The mean over the batches of the mean and of the unbiased variance of each; sums in another order.
        for found, of in ((layer.running_mean, torch.Tensor.mean), (layer.running_var, torch.Tensor.var)):
            expected = torch.stack([of(x, (0, 2, 3)) for x in kept]).mean(0)
            assert torch.allclose(found, expected, rtol=1e-12, atol=1e-14)


def test_update_bn_on_the_trained_model_between_steps():
    """The guard that lets running statistics count once a step is gone between steps, and comes back with the next."""
    task, opt = made("sam")
    twin, other = made("sam")
    step(task, opt, task.batches[0][0], "closure")
    step(twin, other, twin.batches[0][0], "closure")
    inputs = [x for (x, _), _ in task.batches[:3]]
    plain = copy.deepcopy(task.net)
    for net in (task.net, plain, twin.net):
        update_bn(inputs, net)
    assert same_bits(list(task.net.buffers()), list(plain.buffers()))
    step(task, opt, task.batches[1][0], "closure")
    step(twin, other, twin.batches[1][0], "two-steps")
    assert same_bits(list(task.net.buffers()), list(twin.net.buffers()))
    assert task.net[1].num_batches_tracked == len(inputs) + 1


@pytest.mark.parametrize("of", ["wrapper", "base"])
@pytest.mark.parametrize("method", ["sam", "gsam", "looksam"])
def test_swalr_drives_the_steps(method, of):
    """Linear annealing from 0.1 to 0.02 in four steps; each is the step that this learning rate gives by hand."""
    task, opt = made(method)
    twin, other = made(method)
    swalr = SWALR(
        opt if of == "wrapper" else opt.base_optimizer, swa_lr=0.02, anneal_epochs=4, anneal_strategy="linear"
    )
    expected = [0.1, 0.08, 0.06, 0.04, 0.02, 0.02]
    for (batch, _), lr in zip(task.batches, expected, strict=True):
        assert opt.param_groups[0]["lr"] == opt.base_optimizer.param_groups[0]["lr"] == pytest.approx(lr, rel=1e-12)
        other.param_groups[0]["lr"] = opt.param_groups[0]["lr"]
        before = opt.rho.clone()
        step(task, opt, batch, "closure")
        step(twin, other, batch, "closure")
        if method == "gsam":  # its radius goes by the learning rate: 0.1 at zero, 0.3 at the first
            assert float(opt.rho) == pytest.approx(0.1 + 0.2 * lr / 0.1, rel=1e-12)
            assert lr in (0.1, 0.02) or float(before) != float(opt.rho)
        swalr.step()
    assert same_bits(weights(task), weights(twin))


def test_averages_resume(tmp_path):
    """A run that is saved in the middle, optimizer, SWALR and average, ends as one that was not."""

    def parts():
        task, opt = made("gsam")
        return task, opt, AveragedModel(task.net), SWALR(opt, swa_lr=0.02, anneal_epochs=4)

    def run(task, opt, average, swalr, batches):
        for batch, _ in batches:
            step(task, opt, batch, "closure")
            average.update_parameters(task.net)
            swalr.step()

    whole, first, second = parts(), parts(), parts()
    run(*whole, whole[0].batches)
    run(*first, first[0].batches[:3])
    saved = [part.state_dict() for part in (first[0].net, *first[1:])]
    torch.save(saved, tmp_path / "run.pt")
    for part, state in zip((second[0].net, *second[1:]), torch.load(tmp_path / "run.pt"), strict=True):
        part.load_state_dict(state)
    run(*second, second[0].batches[3:])
    assert same_bits(weights(second[0]) + weights(second[2]), weights(whole[0]) + weights(whole[2]))
