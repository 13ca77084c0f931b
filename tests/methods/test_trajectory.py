"""SAF and MESA: the loss is the paper's, its records are those of E epochs ago, and nothing comes of extreme logits."""

import copy
import math

import pytest
import torch
from torch.nn import functional

import lets_kernels as lk
from support.accelerator import DEVICE, needs_gpu
from support.guard_bands import same_bits

SAMPLES, CLASSES, EPOCHS = 23, 5, 3


def transcription(outputs, past, temperature, seen=None):
    """(1/B) sum over the batch of sum_c p_c (log p_c - log q_c), in float64 and in plain numbers."""
    total = 0.0
    for i, (now, then) in enumerate(zip(outputs.tolist(), past.tolist(), strict=True)):
        if seen is None or seen[i]:
            p, q = (softmax([x / temperature for x in row]) for row in (then, now))
            total += math.fsum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
    return total / len(outputs)


def softmax(row):
    powers = [math.exp(x - max(row)) for x in row]
    return [x / math.fsum(powers) for x in powers]


def logits(*shape, dtype=torch.float64, scale=3.0):
    return (scale * torch.randn(*shape, dtype=torch.float64)).to(dtype)


def saf(**options):
    return lk.SAF(
        SAMPLES, CLASSES, **{"epochs": EPOCHS, "start": 0, "dtype": torch.float64, "rescale": False, **options}
    )


def epochs_of(batches, count, term, outputs):
    """Runs `count` epochs of these batches; yields (epoch, index, outputs now, the term)."""
    for epoch in range(count):
        term.set_epoch(epoch)
        for index in batches(epoch):
            now = outputs[epoch][index]
            yield epoch, index, now, term(now, index)


