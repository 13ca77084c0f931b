"""The 8x8 handwritten digits that scikit-learn ships, with some of the training labels made wrong."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from lets_kernels.demo.methods import TRAIN_SIZE

CLASSES = 10
TEST_SIZE = 1797 - TRAIN_SIZE  # all images


@dataclass(frozen=True)
class Digits:
    """Images are float32 [n, 1, 8, 8] in 0 ... 1; labels are int64 [n]."""

    train_images: Tensor
    train_labels: Tensor  # a share of them wrong
    test_images: Tensor
    test_labels: Tensor  # all of them right


def load(seed: int, noise: float) -> Digits:
    """Splits the digits into training and test images, and makes wrong a share ``noise`` of the training labels.

    Exactly ``round(noise * 1280)`` labels are wrong, each one uniformly among the nine other classes. Both the split
    and the wrong labels follow from ``seed``; the split does not depend on ``noise``.
    """
    images, labels = load_digits(return_X_y=True)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, train_size=TRAIN_SIZE, test_size=TEST_SIZE, stratify=labels, random_state=seed
    )
    random = np.random.default_rng(seed)
    wrong = random.choice(TRAIN_SIZE, size=round(noise * TRAIN_SIZE), replace=False)
    train_labels[wrong] = (train_labels[wrong] + random.integers(1, CLASSES, size=len(wrong))) % CLASSES
    return Digits(_pixels(train_images), torch.tensor(train_labels), _pixels(test_images), torch.tensor(test_labels))


def noisy_targets(labels: Tensor, noise: float) -> Tensor:
    """For each true label the distribution, [n, 10], from which noise of this share draws a training label."""
    right = torch.nn.functional.one_hot(labels, CLASSES).float()
    return (1 - noise) * right + noise / (CLASSES - 1) * (1 - right)


def batches(images: Tensor, labels: Tensor, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end, the data in a new order each time round; the order follows from ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(images), generator=generator).split(size):
            yield images[index], labels[index]


def _pixels(images: np.ndarray) -> Tensor:
    return torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8)
