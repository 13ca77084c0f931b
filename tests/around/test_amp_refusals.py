"""What would silently go wrong under a gradient scaler is refused; what fails leaves no trace in the next step."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import lets_kernels as lk
from lets_kernels.around.amp import handed_over
from support.call_shapes import SHAPES, Passes, run
from support.conv_net import Task
from support.given_gradients import snapshot, weights
from support.guard_bands import same_bits
from support.preloaded import in_processes


def built(steps=3, **options):
    task = Task(torch.float32, steps=steps)
    opt = lk.SAM(task.net.parameters(), torch.optim.SGD, rho=0.1, model=task.net, lr=0.1, momentum=0.9, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    return task, opt, scaler, Passes(task, scaler)


@pytest.mark.parametrize("by_keyword", [False, True])
def test_a_closure_for_the_scalers_step_is_refused_and_leaves_nothing_behind(by_keyword):
    """torch refuses the keyword itself. After it the way out, and two steps, are those of an untouched optimizer."""
    ends = []
    for refused in (False, True):
        task, opt, scaler, passes = built()
        if refused:
            before = weights(task)
            passes(task.batches[0][0])
            closure = passes.closure(task.batches[0][0])
            with pytest.raises(RuntimeError, match=r"(?i)closure"):
                scaler.step(opt, closure=closure) if by_keyword else scaler.step(opt, closure)
            assert same_bits(weights(task), before) and passes.count == 1
            opt.zero_grad()
            for module in task.net:  # the pass above was counted
                module.reset_running_stats() if isinstance(module, torch.nn.BatchNorm2d) else None
            if not by_keyword:
                scaler.update()
        run("closure", opt, task, slice(0, 1), scaler)
        run("two-steps", opt, task, slice(1, 2), scaler)
        ends.append(snapshot(opt))
    assert same_bits(*ends)


@pytest.mark.parametrize("context", [False, True])
def test_forgetting_to_unscale_the_first_pass_is_refused(context):
    """The scaler would never hear of an overflow there, and never back off; the weights come back."""
    task, opt, scaler, passes = built()
    before, batch = weights(task), task.batches[0][0]
    passes(batch)
    if context:
        with opt.perturbed():
            opt.zero_grad()
            passes(batch)
    else:
        opt.first_step(zero_grad=True)
        passes(batch)
    with pytest.raises(RuntimeError, match=r"opt\.unscale_first\(scaler\)"):
        scaler.step(opt)
    assert same_bits(weights(task), before) and "found_inf" not in vars(opt)
    scaler.update()
    run("two-steps", opt, task, slice(1, 2), scaler)
    assert not same_bits(weights(task), before)


@pytest.mark.parametrize("finish", ["second_step", "step"])
def test_stepping_past_the_scaler_is_refused_and_the_scaler_can_still_step(finish):
    """The second gradients would be too long by the scale, 65536 times here."""
    ends = []
    for mistaken in (False, True):
        task, opt, scaler, passes = built()
        passes(task.batches[0][0])
        opt.unscale_first(scaler)
        opt.first_step(zero_grad=True)
        passes(task.batches[0][0])
        if mistaken:
            with pytest.raises(RuntimeError, match=r"scaler\.step\(opt\)"):
                getattr(opt, finish)()
        scaler.step(opt)
        ends.append(snapshot(opt))
    assert same_bits(*ends)


def test_unscaling_the_first_pass_twice_or_late_is_refused():
    task, opt, scaler, passes = built()
    passes(task.batches[0][0])
    opt.unscale_first(scaler)
    before = [p.grad.clone() for p in task.net.parameters()]
    with pytest.raises(RuntimeError, match="already been called"):
        opt.unscale_first(scaler)
    assert same_bits([p.grad for p in task.net.parameters()], before)
    opt.first_step()
    with pytest.raises(RuntimeError, match="while the weights are perturbed"):
        opt.unscale_first(scaler)
    opt.restore()


def test_a_disabled_scaler_asks_for_nothing():
    task, opt, _, _ = built()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    passes = Passes(task, scaler)
    for unscale, step in ((True, opt.second_step), (False, lambda: scaler.step(opt))):
        passes(task.batches[0][0])
        if unscale:
            opt.unscale_first(scaler)
        opt.first_step(zero_grad=True)
        passes(task.batches[0][0])
        step()
        opt.zero_grad()
    reference, other, _, _ = built()
    run("two-steps", other, reference, slice(0, 1))
    run("two-steps", other, reference, slice(0, 1))
    assert same_bits(snapshot(opt), snapshot(other))


def test_float16_gradients_are_refused_by_the_scaler_before_a_weight_moves():
    p = torch.nn.Parameter(torch.linspace(-1, 1, 8).half())
    opt, scaler, before = lk.SAM([p], torch.optim.SGD, lr=0.1), torch.amp.GradScaler("cpu"), p.detach().clone()

    def closure():
        opt.zero_grad()
        loss = p.float().square().sum()
        scaler.scale(loss).backward()
        return loss

    with pytest.raises(ValueError, match="FP16"):
        opt.step(closure, scaler=scaler)
    assert same_bits(p.detach(), before)


@pytest.mark.parametrize("fail", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_that_fails_does_not_stand_in_the_way_of_the_next(shape, fail):
    """Out of memory in a pass, and on to the next batch without an update of the scaler in between."""
    ends = []
    for failing in (False, True):
        task, opt, scaler, _ = built()
        run(shape, opt, task, slice(0, 1), scaler)
        if failing:
            before, statistics = snapshot(opt), copy.deepcopy(task.net.state_dict())
            with pytest.raises(MemoryError):
                run(shape, opt, task, slice(1, 2), scaler, fail=fail)
            opt.restore()
            opt.zero_grad()
            assert same_bits(snapshot(opt), before)
            task.net.load_state_dict(statistics)
        run(shape, opt, task, slice(2, 3), scaler)
        ends.append(snapshot(opt))
    assert same_bits(*ends)


@pytest.mark.parametrize("fail", [3, 4])
def test_passes_of_the_radius_that_fail_do_not_stand_in_the_way_of_the_next_step(fail):
    task = Task(torch.float32, steps=2)
    opt = lk.LETSSAM(task.net.parameters(), torch.optim.SGD, 0.1, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    with pytest.raises(MemoryError):
        run("closure", opt, task, slice(0, 1), scaler, fail=fail)
    rho = opt.rho
    run("closure", opt, task, slice(1, 2), scaler)
    assert opt.rho != rho


@pytest.mark.parametrize("micro_batches", [False, True])
def test_gradients_that_are_refused_do_not_stand_in_the_way_of_the_next_step(micro_batches):
    """Unscaled already, and then not taken."""
    table, scaler = torch.nn.Embedding(4, 2, sparse=True), torch.amp.GradScaler("cpu", init_scale=2.0**16)
    opt = lk.SAM(table.parameters(), torch.optim.SGD, lr=0.1)

    def closure():
        opt.zero_grad()
        loss = table(torch.tensor([1])).square().sum()
        scaler.scale(loss).backward()
        return loss

    before = table.weight.detach().clone()
    with pytest.raises(TypeError, match="sparse=False"):
        opt.step([closure] if micro_batches else closure, scaler=scaler)
    assert same_bits(table.weight.detach(), before)
    table.sparse = False
    opt.step([closure] if micro_batches else closure, scaler=scaler)
    assert not same_bits(table.weight.detach(), before)


def test_a_scaler_that_saw_no_gradients_says_so_with_a_number():
    """The sum of no flags is Python's 0; what it hands over is a tensor all the same."""
    _, opt, _, _ = built()
    opt.found_inf = 0
    with handed_over(opt) as (scale, overflow):
        assert scale is None and torch.equal(overflow, torch.tensor(0))


