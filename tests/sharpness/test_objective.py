"""The objective: a mean over samples, any structure of batches, and a model that is left as it was."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lets_kernels import sharpness
from lets_kernels.sharpness import Objective, along_gradient, eigenvalues, in_ball, line, m_sharpness, spectrum, trace
from support.interrupts import Tracer
from support.known_minima import assert_same, entropy, quadratic, small, state, symmetric

FOLDER = str(Path(sharpness.__file__).parent)
MEASURES = {
    "along": lambda at: along_gradient(at, 0.1),
    "ball": lambda at: in_ball(at, 0.1, steps=2, starts=1),
    "m": lambda at: m_sharpness(at, 0.1, steps=1, starts=0),
    "eigenvalues": lambda at: eigenvalues(at, steps=3),
    "trace": lambda at: trace(at, samples=2),
    "spectrum": lambda at: spectrum(at, runs=1, steps=2),
    "line": lambda at: line(at, points=3),
    "loss": lambda at: at.loss(),
}


def test_loss_and_gradient_are_means_over_samples():
    """The last batch is smaller: a mean over batches would be another number."""
    model, at = small(batches=(8, 8, 5))
    model.eval()
    whole = tuple(torch.cat(part) for part in zip(*at._data, strict=True))
    loss = entropy(model, whole)
    loss.backward()
    assert at.loss() == pytest.approx(float(loss.detach()), rel=1e-12)
    found, gradient = at.gradient()
    assert found == pytest.approx(float(loss.detach()), rel=1e-12)
    torch.testing.assert_close(gradient, at.flat([p.grad for p in model.parameters()]), rtol=1e-10, atol=1e-14)


def drawing(model, batch):
    """A loss that draws from Python's and numpy's random numbers, too."""
    random.random()
    np.random.rand()  # noqa: NPY002
    return entropy(model, batch)


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_left_behind(measure, train, dtype):
    """Weights, running statistics and their count, gradients, modes (also mixed ones) and random numbers."""
    model, at = small(dtype, dropout=0.5, train=train)
    at._loss = drawing
    entropy(model, at._data[0]).backward()
    model.train()
    model.body[1].eval()  # a frozen layer stays frozen
    before, python, numpy = state(model), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    measure(at)
    assert_same(before, state(model))
    assert random.getstate() == python and (np.random.get_state()[1] == numpy).all()  # noqa: NPY002


@pytest.mark.parametrize("measure", [MEASURES["ball"], MEASURES["m"], MEASURES["eigenvalues"]], ids=["ball", "m", "λ"])
def test_an_interrupt_at_any_instruction_leaves_nothing_behind(measure):
    model, at = small(torch.float32, dropout=0.5, batches=(3, 2), train=True)
    before, struck = state(model), 0
    with Tracer(0, FOLDER) as tracer:
        tracer.measure(lambda: measure(at))
        for _ in range(40):
            struck += tracer.strike(lambda: measure(at))
            assert_same(before, state(model))
            assert torch.is_grad_enabled() and not at.begun
    assert struck > 30
    measure(at)  # and it can be measured again


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_the_loss_leaves_nothing_behind(error):
    model, at = small()
    calls = iter(range(100))

    def loss(model, batch):
        if next(calls) == 5:
            raise error
        return entropy(model, batch)

    failing = Objective(model, loss, at._data)
    before = state(model)
    with pytest.raises(error):
        in_ball(failing, 0.1)
    assert_same(before, state(model))


def test_evaluation_mode_by_default_and_training_mode_if_asked():
    model, at = small(dropout=0.5)
    data = at._data
    model.eval()
    evaluated = sum(len(batch[1]) / 21 * float(entropy(model, batch).detach()) for batch in data)
    assert at.loss() == pytest.approx(evaluated, rel=1e-12)
    trained = Objective(model, entropy, data, train=True)
    same = line(trained, torch.zeros(trained.numel, dtype=trained.dtype), points=3).losses
    assert same == [trained.loss()] * 3, "dropout draws other masks in each pass"
    assert trained.loss() != pytest.approx(evaluated, rel=1e-3)


def test_a_loader_that_shuffles_is_drawn_once():
    model, at = small()
    images, labels = (torch.cat(part) for part in zip(*at._data, strict=True))
    before = torch.get_rng_state()
    loader = DataLoader(TensorDataset(images, labels), batch_size=8, shuffle=True)
    shuffled = Objective(model, entropy, loader)
    assert torch.equal(torch.get_rng_state(), before)
    assert shuffled.gradient()[0] == shuffled.gradient()[0] == pytest.approx(at.loss(), rel=1e-12)
    assert len(list(Objective(model, entropy, loader, batches=2).each())) == 2


@pytest.mark.parametrize(
    "batch, count",
    [
        (torch.zeros(3, 2), 3),
        ({"x": {"y": torch.zeros(4)}}, 4),
        ((None, [torch.zeros(5, 1), torch.zeros(7)]), 5),
        (torch.tensor(1.0), 1),
        ("text", 1),
    ],
)
def test_samples(batch, count):
    assert sharpness.samples(batch) == count


def test_a_batch_may_be_anything_that_the_loss_takes():
    model = nn.Linear(3, 2).double()
    data = [{"inputs": torch.randn(n, 3).double(), "more": [torch.ones(n)]} for n in (4, 2)]
    at = Objective(model, lambda model, batch: model(batch["inputs"]).square().mean(), data)
    whole = torch.cat([batch["inputs"] for batch in data])
    assert at.loss() == pytest.approx(float(model(whole).square().mean().detach()), rel=1e-12)


def test_autocast_by_option_and_by_the_callers_context():
    """A product in bfloat16, with 8 bits: near the float32 loss and not equal. Weights that moved are cast anew."""
    _, at = small(torch.float32)
    option = Objective(at.model, entropy, at._data, autocast=torch.bfloat16)
    plain, cast = along_gradient(at, 0.5), along_gradient(option, 0.5)
    assert cast.value != plain.value
    assert cast.value == pytest.approx(plain.value, rel=0.1)
    assert float(eigenvalues(option, tolerance=1e-2).values[0]) == pytest.approx(
        float(eigenvalues(at, tolerance=1e-2).values[0]), rel=0.1
    )
    with torch.autocast("cpu", torch.bfloat16):
        entropy(at.model.eval(), at._data[0])  # autocast remembers the casts of these weights
        assert along_gradient(at, 0.5).value == cast.value


def test_frozen_and_unused_parameters():
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "frozen": nn.Linear(2, 1), "unused": nn.Linear(2, 1)})
    model["frozen"].requires_grad_(False)
    at = Objective(model, lambda m, x: (m["used"](x) + m["frozen"](x)).square().mean(), [torch.randn(4, 2)])
    assert at.numel == 6
    assert along_gradient(at, 0.1).epsilon[3:].tolist() == [0, 0, 0]
    assert in_ball(at, 0.1, steps=2).value > 0


def test_sparse_gradients_are_gradients():
    model = nn.Embedding(4, 2, sparse=True)
    at = Objective(model, lambda model, words: model(words).square().mean(), [torch.tensor([1, 1, 2])])
    assert along_gradient(at, 0.1).epsilon.view(4, 2)[[0, 3]].abs().sum() == 0
    assert along_gradient(at, 0.1).value > 0


def test_weights_move_only_within_a_measurement():
    at = quadratic(torch.ones(3, dtype=torch.float64), [symmetric([1.0, 2.0, 3.0])])
    with pytest.raises(RuntimeError, match="held"):
        at.move(torch.ones(3, dtype=torch.float64))


def test_refused(monkeypatch):
    model, at = small()
    for data, said in (([], "no batches"), ([torch.zeros(0, 3)], "no samples")):
        with pytest.raises(ValueError, match=said):
            Objective(model, entropy, data)
    with pytest.raises(ValueError, match="no parameters"):
        Objective(nn.Tanh(), entropy, at._data)
    with pytest.raises(ValueError, match="0-d"):
        Objective(model, lambda model, batch: model(batch[0]), at._data).loss()
    with pytest.raises(ValueError, match="float"):
        Objective(model, lambda model, batch: 1.0, at._data).loss()
    with pytest.raises(ValueError, match="must use the model"):
        Objective(model, lambda model, batch: entropy(model, batch).detach(), at._data).gradient()
    with pytest.raises(TypeError, match="complex"):
        Objective(nn.Linear(2, 2, dtype=torch.complex64), entropy, at._data)
    with pytest.raises(TypeError, match="several devices"):
        Objective(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta")), entropy, at._data)


def test_sharded_and_wrapped_models_are_refused(tmp_path):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        with pytest.raises(TypeError, match=r"model\.module"):
            Objective(DistributedDataParallel(nn.Linear(2, 2)), entropy, [torch.zeros(1)])
        with pytest.raises(TypeError, match="full_state_dict=True"):
            Objective(fully_shard(nn.Linear(2, 2)), entropy, [torch.zeros(1)])
    finally:
        dist.destroy_process_group()
    assert "torch.distributed.fsdp" in sys.modules
