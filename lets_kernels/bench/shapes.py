"""The shapes of well-known models' parameters, in the order of the model, and tensors of these shapes."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Shape = tuple[int, ...]


def _conv(out: int, inp: int, side: int) -> list[Shape]:
    return [(out, inp, side, side), (out,), (out,)]  # a convolution without bias, and its batch norm


def linear(out: int, inp: int, bias: bool = True) -> list[Shape]:
    return [(out, inp), (out,)] if bias else [(out, inp)]


def norm(width: int) -> list[Shape]:
    return [(width,), (width,)]


def resnet18() -> list[Shape]:
    """ResNet-18 (He et al., 2016): 62 tensors, 11,689,512 elements."""
    shapes, channels = _conv(64, 3, 7), 64
    for width in (64, 128, 256, 512):
        for _ in range(2):
            shapes += _conv(width, channels, 3) + _conv(width, width, 3)
            shapes += _conv(width, channels, 1) if width != channels else []
            channels = width
    return [*shapes, *linear(1000, channels)]


def resnet50() -> list[Shape]:
    """ResNet-50 (He et al., 2016; v1.5): 161 tensors, 25,557,032 elements."""
    shapes, channels = _conv(64, 3, 7), 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += _conv(width, channels, 1) + _conv(width, width, 3) + _conv(4 * width, width, 1)
            shapes += _conv(4 * width, channels, 1) if block == 0 else []
            channels = 4 * width
    return [*shapes, *linear(1000, channels)]


def vit_b16() -> list[Shape]:
    """ViT-B/16 at 224 pixels with 1,000 classes (Dosovitskiy et al., 2021): 152 tensors, 86,567,656 elements."""
    d = 768
    block = [*norm(d), *linear(3 * d, d), *linear(d, d), *norm(d), *linear(4 * d, d), *linear(d, 4 * d)]
    embedding = [(1, 1, d), (d, 3, 16, 16), (d,), (1, 197, d)]
    return [*embedding, *12 * block, *norm(d), *linear(1000, d)]


def numel(shapes: Sequence[Shape]) -> int:
    return sum(map(math.prod, shapes))


def normal(shapes: Sequence[Shape], sd: float, seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Gaussian tensors, each in memory of its own, as a model's parameters and gradients are."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.empty(s).normal_(0, sd, generator=generator).to(dtype) for s in shapes]