def shuffled(size=4, drop_last=True):
    def batches(epoch):
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(epoch))
        split = order.split(size)
        return split[: SAMPLES // size] if drop_last else split

    return batches


# ---- the loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 5.0])
def test_the_loss_is_the_papers(temperature):
    now, past, seen = logits(7, CLASSES), logits(7, CLASSES), torch.arange(7) % 3 != 1
    # Sums of a few terms of size one, in float64.
    for mask in (None, seen):
        found = lk.trajectory_loss(now, past, temperature, seen=mask)
        assert found.item() == pytest.approx(transcription(now, past, temperature, mask), rel=1e-12, abs=1e-13)
    scaled = lk.trajectory_loss(now, past, temperature, rescale=True)
    assert scaled.item() == pytest.approx(temperature**2 * transcription(now, past, temperature), rel=1e-12)


def test_float32_is_float64_rounded():
    now, past = logits(64, 100, dtype=torch.float32), logits(64, 100, dtype=torch.float32)
    exact = transcription(now.double(), past.double(), 5.0)
    found = lk.trajectory_loss(now, past)
    assert found.dtype == torch.float32
    # log-probabilities of size log(100) = 5 are rounded to 2^-24 each and differ by less: 100 terms with weights that
    # sum to one, so a few times 5 * 2^-24 in all.
    assert found.item() == pytest.approx(exact, abs=4 * 5 * 2**-24)


def test_gradients_go_through_the_outputs_now_and_are_those_of_finite_differences():
    now, past = logits(6, CLASSES).requires_grad_(), logits(6, CLASSES).requires_grad_()
    seen = torch.tensor([True, False, True, True, False, True])
    assert torch.autograd.gradcheck(lambda y: lk.trajectory_loss(y, past.detach(), 2.0, seen=seen), (now,))
    lk.trajectory_loss(now, past, 2.0, seen=seen).backward()
    assert past.grad is None
    assert torch.equal(now.grad.abs().sum(1) > 0, seen)
    # The derivative by hand: (softmax(y / tau) - softmax(y_past / tau)) / (tau B).
    by_hand = (functional.softmax(now / 2, 1) - functional.softmax(past / 2, 1)) / (2 * 6)
    assert torch.allclose(now.grad, by_hand.detach() * seen[:, None], rtol=1e-12, atol=1e-15)


def test_equal_outputs_have_no_divergence_whatever_is_added_to_them():
    now = logits(4, CLASSES).requires_grad_()
    loss = lk.trajectory_loss(now, now.detach() + 100.0)
    loss.backward()
    # 100 + y is rounded to 2^-46; the loss is quadratic in that, so its own rounding is all that is left.
    assert abs(loss.item()) < 1e-13
    assert now.grad.abs().max() < 1e-13


@pytest.mark.parametrize("temperature", [0.1, 5.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_extreme_logits_give_no_nan(dtype, temperature):
    top = torch.finfo(dtype).max
    rows = [[top, -top, 0.0], [-top, top, 0.0], [top, top, top], [-top, -top, -top], [-math.inf, 0.0, top], [0.0, 0, 0]]
    rows = torch.tensor(rows, dtype=torch.float64).clamp(-top, None).to(dtype)
    rows[4, 0] = -math.inf
    pairs = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    now, past = rows[pairs[:, 0]].requires_grad_(), rows[pairs[:, 1]]
    for i in range(len(pairs)):
        one = now[i : i + 1].detach().requires_grad_()
        loss = lk.trajectory_loss(one, past[i : i + 1], temperature)
        loss.backward()
        assert not loss.isnan(), (rows[pairs[i, 0]], rows[pairs[i, 1]])
        assert loss >= 0
        assert torch.isfinite(one.grad).all()


def test_an_empty_batch_has_no_loss():
    assert lk.trajectory_loss(torch.zeros(0, 4), torch.zeros(0, 4)) == 0


# ---- the records ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drop_last", [True, False])
def test_records_are_those_of_e_epochs_ago(drop_last):
    """Shuffled batches, and dropped last ones: what an epoch did not see has no record E epochs later."""
    outputs, term, batches = logits(9, SAMPLES, CLASSES), saf(weight=0.3, temperature=2.0), shuffled(4, drop_last)
    met = [set(torch.cat(list(batches(e))).tolist()) for e in range(9)]
    unseen = 0
    for epoch, index, now, loss in epochs_of(batches, 9, term, outputs):
        if epoch < EPOCHS:
            assert loss == 0
            continue
        past, seen = outputs[epoch - EPOCHS][index], [i in met[epoch - EPOCHS] for i in index.tolist()]
        unseen += len(seen) - sum(seen)
        # Recorded in float64; y - max(y) is rounded once, to 2^-53 of some 10.
        assert loss.item() == pytest.approx(0.3 * transcription(now, past, 2.0, seen), rel=1e-11, abs=1e-13)
    assert (unseen > 0) == drop_last


@pytest.mark.parametrize("start", [0, 2, 5])
def test_there_is_no_term_and_no_gradient_before_it_starts(start):
    outputs, term = logits(8, SAMPLES, CLASSES).requires_grad_(), saf(start=start)
    for epoch, _, _, loss in epochs_of(shuffled(), 8, term, outputs):
        assert loss.requires_grad == (epoch >= max(start, EPOCHS))
        assert (loss > 0) == (epoch >= max(start, EPOCHS))
    (total,) = torch.autograd.grad(sum(x for *_, x in epochs_of(shuffled(), 8, saf(start=start), outputs)), outputs)
    assert (total.abs().sum((1, 2)) > 0).tolist() == [epoch >= max(start, EPOCHS) for epoch in range(8)]


def test_a_batch_without_records_adds_nothing_to_a_gradient():
    """Half of the data set is met for the first time in epoch 3, and epoch 1 saw what epoch 4 sees."""
    term, halves = saf(), (torch.arange(10), torch.arange(10, 20))
    for epoch in range(3):
        term.set_epoch(epoch)
        term(logits(10, CLASSES), halves[0])
    term.set_epoch(3)
    now = logits(10, CLASSES).requires_grad_()
    loss = term(now, halves[1])
    assert loss == 0
    loss.backward()
    assert torch.equal(now.grad, torch.zeros_like(now))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_records_in_a_small_dtype_err_by_its_rounding(dtype):
    """y - max(y) loses a share 2^-p of itself, so log p does, and the softmax of what is left as much again."""
    outputs, term = logits(4, SAMPLES, CLASSES, scale=30.0), saf(dtype=dtype, weight=1.0)
    unit = torch.finfo(dtype).eps / 2
    for epoch, index, now, loss in epochs_of(shuffled(drop_last=False), 4, term, outputs):
        if epoch == EPOCHS:
            past = outputs[0][index]
            exact = transcription(now, past, 5.0)
            distance = (past.amax(1) - past.amin(1)).max().item() / 5
            gap = (functional.log_softmax(past / 5, 1) - functional.log_softmax(now / 5, 1)).abs().max().item()
            # d KL = sum p dlog p (log p - log q + 1), with |dlog p| <= 2 unit distance.
            assert abs(loss.item() - exact) <= 2 * unit * distance * (gap + 1)


def test_memory_is_what_is_said_and_stays(tmp_path):
    term = lk.SAF(1000, 17, epochs=4)
    assert term.nbytes == 4 * 1000 * (17 * 2 + 4)
    kept = {t.untyped_storage().data_ptr() for t in term.state_dict().values() if torch.is_tensor(t)}
    for epoch in range(9):
        term.set_epoch(epoch)
        for index in torch.randperm(1000).split(100):
            term(logits(100, 17, dtype=torch.float32).requires_grad_(), index)
    assert {t.untyped_storage().data_ptr() for t in term.state_dict().values() if torch.is_tensor(t)} == kept
    torch.save(term.state_dict(), tmp_path / "saf.pt")
    # Everything it holds is in its state: the file has the records, and a few KiB of its own.
    assert term.nbytes <= (tmp_path / "saf.pt").stat().st_size < term.nbytes + 8192


def test_outputs_that_are_not_finite_are_not_recorded():
    """As those of a step that check_finite skips: they must not come back E epochs later."""
    term, index = saf(), torch.arange(3)
    bad = torch.tensor([[math.nan, 0, 0, 0, 0], [math.inf, 0, 0, 0, 0], [-math.inf, 0, 1, 2, 3]]).double()
    term.set_epoch(0)
    term(bad, index)
    term.set_epoch(3)
    now = logits(3, CLASSES).requires_grad_()
    loss = term(now, index)
    loss.backward()
    past = torch.tensor([0, 1, 2, 3]).double()
    kept = functional.softmax(past / 5, 0)
    q = functional.log_softmax(now[2] / 5, 0)[1:]
    assert loss.item() == pytest.approx(0.3 / 3 * (kept * (kept.log() - q)).sum().item(), rel=1e-12)
    assert (now.grad.abs().sum(1) > 0).tolist() == [False, False, True]


def test_a_second_pass_over_a_batch_finds_the_same_records():
    """With record=False, as in a closure that is called twice; without it, the record is overwritten and zero."""
    outputs, index = logits(4, SAMPLES, CLASSES), torch.arange(6)
    term = saf()
    for epoch in range(4):
        term.set_epoch(epoch)
        first = term(outputs[epoch][index], index, record=False)
        second = term(outputs[epoch][index], index)
        assert torch.equal(first, second)
    assert second > 0
    assert term(outputs[3][index], index) == 0


def test_resuming_within_an_epoch_goes_on_as_if_nothing_had_happened(tmp_path):
    outputs, batches = logits(8, SAMPLES, CLASSES), shuffled()
    whole = [x for *_, x in epochs_of(batches, 8, saf(dtype=torch.float16), outputs)]
    first, seen = saf(dtype=torch.float16), []
    for epoch, index, _, loss in epochs_of(batches, 8, first, outputs):
        seen.append(loss)
        if epoch == 4 and torch.equal(index, batches(4)[2]):
            torch.save(first.state_dict(), tmp_path / "saf.pt")
            break
    resumed = saf(dtype=torch.float16)
    resumed.load_state_dict(torch.load(tmp_path / "saf.pt", weights_only=True))
    assert resumed.epoch == 4
    seen += [resumed(outputs[4][index], index) for index in batches(4)[3:]]
    for epoch in range(5, 8):
        resumed.set_epoch(epoch)
        seen += [resumed(outputs[epoch][index], index) for index in batches(epoch)]
    assert same_bits(seen, whole)


def test_training_takes_one_gradient_a_step_and_moves_less_far():
    """SGD on cross-entropy plus SAF: backward is called once a step, and a strong term holds the outputs back."""

    def trained(weight):
        torch.manual_seed(0)
        net, inputs, targets = torch.nn.Linear(6, CLASSES), torch.randn(SAMPLES, 6), torch.arange(SAMPLES) % CLASSES
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        term = lk.SAF(SAMPLES, CLASSES, epochs=2, start=0, weight=weight, temperature=1.0)
        backwards, ends = [], []
        net.weight.register_hook(lambda g: backwards.append(1))
        for epoch in range(10):
            term.set_epoch(epoch)
            for index in shuffled()(epoch):
                optimizer.zero_grad()
                outputs = net(inputs[index])
                (functional.cross_entropy(outputs, targets[index]) + term(outputs, index)).backward()
                optimizer.step()
            ends.append(net(inputs).detach())
        assert len(backwards) == 10 * (SAMPLES // 4)
        return lk.trajectory_loss(ends[-1], ends[-3], 1.0)

    assert trained(2.0) < trained(0.0)


def test_by_default_the_strength_and_the_first_epoch_are_the_authors():
    """lambda tau^2 = 0.3 * 25 and 0.8 * 25, from the epoch after number 5 on."""
    net = small_net().double()
    outputs, inputs = [logits(9, 5) for _ in range(7)], logits(9, 6)
    saf, mesa = lk.SAF(9, 5, dtype=torch.float64), lk.MESA(net)
    mesa.update(net)
    for epoch in range(7):
        for term in (saf, mesa):
            term.set_epoch(epoch)
        found = saf(outputs[epoch], torch.arange(9)), mesa(outputs[epoch], inputs)
        assert epoch == 6 or found == (0, 0)
    # Recorded in float64; y - max(y) is rounded once, to 2^-53 of some 10.
    pasts = (0.3, outputs[3]), (0.8, net.eval()(inputs))
    expected = (25 * weight * transcription(outputs[6], y, 5.0) for weight, y in pasts)
    for term, value in zip(found, expected, strict=True):
        assert term.item() == pytest.approx(value, rel=1e-11, abs=1e-13)


# ---- MESA -----------------------------------------------------------------------------------------------------------


def small_net():
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Tanh(), torch.nn.Linear(8, 5))


@pytest.mark.parametrize("initial", [False, True])
def test_mesa_is_the_loss_against_an_average_of_the_model(initial):
    """An update before the first step begins the average with the initial weights, as in the authors' code."""
    net = small_net().double()
    mesa = lk.MESA(net, decay=0.8, start=1, weight=0.7, temperature=2.0, rescale=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    average = None
    if initial:
        mesa.update(net)
        average = {k: v.clone() for k, v in net.state_dict().items()}
    twin = small_net().double().eval()
    for step in range(6):
        mesa.set_epoch(step // 2)
        inputs = logits(9, 6)
        outputs = net(inputs)
        term = mesa(outputs, inputs)
        if step < 2:
            assert term == 0 and not term.requires_grad
        else:
            twin.load_state_dict(average)
            expected = 0.7 * transcription(outputs, twin(inputs), 2.0)
            # Averaging is a lerp, rounded otherwise than the transcription: some units of 2^-53 on logits of size one.
            assert term.item() == pytest.approx(expected, rel=1e-10, abs=1e-13)
        optimizer.zero_grad()
        (functional.cross_entropy(outputs, torch.arange(9) % 5) + term).backward()
        optimizer.step()
        mesa.update(net)
        now = {k: v.clone() for k, v in net.state_dict().items()}
        average = now if average is None else {k: _averaged(average[k], now[k], 0.8) for k in now}
    assert all(p.grad is None and not p.requires_grad for p in mesa.average.parameters())
    assert net.training and not mesa.average.training


def _averaged(old, new, decay):
    return decay * old + (1 - decay) * new if old.is_floating_point() else new


def test_mesa_resumes(tmp_path):
    torch.manual_seed(1)
    net = small_net()
    mesa = lk.MESA(net, decay=0.5, start=0)
    for _ in range(3):
        torch.nn.init.normal_(net[0].weight)
        mesa.update(net)
    mesa.set_epoch(7)
    torch.save(mesa.state_dict(), tmp_path / "mesa.pt")
    again = lk.MESA(small_net(), decay=0.5, start=0)
    again.load_state_dict(torch.load(tmp_path / "mesa.pt", weights_only=True))
    inputs = torch.randn(9, 6)
    outputs = net(inputs)
    assert again.epoch == 7
    assert torch.equal(mesa(outputs, inputs), again(outputs, inputs)) and mesa(outputs, inputs) > 0
    torch.nn.init.zeros_(net[0].weight)
    for term in (mesa, again):
        term.update(net)
    assert torch.equal(mesa(outputs, inputs), again(outputs, inputs))


# ---- what is refused ------------------------------------------------------------------------------------------------


def at_epoch(epoch=0, **options):
    term = saf(**options)
    term.set_epoch(epoch)
    return term


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: saf(temperature=0.0), ValueError, "temperature must be a finite number > 0, not 0"),
        (lambda: saf(weight=-1.0), ValueError, "weight must be a finite number >= 0, not -1"),
        (lambda: saf(weight=math.nan), ValueError, "weight must be"),
        (lambda: saf(start=-1), ValueError, "start must be an epoch from 0, not -1"),
        (lambda: saf(epochs=0), ValueError, "epochs must be at least 1, not 0"),
        (lambda: lk.SAF(0, 3), ValueError, "samples must be at least 1, not 0"),
        (lambda: lk.SAF(3, 0), ValueError, "classes must be at least 1, not 0"),
        (lambda: saf(dtype=torch.int8), TypeError, "dtype must be a floating-point dtype, such as torch.float16"),
        (lambda: saf()(logits(2, CLASSES), torch.arange(2)), RuntimeError, r"call set_epoch\(epoch\) at the start"),
        (lambda: at_epoch(-1), ValueError, "epochs are counted from 0, not -1"),
        (lambda: at_epoch()(logits(2, 4), torch.arange(2)), ValueError, r"shape \[B, 5\], not \[2, 4\]"),
        (lambda: at_epoch()(logits(2, 5, 3), torch.arange(2)), ValueError, "flatten other dimensions into the first"),
        (lambda: at_epoch()(logits(2, 5), torch.arange(3)), ValueError, r"int64 of shape \[2\].*have the data set"),
        (lambda: at_epoch()(logits(2, 5), torch.arange(2).int()), ValueError, "not torch.int32"),
        (lambda: at_epoch()(logits(2, 5), torch.tensor([0, 23])), ValueError, "an index is 23, but .* samples=23"),
        (lambda: at_epoch()(logits(2, 5), torch.tensor([-1, 3])), ValueError, "an index is -1"),
        (
            lambda: saf().load_state_dict(lk.SAF(9, 5).state_dict()),
            ValueError,
            r"shape \[3, 23, 5\], but is \[3, 9, 5\]",
        ),
        (lambda: saf().load_state_dict({}), ValueError, "'records' must have the shape .* but is missing"),
        (lambda: lk.MESA(small_net(), decay=1.0), ValueError, r"decay must be in \[0, 1\), not 1"),
        (lambda: lk.MESA(small_net())(logits(2, 5), logits(2, 6)), RuntimeError, "MESA goes by epochs"),
        (lambda: lk.MESA(small_net()).load_state_dict({}), ValueError, "it has no 'average'"),
    ],
)
def test_bad_input_says_what_to_do(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_mesa_wants_the_outputs_of_its_model():
    mesa = lk.MESA(small_net(), start=0)
    mesa.set_epoch(0)
    with pytest.raises(ValueError, match=r"they are \[2, 4\] and the averaged model gives \[2, 5\]"):
        mesa(torch.zeros(2, 4), torch.zeros(2, 6))


def test_a_refused_state_changes_nothing():
    term = at_epoch(2)
    term(logits(2, 5), torch.arange(2))
    before = copy.deepcopy(term.state_dict())
    with pytest.raises(ValueError, match="recorded_at"):
        term.load_state_dict({**saf().state_dict(), "recorded_at": None})
    assert all(
        torch.equal(v, before[k]) if torch.is_tensor(v) else v == before[k] for k, v in term.state_dict().items()
    )


# ---- on a GPU -------------------------------------------------------------------------------------------------------


def gpu(test):
    for mark in needs_gpu:
        test = mark(test)
    return test


@gpu
@pytest.mark.parametrize("device", ["cpu", DEVICE])
def test_outputs_on_a_gpu_give_what_they_give_on_the_cpu(device):
    """Records in the host's memory or beside them; logarithms there may differ by some units in the last place."""
    outputs, here, there = logits(6, SAMPLES, CLASSES), saf(), saf(device=device)
    for epoch in range(6):
        for term in (here, there):
            term.set_epoch(epoch)
        for index in shuffled()(epoch):
            expected, found = here(outputs[epoch][index], index), there(outputs[epoch][index].to(DEVICE), index)
            assert found.device.type == DEVICE
            assert found.item() == pytest.approx(expected.item(), rel=1e-12, abs=1e-14)
    for name in ("records", "recorded_at"):
        assert there.state_dict()[name].device.type == torch.device(device).type
        assert torch.equal(there.state_dict()[name].cpu(), here.state_dict()[name])


class LateCopies:
    """Stands in for a GPU's stream: what is copied without waiting arrives when its event is waited for."""

    def __init__(self, monkeypatch):
        self.waiting = []
        empty, copy_ = torch.empty, torch.Tensor.copy_

        def late_copy(target, source, non_blocking=False):
            if not non_blocking:
                return copy_(target, source)
            target.fill_(math.nan)
            self.waiting.append(lambda: copy_(target, source))
            return target

        monkeypatch.setattr("lets_kernels.trajectory.saf._pinned", lambda records, outputs: True)
        monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **options: empty(*shape, **options))
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
        monkeypatch.setattr(torch.Tensor, "copy_", late_copy)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
        monkeypatch.setattr(torch.cuda, "Event", lambda: self)

    def record(self, stream): ...

    def synchronize(self):
        assert len(self.waiting) == 1
        self.waiting.pop()()


def test_outputs_that_arrive_later_are_put_away_in_time(monkeypatch):
    """At the next call, which may bring another epoch and reuse the indices, and when a state is asked for."""
    outputs, plain, late = logits(6, SAMPLES, CLASSES), saf(), saf()
    stream = LateCopies(monkeypatch)
    for epoch in range(6):
        for index in shuffled()(epoch):
            for term in (plain, late):
                term.set_epoch(epoch)
            with monkeypatch.context() as usual:
                usual.setattr("lets_kernels.trajectory.saf._pinned", lambda records, outputs: False)
                expected = plain(outputs[epoch][index], index)
            again = index.clone()
            assert torch.equal(late(outputs[epoch][index], again), expected)
            assert len(stream.waiting) == 1
            again.zero_()
    assert not torch.equal(late._records, plain._records)
    state = late.state_dict()
    assert torch.equal(state["records"], plain._records) and torch.equal(state["recorded_at"], plain._recorded_at)
    late(outputs[0][:3], torch.arange(3))
    late.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert torch.equal(late.state_dict()["records"], plain._records)  # what was on its way is of the run before
