"""A network that is small enough for a laptop and large enough to memorise wrong labels."""

from torch import nn


def small_cnn() -> nn.Sequential:
    """Two convolutions with batch norm, then two linear layers: 14,026 parameters; [n, 1, 8, 8] to [n, 10] logits."""
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, kernel_size=3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
