"""Parameter sets: the shapes of well-known models' parameters, in the order of the model, and single tensors."""

from benchmarks.common import TINY
from benchmarks.gpu.verdicts import SMALL
from lets_kernels.bench.shapes import Shape, linear, norm, resnet18, resnet50, vit_b16

MILLION = 2**20  # "25 M" elements are 25 * 2^20


def deberta_base() -> list[Shape]:
    """DeBERTa-base, version 1 (He et al., 2021): 196 tensors, 138,601,728 elements, published as 139 M.

    50,265 tokens of width 768 and their norm (no absolute positions, no token types); 1,024 relative positions; 12
    layers, each with one projection without bias for query, key and value, biases for query and value, projections of
    the relative positions for keys (no bias) and queries, output, and a feed-forward network of four times the width.
    """
    d = 768
    attention = [(d,), (d,), *linear(3 * d, d, bias=False), *linear(d, d, bias=False), *linear(d, d)]
    layer = [*attention, *linear(d, d), *norm(d), *linear(4 * d, d), *linear(d, 4 * d), *norm(d)]
    return [(50265, d), *norm(d), *12 * layer, (1024, d)]


def transformer_1b() -> list[Shape]:
    """A decoder of 18 layers, width 2,048, 50,257 tokens, 1,024 positions: 220 tensors, 1,011,476,480 elements."""
    d = 2048
    block = [*norm(d), *linear(3 * d, d), *linear(d, d), *norm(d), *linear(4 * d, d), *linear(d, 4 * d)]
    return [(50257, d), (1024, d), *18 * block, *norm(d)]


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
