"""Two processes under Accelerate's and Lightning's DistributedDataParallel: one training, on the joined batch."""

import os

import accelerate
import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.functional import cross_entropy

import lets_kernels as lk
from support.conv_net import Pointwise
from support.given_gradients import snapshot
from support.guard_bands import same_bits

STEPS = 5


def made():
    net = Pointwise()
    return net, optimizer(net)


def optimizer(net, cls=lk.SAM, **options):
    return cls(net.parameters(), torch.optim.SGD, rho=0.3, lr=0.1, momentum=0.9, **options)


def at_random(net, rank, **options):
    """Perturbs at random steps, without a seed: one is drawn from torch's, which ranks have seeded differently."""
    torch.manual_seed(rank)
    return optimizer(net, lk.RST, **options)


def batches(ranks):
    """The batches of these ranks, joined."""
    parts = []
    for rank in ranks:
        generator = torch.Generator().manual_seed(rank)
        x = torch.randn(STEPS, 8, 2, 6, 6, generator=generator)
        parts.append((x, torch.randint(3, (STEPS, 8), generator=generator)))
    xs, ys = (torch.cat(items, 1) for items in zip(*parts, strict=True))
    return list(zip(xs, ys, strict=True))


def closure(net, opt, batch, backward=torch.Tensor.backward):
    def run():
        opt.zero_grad()
        loss = cross_entropy(net(batch[0]), batch[1])
        backward(loss)
        return loss

    return run


def by_accelerate(rank, randomly=False):
    net, _ = made()
    accelerator = accelerate.Accelerator(cpu=True)
    net = accelerator.prepare(net)
    assert isinstance(net, torch.nn.parallel.DistributedDataParallel)
    opt = at_random(net, rank, model=net) if randomly else optimizer(net, model=net)
    theirs = accelerator.prepare(opt)
    for batch in batches([rank]):
        theirs.step(closure(net, theirs, batch, accelerator.backward))
    return snapshot(opt)


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net, _ = made()

    def on_train_start(self):
        assert isinstance(self.trainer.strategy.model, torch.nn.parallel.DistributedDataParallel)

    def training_step(self, batch, index):
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        group = dist.group.WORLD
        return optimizer(self.net, process_group=group)


def by_lightning(rank):
    module = Module()
    loader = torch.utils.data.DataLoader(batches([rank]), batch_size=None)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        use_distributed_sampler=False,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    return snapshot(trainer.optimizers[0])


def worker(rank, file, results):
    torch.set_num_threads(1)
    os.environ.update(WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2", GROUP_RANK="0")
    os.environ.update(TORCHELASTIC_RUN_ID="none", ACCELERATE_USE_CPU="1")  # as torchrun starts a process
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    try:
        found = {"accelerate": by_accelerate(rank), "lightning": by_lightning(rank)}
        results[rank] = {**found, "at-random": by_accelerate(rank, randomly=True)}
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    with mp.Manager() as manager:
        found = manager.dict()
        mp.spawn(worker, (str(tmp_path_factory.mktemp("ranks") / "store"), found), nprocs=2)
        yield dict(found)


@pytest.mark.parametrize("framework", ["accelerate", "lightning", "at-random"])
def test_two_processes_train_as_one_on_the_joined_batch(results, framework):
    """The same bits in both; and to a few ulp a step those of one process, whose sums are in another order."""
    first, second = results[0][framework], results[1][framework]
    assert same_bits(first, second)
    net, opt = made()
    opt = at_random(net, 0) if framework == "at-random" else opt
    for batch in batches([0, 1]):
        opt.step(closure(net, opt, batch))
    for a, b in zip(first, snapshot(opt), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