def test_a_second_pass_without_gradients_is_no_overflow():
    task, opt, scaler, passes = built()
    before = weights(task)
    passes(task.batches[0][0])
    opt.unscale_first(scaler)
    opt.first_step(zero_grad=True)
    scaler.step(opt)
    scaler.update()
    assert same_bits(weights(task), before) and scaler.get_scale() == 2.0**16


def worker(rank, file, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    try:
        for shape in ("closure", "two-steps", "micro-batches"):
            task = Task(torch.float32, steps=3, net=torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(72, 3)))
            for p in task.net.parameters():
                torch.nn.init.constant_(p, 0.01)
            # Which batches a rank sees is its own.
            task.batches = [(task.batches[i][rank], None) for i in range(3)]
            task.net = torch.nn.parallel.DistributedDataParallel(task.net)
            opt = lk.SAM(task.net.parameters(), torch.optim.SGD, model=task.net, sync_perturbation=False, lr=0.1)
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
            run(shape, opt, task, slice(0, 1), scaler)
            run(shape, opt, task, slice(1, 2), scaler, spoil=1 if rank else None)
            scale = scaler.get_scale()
            run(shape, opt, task, slice(2, 3), scaler)
            results[shape, rank] = scale, opt.metrics()["skipped_steps"].item(), weights(task)
    finally:
        dist.destroy_process_group()


def test_the_scalers_of_all_ranks_back_off_where_the_own_pass_of_one_overflows(tmp_path):
    """Else their losses would be scaled differently from there on, and averaged."""
    with mp.Manager() as manager:
        results = manager.dict()
        in_processes(worker, (str(tmp_path / "store"), results), 2)
        for shape in ("closure", "two-steps", "micro-batches"):
            (scale, skipped, mine), (other_scale, other_skipped, other) = results[shape, 0], results[shape, 1]
            assert scale == other_scale == 2.0**15 and skipped == other_skipped == 1
            assert same_bits(mine, other)


@pytest.mark.parametrize("how", ["dropped", "refused"])
def test_a_first_pass_that_no_step_followed_leaves_nothing_behind(how):
    """A batch is dropped after unscale_first(), or first_step() refuses its gradients: the next is as any other."""
    theta = torch.nn.Parameter(torch.ones(3))
    opt = lk.SAM([theta], torch.optim.SGD, rho=0.1, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(theta.square().sum()).backward()
    opt.unscale_first(scaler)
    if how == "dropped":
        opt.zero_grad()
        scaler.update()
        theta.square().sum().backward()
        opt.first_step(zero_grad=True)
        theta.square().sum().backward()
        opt.second_step()
    else:
        theta.grad = torch.ones(3).to_sparse()
        with pytest.raises(TypeError, match="layout"):
            opt.first_step()
        theta.grad = None
        scaler.scale(theta.square().sum()).backward()
        opt.unscale_first(scaler)
        opt.first_step(zero_grad=True)
        scaler.scale(theta.square().sum()).backward()
        scaler.step(opt)
        scaler.update()
    # θ + ε = 1 + 0.1/√3 in each, then θ − 0.1 · 2(θ + ε); float32.
    torch.testing.assert_close(theta.detach(), torch.full((3,), 1 - 0.2 * (1 + 0.1 / 3**0.5)), rtol=1e-6, atol=0)
