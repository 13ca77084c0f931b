"""Images: CIFAR from a folder, CIFAR-10 from a file of JPEGs, ImageNet from a folder for each class."""

import io
import itertools
import math
import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from lets_kernels.experiment import networks
from lets_kernels.experiment.task import Batch, MissingData, Task

#: Mean and standard deviation of each channel of the training set, pixels in [0, 1].
CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
CIFAR100 = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

Statistics = tuple[tuple[float, ...], tuple[float, ...]]


def normalised(images: Tensor, of: Statistics) -> Tensor:
    """uint8 (n, 3, h, w) to float32 with mean 0 and standard deviation 1 of each channel, in channels-last order."""
    mean, deviation = (torch.tensor(numbers).view(3, 1, 1) for numbers in of)
    return ((images.float() / 255 - mean) / deviation).contiguous(memory_format=torch.channels_last)


class Arrays:
    """Images in memory, uint8 (n, 3, h, w), labels int64 (n).

    Augmented, each is shifted by up to four pixels in both directions, zeros coming in, and half of them are mirrored.
    """

    def __init__(self, images: Tensor, labels: Tensor, statistics: Statistics) -> None:
        self.images, self.labels, self.statistics = images, labels, statistics

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Sequence[int], seed: int | None) -> Batch:
        chosen = torch.as_tensor(indices)
        images = self.images[chosen]
        if seed is not None:
            images = shifted(images, torch.Generator().manual_seed(seed))
        return Batch((normalised(images, self.statistics),), self.labels[chosen])


def shifted(images: Tensor, random: torch.Generator, most: int = 4) -> Tensor:
    """Each image moved by up to ``most`` pixels, and half of them mirrored."""
    n, _, height, width = images.shape
    down = torch.randint(2 * most + 1, (n, 1), generator=random) + torch.arange(height)
    right = torch.randint(2 * most + 1, (n, 1), generator=random) + torch.arange(width)
    mirrored = torch.rand(n, 1, generator=random) < 0.5
    right = torch.where(mirrored, right.flip(1), right)
    each = torch.arange(n)[:, None, None]
    return pad(images, (most,) * 4).permute(0, 2, 3, 1)[each, down[:, :, None], right[:, None, :]].permute(0, 3, 1, 2)


class Folder:
    """Image files, a folder for each class, decoded when they are asked for; both sets have the classes of ``train``.

    Augmented, a random part of 8 to 100 % of the image becomes ``side`` x ``side`` pixels, mirrored in half of the
    cases (Szegedy et al., 2015); otherwise it is the square in the middle, 0.875 times as wide as the shorter side.
    """

    def __init__(self, folder: Path, classes: Sequence[str], side: int = 224) -> None:
        if not folder.is_dir():
            raise MissingData(f"there is no folder {folder}: it should hold a folder of images for each class")
        self.side = side
        self.files = [
            (file, label)
            for label, name in enumerate(classes)
            for file in sorted((folder / name).glob("*"))
            if file.suffix.lower() in (".jpeg", ".jpg", ".png")
        ]
        if not self.files:
            raise MissingData(f"no .jpeg, .jpg or .png files in the folders of {folder}")

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, indices: Sequence[int], seed: int | None) -> Batch:
        random = None if seed is None else torch.Generator().manual_seed(seed)
        chosen = [self.files[index] for index in indices]
        images = torch.stack([self._image(file, random) for file, _ in chosen])
        return Batch((normalised(images, IMAGENET),), torch.tensor([label for _, label in chosen]))

    def _image(self, file: Path, random: torch.Generator | None) -> Tensor:
        from PIL import Image

        side = self.side
        with Image.open(file) as opened:
            image = opened.convert("RGB")
        width, height = image.size
        if random is None:
            length = 0.875 * min(width, height)
            left, top = (width - length) / 2, (height - length) / 2
            box = (left, top, left + length, top + length)
        else:
            box = _part(width, height, random)
        image = image.resize((side, side), Image.Resampling.BILINEAR, box=box)
        found = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(side, side, 3).permute(2, 0, 1)
        mirrored = random is not None and bool(torch.rand((), generator=random) < 0.5)
        return found.flip(2) if mirrored else found


def _part(width: int, height: int, random: torch.Generator) -> tuple[float, float, float, float]:
    """A random rectangle: 8 to 100 % of the area, 3:4 to 4:3 in shape; the whole image if ten draws do not fit."""
    for _ in range(10):
        share, shape, x, y = torch.rand(4, generator=random).tolist()
        area = width * height * (0.08 + 0.92 * share)
        ratio = math.exp(math.log(3 / 4) + shape * (math.log(4 / 3) - math.log(3 / 4)))
        wide, high = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if wide <= width and high <= height:
            left, top = x * (width - wide), y * (height - high)
            return left, top, left + wide, top + high
    return 0.0, 0.0, float(width), float(height)


