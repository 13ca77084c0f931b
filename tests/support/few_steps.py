"""A program for an environment that a wheel was installed into: a few steps. Prints where, on what, what of CUDA."""

import sys

import torch

import lets_kernels


def main():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    inputs, targets = torch.randn(64, 8), torch.randn(64, 1)
    optimizer = lets_kernels.LETSASAM(net.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)

    def closure():
        optimizer.zero_grad()
        loss = (net(inputs) - targets).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure, closure).item() for _ in range(20)]
    print(lets_kernels.__file__)
    print(optimizer.backend)
    print(lets_kernels.backends()["cuda"])
    if not losses[-1] < 0.9 * losses[0]:
        return f"the loss did not fall: {losses}"
    if optimizer.backend not in ("cpu", *sys.argv[1:]):
        return f"the steps went through {optimizer.backend}"
    return 0


if __name__ == "__main__":
    sys.exit(main())
