"""Parameter sets: the shapes of well-known models' parameters, in the order of the model, and single tensors."""

import math

from benchmarks.common import TINY, Shape, resnet50
from benchmarks.gpu.verdicts import SMALL

MILLION = 2**20  # "25 M" elements are 25 * 2^20


def numel(shapes: list[Shape]) -> int:
    return sum(map(math.prod, shapes))


def resnet18() -> list[Shape]:
    """ResNet-18 (He et al., 2016): 62 tensors, 11,689,512 elements."""

    def conv(out: int, inp: int, side: int) -> list[Shape]:
        return [(out, inp, side, side), (out,), (out,)]  # a convolution without bias, and its batch norm

    shapes, channels = conv(64, 3, 7), 64
    for width in (64, 128, 256, 512):
        for _ in range(2):
            shapes += conv(width, channels, 3) + conv(width, width, 3)
            shapes += conv(width, channels, 1) if width != channels else []
            channels = width
    return [*shapes, (1000, channels), (1000,)]


def _linear(out: int, inp: int, bias: bool = True) -> list[Shape]:
    return [(out, inp), (out,)] if bias else [(out, inp)]


def _norm(width: int) -> list[Shape]:
    return [(width,), (width,)]


def vit_b16() -> list[Shape]:
    """ViT-B/16 at 224 pixels with 1,000 classes (Dosovitskiy et al., 2021): 152 tensors, 86,567,656 elements."""
    d = 768
    block = [*_norm(d), *_linear(3 * d, d), *_linear(d, d), *_norm(d), *_linear(4 * d, d), *_linear(d, 4 * d)]
    embedding = [(1, 1, d), (d, 3, 16, 16), (d,), (1, 197, d)]
    return [*embedding, *12 * block, *_norm(d), *_linear(1000, d)]


def deberta_base() -> list[Shape]:
    """DeBERTa-base, version 1 (He et al., 2021): 196 tensors, 138,601,728 elements, published as 139 M.

    50,265 tokens of width 768 and their norm (no absolute positions, no token types); 1,024 relative positions; 12
    layers, each with one projection without bias for query, key and value, biases for query and value, projections of
    the relative positions for keys (no bias) and queries, output, and a feed-forward network of four times the width.
    """
    d = 768
    attention = [(d,), (d,), *_linear(3 * d, d, bias=False), *_linear(d, d, bias=False), *_linear(d, d)]
    layer = [*attention, *_linear(d, d), *_norm(d), *_linear(4 * d, d), *_linear(d, 4 * d), *_norm(d)]
    return [(50265, d), *_norm(d), *12 * layer, (1024, d)]


def transformer_1b() -> list[Shape]:
    """A decoder of 18 layers, width 2,048, 50,257 tokens, 1,024 positions: 220 tensors, 1,011,476,480 elements."""
    d = 2048
    block = [*_norm(d), *_linear(3 * d, d), *_linear(d, d), *_norm(d), *_linear(4 * d, d), *_linear(d, 4 * d)]
    return [(50257, d), (1024, d), *18 * block, *_norm(d)]


MODELS: dict[str, list[Shape]] = {
    "ResNet-18": resnet18(),
    "ResNet-50": resnet50(),
    "ViT-B/16": vit_b16(),
    "DeBERTa-base": deberta_base(),
    "transformer 1B": transformer_1b(),
}


def single(millions: int) -> list[Shape]:
    """One tensor of that many times 2^20 elements, in filters of 4,096."""
    return [(millions * MILLION // 4096, 4096, 1)]


# In the order of what matters most, should time run out.
OP_SETS: dict[str, list[Shape]] = {
    "25 M": single(25),
    "100 M": single(100),
    "ResNet-50": MODELS["ResNet-50"],
    SMALL: TINY,
    "1 B": single(1000),
    "DeBERTa-base": MODELS["DeBERTa-base"],
    "ViT-B/16": MODELS["ViT-B/16"],
    "ResNet-18": MODELS["ResNet-18"],
    "transformer 1B": MODELS["transformer 1B"],
    "1 M": single(1),
    "4 M": single(4),
}


def shrunk(shapes: list[Shape]) -> list[Shape]:
    """A set so small that a dry run takes no time: eight of its tensors at most, no dimension above eight."""
    step = max(1, len(shapes) // 8)
    return [tuple(min(8, size) for size in shape) for shape in shapes[::step][:8]]
