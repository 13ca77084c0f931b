"""The networks of the papers for images: ours where no well-kept library has them, the others from ``transformers``."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lets_kernels.bench.resnet import Block, ResNet18


class Wide(nn.Module):
    """Batch norm, ReLU and a 3 x 3 convolution, twice, beside a shortcut (Zagoruyko & Komodakis, 2016, Fig. 1c)."""

    def __init__(self, inp: int, out: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inp), nn.BatchNorm2d(out)
        self.conv1 = nn.Conv2d(inp, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.shortcut = None if inp == out else nn.Conv2d(inp, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(x))
        past = x if self.shortcut is None else self.shortcut(y)
        return past + self.conv2(torch.relu(self.bn2(self.conv1(y))))


class Pyramid(nn.Module):
    """Batch norm, convolution, batch norm, ReLU, convolution, batch norm (Han et al., 2017, Fig. 6d).

    The shortcut has no weights: where channels are added it is filled up with zeros, where the image shrinks it is
    averaged.
    """

    def __init__(self, inp: int, out: int, stride: int) -> None:
        super().__init__()
        self.more = out - inp
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm2d(inp), nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.conv1 = nn.Conv2d(inp, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.past = nn.Identity() if stride == 1 else nn.AvgPool2d(stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn3(self.conv2(torch.relu(self.bn2(self.conv1(self.bn1(x))))))
        return y + nn.functional.pad(self.past(x), (0, 0, 0, 0, 0, self.more))


class Stages(nn.Module):
    """A 3 x 3 convolution, blocks, and a linear layer on the mean over positions: (n, 3, h, w) to (n, classes)."""

    def __init__(self, stem: list[nn.Module], blocks: list[nn.Module], last: int, classes: int, after: bool) -> None:
        super().__init__()
        norm = [nn.BatchNorm2d(last), nn.ReLU()] if after else []
        self.features = nn.Sequential(*stem, *blocks, *norm)
        self.head = nn.Linear(last, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean(dim=(2, 3)))


class Logits(nn.Module):
    """A classifier of ``transformers``, called with positional inputs; returns the logits."""

    def __init__(self, net: nn.Module, *names: str) -> None:
        super().__init__()
        self.net, self.names = net, names

    def forward(self, *inputs: Tensor) -> Tensor:
        found: Tensor = self.net(**dict(zip(self.names, inputs, strict=True))).logits
        return found


def resnet(depth: int, classes: int, width: int = 16) -> nn.Module:
    """He et al. (2016), §4.2: three stages of (depth − 2)/6 blocks, with convolutions of 1 x 1 as shortcuts."""
    blocks: list[nn.Module] = []
    inp = width
    for stage in range(3):
        for index in range((depth - 2) // 6):
            blocks.append(Block(inp, width * 2**stage, 2 if stage and index == 0 else 1))
            inp = width * 2**stage
    stem = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return Stages(stem, blocks, inp, classes, after=False)


def wide_resnet(depth: int, factor: int, classes: int) -> nn.Module:
    """Zagoruyko & Komodakis (2016), without dropout: 36,479,194 weights for depth 28, factor 10 and ten classes."""
    blocks: list[nn.Module] = []
    inp = 16
    for stage in range(3):
        for index in range((depth - 4) // 6):
            blocks.append(Wide(inp, 16 * factor * 2**stage, 2 if stage and index == 0 else 1))
            inp = 16 * factor * 2**stage
    return Stages([nn.Conv2d(3, 16, 3, 1, 1, bias=False)], blocks, inp, classes, after=True)


def pyramidnet(depth: int, alpha: int, classes: int) -> nn.Module:
    """Han et al. (2017) with basic blocks: each block has alpha/blocks channels more than the one before."""
    each = (depth - 2) // 6
    blocks: list[nn.Module] = []
    inp = 16
    for index in range(3 * each):
        out = int(16 + alpha * (index + 1) / (3 * each))
        blocks.append(Pyramid(inp, out, 2 if index in (each, 2 * each) else 1))
        inp = out
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)]
    return Stages(stem, blocks, inp, classes, after=True)


def vit_small(classes: int, side: int, patch: int) -> nn.Module:
    """ViT-S (Touvron et al., 2021): 12 layers of 384 with six heads, for images of ``side`` in patches of ``patch``."""
    from transformers import ViTConfig, ViTForImageClassification

    size: dict[str, Any] = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
    config = ViTConfig(**size, image_size=side, patch_size=patch, **_labels(classes))
    return Logits(ViTForImageClassification(config), "pixel_values")


def resnet50(classes: int) -> nn.Module:
    """ResNet-50 (He et al., 2016) for ImageNet's images: 25,557,032 weights for 1,000 classes."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(depths=[3, 4, 6, 3], hidden_sizes=[256, 512, 1024, 2048], **_labels(classes))
    return Logits(ResNetForImageClassification(config), "pixel_values")


def _labels(classes: int) -> dict[str, Any]:
    """An argument that ``transformers`` takes, but does not declare."""
    return {"num_labels": classes}


#: By name: called with the number of classes.
NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "ResNet-18": lambda classes: ResNet18(64, classes),
    "ResNet-18, width 16": lambda classes: ResNet18(16, classes),
    "ResNet-32": lambda classes: resnet(32, classes),
    "ResNet-50": resnet50,
    "WideResNet-28-10": lambda classes: wide_resnet(28, 10, classes),
    "PyramidNet-110": lambda classes: pyramidnet(110, 270, classes),
    "ViT-S/4": lambda classes: vit_small(classes, 32, 4),
    "ViT-S/16": lambda classes: vit_small(classes, 224, 16),
}


def build(name: str, classes: int) -> nn.Module:
    """A network with its convolutions in channels-last order, which is the faster one."""
    return NETWORKS[name](classes).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
