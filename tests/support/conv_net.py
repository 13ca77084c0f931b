"""A small conv net with batch norm, its batches, and the closures and functional losses over them."""

import copy

import torch
from torch import nn
from torch.func import functional_call


def conv_net(dtype=torch.float64, seed=0):
    """Conv, batch norm, transposed conv, batch norm, linear: every kind of row, 1-d weights and biases; smooth."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(2, 4, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.ConvTranspose2d(4, 3, 2, bias=False),
            nn.BatchNorm2d(3),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(75, 3),
        )
        for module in net:
            if isinstance(module, nn.BatchNorm2d):  # away from the exact ones and zeros of a fresh net
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
    return net.to(dtype)


TRANSPOSED = ("3.weight",)


class Pointwise(nn.Module):
    """Parameters of several shapes, one of them a stack of filters, in a net of element-wise operations and sums only:
    on every device its gradients are the same to the bit whenever they are computed."""

    def __init__(self, dtype=torch.float32, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in {"weight": (3, 72), "filters": (5, 2, 3, 3), "shift": (72,), "gain": ()}.items():
            values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            self.register_parameter(name, nn.Parameter(values))

    def forward(self, x):
        """x: (n, 2, 6, 6), to (n, 3)."""
        x = x.flatten(1) * (self.filters * self.gain).sin().mean() + self.shift
        return (x[:, None, :] * self.weight).tanh().sum(-1)


class Task:
    """A net and `steps` pairs of (training, validation) batches, made on the CPU and moved to the device."""

    def __init__(self, dtype=torch.float64, steps=10, seed=0, net=None, device="cpu"):
        self.net = (net or conv_net(dtype, seed)).to(device)
        generator = torch.Generator().manual_seed(1000 + seed)
        x = torch.randn(2 * steps, 8, 2, 6, 6, generator=generator, dtype=torch.float64).to(dtype)
        y = torch.randint(3, (2 * steps, 8), generator=generator)
        pairs = list(zip(x.to(device), y.to(device), strict=True))
        self.batches = list(zip(pairs[::2], pairs[1::2], strict=True))

    def weights(self):
        return {name: p.detach().clone() for name, p in self.net.named_parameters()}

    def bits(self):
        return [p.detach().clone() for p in self.net.parameters()]

    def functional(self):
        """loss(weights, batch) for the oracle, on a net of its own."""
        net = copy.deepcopy(self.net)
        return lambda weights, batch: nn.functional.cross_entropy(functional_call(net, weights, batch[0]), batch[1])

    def loss(self, batch):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def closure(self, batch, opt=None, calls=None):
        """torch's closure convention: zero the gradients, forward, backward, return the loss."""

        def run():
            if calls is not None:
                calls.append(batch)
            self.net.zero_grad()
            loss = self.loss(batch)
            loss.backward()
            return loss

        return run

    def run(self, opt, batches=None, learned=False):
        """Steps through the batches; with `learned`, hands the validation closure over."""
        for batch, val_batch in self.batches if batches is None else batches:
            if learned:
                opt.step(self.closure(batch), self.closure(val_batch))
            else:
                opt.step(self.closure(batch))