def with_wrong_labels(labels: Tensor, share: float, classes: int, seed: int) -> Tensor:
    """Exactly that share of the labels, each replaced by one of the other classes, all equally likely."""
    random = torch.Generator().manual_seed(seed)
    wrong = torch.randperm(len(labels), generator=random)[: round(share * len(labels))]
    changed = labels.clone()
    changed[wrong] = (labels[wrong] + torch.randint(1, classes, wrong.shape, generator=random)) % classes
    return changed


def cifar(path: Path, classes: int, network: str, noise: float, smoothing: float, seed: int) -> Task:
    """CIFAR-10 or CIFAR-100 (Krizhevsky, 2009), 32 x 32 pixels.

    Args:
        path: the unpacked folder of the "python version" (``data_batch_1`` … ``test_batch``; for CIFAR-100 ``train``,
            ``test``), or for CIFAR-10 an ``.npz`` file with ``train_jpeg``, ``train_offsets``, ``train_labels`` and the
            same of ``test``, where image i is the JPEG file in bytes offsets[i] to offsets[i + 1].
        classes: 10 or 100.
        network: a name in :data:`~lets_kernels.experiment.networks.NETWORKS`.
        noise: the share of the training labels that are wrong, chosen by ``seed``; those of the test set are right.
        smoothing: of the labels, in the training loss.
        seed: of the wrong labels.
    """
    jpeg = path.suffix == ".npz" and classes == 10
    (images, labels), test = _jpegs(path) if jpeg else _pickles(path, classes)
    labels = with_wrong_labels(labels, noise, classes, seed)
    statistics = CIFAR10 if classes == 10 else CIFAR100
    return classification(Arrays(images, labels, statistics), Arrays(*test, statistics), classes, network, smoothing)


def imagenet(path: Path, network: str, smoothing: float) -> Task:
    """A folder with ``train`` and ``val``, each with a folder of images for each class; 224 x 224 pixels."""
    if not (path / "train").is_dir():
        raise MissingData(f"there is no folder {path / 'train'}: it should hold a folder of images for each class")
    classes = sorted(entry.name for entry in (path / "train").iterdir() if entry.is_dir())
    sets = Folder(path / "train", classes), Folder(path / "val", classes)
    return classification(*sets, len(classes), network, smoothing)


def classification(train: Any, test: Any, classes: int, network: str, smoothing: float) -> Task:
    """Mean cross-entropy, and the share of the test set that is classified correctly."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(model(*batch.inputs), batch.targets, label_smoothing=smoothing)

    def losses(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        outputs = model(*batch.inputs)
        return cross_entropy(outputs, batch.targets, label_smoothing=smoothing, reduction="none"), outputs

    def make() -> nn.Module:
        return networks.build(network, classes)

    return Task(train, test, make, loss, accuracy, "test accuracy, %", losses)


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Per cent of the samples whose largest logit is the target's."""
    right, seen = 0, 0
    for batch in batches:
        right += int((model(*batch.inputs).argmax(1) == batch.targets).sum())
        seen += len(batch.targets)
    return 100 * right / seen


def _pickles(folder: Path, classes: int) -> list[tuple[Tensor, Tensor]]:
    names = [[f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]] if classes == 10 else [["train"], ["test"]]
    missing = [name for name in (*names[0], *names[1]) if not (folder / name).is_file()]
    if missing:
        raise MissingData(
            f"{folder} does not hold {', '.join(missing)}: unpack the python version of CIFAR-{classes} there"
            + (", or name an .npz file of JPEGs" if classes == 10 else "")
        )

    def read(name: str) -> tuple[Tensor, Tensor]:
        found = pickle.loads((folder / name).read_bytes(), encoding="bytes")
        labels = found[b"labels" if classes == 10 else b"fine_labels"]
        return torch.from_numpy(found[b"data"]).view(-1, 3, 32, 32), torch.tensor(labels, dtype=torch.int64)

    return [tuple(map(torch.cat, zip(*map(read, part), strict=True))) for part in names]  # type: ignore[misc]


def _jpegs(path: Path) -> list[tuple[Tensor, Tensor]]:
    if not path.is_file():
        raise MissingData(f"there is no file {path}")
    import numpy as np
    from PIL import Image

    def pixels(file: bytes) -> Any:
        with Image.open(io.BytesIO(file)) as image:
            return np.asarray(image.convert("RGB"))

    with np.load(path) as found:
        try:
            sets = [[found[f"{part}_{name}"] for name in ("jpeg", "offsets", "labels")] for part in ("train", "test")]
        except KeyError as error:
            raise MissingData(f"{path} has no array {error}: see docs/experiments.md for what it should hold") from None

    def decoded(jpeg: Any, at: Any) -> Tensor:
        ends = at.tolist()
        images = [pixels(jpeg[a:b].tobytes()) for a, b in itertools.pairwise(ends)]
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()

    return [(decoded(jpeg, at), torch.from_numpy(labels).long()) for jpeg, at, labels in sets]
