"""A whole training script for CIFAR-10: mixed precision, several GPUs, checkpoints, TensorBoard, and SAM.

Without data it makes images of its own, so it runs anywhere; with CIFAR-10 in its "python version", unpacked::

    python examples/train_cifar.py --data cifar-10-batches-py --amp bf16 --checkpoint runs/sam.pt
    torchrun --nproc-per-node 8 examples/train_cifar.py --data cifar-10-batches-py --rho auto

What SAM changes in such a script is marked with "SAM:".
"""

import argparse
import os
import pickle
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from lets_kernels import SAM


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="the folder with data_batch_1 ... 5 and test_batch; default: synthetic"
    )
    parser.add_argument("--rho", default="0.05", help="the radius: a number, or auto (default 0.05)")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=128, help="images a step on each rank")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--width", type=int, default=64, help="channels of the first layer")
    parser.add_argument("--amp", choices=("none", "bf16", "fp16"), default="none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="written after every epoch; resumed from, if it is there")
    parser.add_argument("--stop-after", type=int, help="end this run after so many epochs, as a time limit would")
    parser.add_argument("--tensorboard", type=Path, help="the folder for TensorBoard's files")
    args = parser.parse_args()
    try:
        args.rho = args.rho if args.rho == "auto" else float(args.rho)
    except ValueError:
        parser.error(f"--rho takes a number or auto, not {args.rho}")
    if args.tensorboard:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError:
            parser.error("--tensorboard needs a package that is not here: pip install tensorboard")
    return args


def load(folder: Path | None, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images as uint8 [N, 3, 32, 32] and labels as int64 [N], for training and for the test."""
    if folder is None:  # ten blurred pictures, each with noise on it
        random = torch.Generator().manual_seed(seed)
        pictures = nn.functional.interpolate(torch.rand(10, 3, 4, 4, generator=random), size=32, mode="bilinear")
        labels = torch.arange(1280) % 10
        noise = torch.rand(1280, 3, 32, 32, generator=random)
        images = ((pictures[labels] + noise) * 127).byte()
        return images[:1024], labels[:1024], images[1024:], labels[1024:]

    def read(*names: str) -> tuple[Tensor, Tensor]:
        batches = [pickle.loads((folder / name).read_bytes(), encoding="bytes") for name in names]
        images = torch.cat([torch.from_numpy(batch[b"data"]) for batch in batches])
        labels = torch.tensor([label for batch in batches for label in batch[b"labels"]])
        return images.view(-1, 3, 32, 32), labels

    return *read(*(f"data_batch_{i}" for i in range(1, 6))), *read("test_batch")


def pixels(images: Tensor, device: torch.device) -> Tensor:
    return (images.to(device).float() / 255 - 0.5) / 0.25


def augmented(images: Tensor, random: torch.Generator) -> Tensor:
    """Each image moved by up to four pixels, and half of them mirrored."""
    down, right = torch.randint(9, (2, len(images), 1), generator=random) + torch.arange(32)
    right = torch.where(torch.rand(len(images), 1, generator=random) < 0.5, right, right.flip(1))
    each = torch.arange(len(images))[:, None, None]
    padded = nn.functional.pad(images, (4, 4, 4, 4)).permute(0, 2, 3, 1)
    return padded[each, down[:, :, None], right[:, None, :]].permute(0, 3, 1, 2).contiguous()


class Block(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outside),
            nn.ReLU(),
            nn.Conv2d(outside, outside, 3, padding=1, bias=False),
            nn.BatchNorm2d(outside),
        )
        self.past = nn.Identity() if stride == 1 else nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.past(x))


def network(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        Block(width, width, 1),
        Block(width, 2 * width, 2),
        Block(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, 10),
    )


def save(path: Path, state: dict[str, object]) -> None:
    """Never leaves half a file behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def train(args: argparse.Namespace, rank: int, world: int, device: torch.device) -> None:
    torch.manual_seed(args.seed)
    images, labels, test_images, test_labels = load(args.data, args.seed)
    plain = network(args.width).to(device)
    model = plain if world == 1 else DistributedDataParallel(plain)
    # SAM: the base optimizer's class and arguments go inside. With model=, the running statistics of the batch norm
    # layers count the first pass only, and the ranks are known.
    optimizer = SAM(
        model.parameters(),
        torch.optim.SGD,
        rho=args.rho,
        model=model,
        lr=args.lr,
        momentum=0.9,
        weight_decay=5e-4,
        nesterov=True,
    )
    steps = len(images) // (args.batch * world)
    if steps == 0:
        raise SystemExit(f"{len(images)} images are fewer than one step takes ({args.batch * world}): lower --batch")
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * steps)
    scaler = torch.amp.GradScaler(device.type) if args.amp == "fp16" else None
    cast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.amp)

    done = 0
    if args.checkpoint and args.checkpoint.exists():
        saved = torch.load(args.checkpoint, map_location=device, weights_only=True)
        plain.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])  # SAM: holds the base optimizer's state and the radius
        schedule.load_state_dict(saved["schedule"])
        if scaler:
            scaler.load_state_dict(saved["scaler"])
        done = saved["epoch"]
    writer = None
    if args.tensorboard and rank == 0:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(args.tensorboard), purge_step=done * steps)

    last = args.epochs if args.stop_after is None else min(args.epochs, done + args.stop_after)
    for epoch in range(done, last):
        # One order for all ranks, each takes its own part; nothing else is random, so a resumed run goes the same way.
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed + epoch))
        random = torch.Generator().manual_seed((args.seed + epoch) * world + rank)
        model.train()
        total = torch.zeros((), device=device)
        for step in range(steps):
            index = order[step * args.batch * world :][: args.batch * world][rank::world]
            # SAM: what is random in a batch is drawn before the closure, so that both passes see the same images.
            x, y = pixels(augmented(images[index], random), device), labels[index].to(device)

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:  # SAM: called twice, at θ and at θ + ε
                optimizer.zero_grad()
                with torch.autocast(device.type, cast) if cast else nullcontext():
                    loss = cross_entropy(model(x), y, label_smoothing=0.1)
                (scaler.scale(loss) if scaler else loss).backward()
                return loss.detach()

            total += optimizer.step(closure, scaler=scaler)
            if scaler:
                scaler.update()
            schedule.step()
            if writer and step % 50 == 0:  # metrics() are tensors on the device: reading them waits for it
                seen = {"loss": total / (step + 1), **optimizer.metrics()}
                for name in ("loss", "rho", "loss_gap", "grad_norm"):
                    writer.add_scalar(name, seen[name], epoch * steps + step)

        model.eval()
        found = torch.stack([total / steps, torch.zeros_like(total), torch.zeros_like(total)])
        with torch.no_grad():
            mine = torch.arange(rank, len(test_images), world)
            for index in mine.split(512):
                right = plain(pixels(test_images[index], device)).argmax(1) == test_labels[index].to(device)
                found[1:] += torch.stack([right.sum(), torch.tensor(len(index), device=device)])
        if world > 1:
            found[0] /= world
            dist.all_reduce(found)
        loss, accuracy = found[0].item(), (found[1] / found[2]).item()
        if rank == 0:
            print(f"epoch {epoch + 1}: rho {optimizer.rho.item():.4g}, loss {loss:.3f}, test accuracy {accuracy:.3f}")
            if writer:
                writer.add_scalar("test accuracy", accuracy, (epoch + 1) * steps)
            if args.checkpoint:
                state = {"model": plain.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}
                state |= {"schedule": schedule.state_dict(), "scaler": scaler.state_dict() if scaler else {}}
                save(args.checkpoint, state)
    if writer:
        writer.close()


def main() -> None:
    args = options()
    rank, world, local = (int(os.environ.get(name, default)) for name, default in RANKS.items())
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    try:
        train(args, rank, world, device)
    finally:
        if world > 1:
            dist.destroy_process_group()


RANKS = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}  # torchrun sets them

if __name__ == "__main__":
    main()
