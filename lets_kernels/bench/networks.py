"""Networks to train for the clock's sake: stand-ins of three kinds, small enough for two cores, and the user's."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lets_kernels.bench.own import Own
from lets_kernels.bench.resnet import ResNet18

WIDTH, BATCH, SIDE = 16, 32, 32
DIM, HEADS, DEPTH, PATCH = 96, 4, 4, 4
WORDS, LENGTH, TEXTS = 1000, 64, 16


@dataclass(frozen=True)
class Network:
    """A module with its loss on a batch of training data, and on one of validation data."""

    name: str
    module: nn.Module
    loss: Callable[[nn.Module], Tensor]
    validation: Callable[[nn.Module], Tensor]


class Transformer(nn.Module):
    """``DEPTH`` encoder layers (norm first, no dropout) on (batch, length, ``DIM``), positions learned."""

    def __init__(self, length: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(DIM, HEADS, 4 * DIM, 0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, DEPTH, nn.LayerNorm(DIM), enable_nested_tensor=False)
        self.positions = nn.Parameter(0.02 * torch.randn(length, DIM))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.encoder(x + self.positions, mask=mask)


class SmallViT(nn.Module):
    """Images (batch, 3, ``SIDE``, ``SIDE``) to ten logits: ViT (Dosovitskiy et al., 2021), tokens averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, DIM, PATCH, PATCH)
        self.body = Transformer((SIDE // PATCH) ** 2)
        self.head = nn.Linear(DIM, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


class SmallLanguageModel(nn.Module):
    """Words (batch, ``LENGTH``) to logits of each next word; each word sees those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, DIM)
        self.body = Transformer(LENGTH)
        self.head = nn.Linear(DIM, WORDS)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.words(x), self.mask))


def resnet() -> Network:
    """A ResNet-18 of a quarter of its width, for small images."""
    return _of_images(f"ResNet-18 of width {WIDTH}", lambda: ResNet18(WIDTH))


def vit() -> Network:
    """A ViT of four layers."""
    return _of_images(f"a ViT of {DEPTH} layers of width {DIM}", SmallViT)


def language_model() -> Network:
    """A transformer of four layers that predicts random words."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = SmallLanguageModel()
        batches = [torch.randint(WORDS, (TEXTS, LENGTH + 1)) for _ in range(2)]
    name = _name(f"a language model of {DEPTH} layers of width {DIM}", net, f"{TEXTS} texts of {LENGTH} words")

    def loss(words: Tensor) -> Callable[[nn.Module], Tensor]:
        return lambda module: cross_entropy(module(words[:, :-1]).flatten(0, 1), words[:, 1:].flatten())

    return Network(name, net, *map(loss, batches))


def users(own: Own) -> Network:
    """The user's module. Its batch serves as validation data too: they cost the same."""
    name = f"your module ({sum(p.numel() for p in own.module.parameters()):,} weights)"
    return Network(name, own.module, own.loss, own.loss)


def networks(own: Own | None) -> list[Callable[[], Network]]:
    """The user's module where there is a batch for it, else all stand-ins, the ResNet first."""
    if own is None or own.batch is None:
        return [resnet, vit, language_model]
    return [lambda: users(own)]


def _of_images(what: str, make: Callable[[], nn.Module]) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = make()
        batches = [(torch.randn(BATCH, 3, SIDE, SIDE), torch.randint(10, (BATCH,))) for _ in range(2)]

    def loss(images: Tensor, labels: Tensor) -> Callable[[nn.Module], Tensor]:
        return lambda module: cross_entropy(module(images), labels)

    return Network(_name(what, net, f"{BATCH} images of {SIDE}x{SIDE}"), net, *(loss(*batch) for batch in batches))


def _name(what: str, net: nn.Module, batch: str) -> str:
    return f"a stand-in: {what} ({sum(p.numel() for p in net.parameters()):,} weights), {batch}"
