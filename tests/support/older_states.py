"""States that an earlier commit has saved, and what its next steps made of them: written there, read by a test here.

Written at a4cfd8a, whose optimizers were other classes in other files::

    git worktree add --detach ../older a4cfd8a
    cd ../older && python <this file> <tests/state/a4cfd8a.pt of this tree>

It imports nothing of the tests, so that it runs there. The steps are torch's alone, without a product of matrices, so
that they round alike on every machine; the reference backend, in float64, needs no compiled kernel.
"""

import copy
import sys

import torch

import lets_kernels as lk

PLAIN = {"backend": "reference"}
SGD = {"base_optimizer": torch.optim.SGD, "lr": 0.02, "momentum": 0.9, "weight_decay": 1e-3, **PLAIN}
ADAMW = {"base_optimizer": torch.optim.AdamW, "lr": 0.01, **PLAIN}

#: Each with what would be lost if it did not travel: momentum, averages, masks, draws, counts, ν and its optimizer.
METHODS = {
    "SAM": lambda p: lk.SAM(p, rho=0.1, **SGD),
    "SAM, AdamW": lambda p: lk.SAM(p, rho=0.1, **ADAMW),
    "SAM, a radius by steps": lambda p: lk.SAM(p, rho=lk.ScheduledRadius(lambda step: 0.1 / (1 + step)), **SGD),
    "ASAM": lambda p: lk.ASAM(p, rho=0.5, **SGD),
    "RST": lambda p: lk.RST(p, rho=0.1, p=0.5, seed=3, **SGD),
    "LookSAM": lambda p: lk.LookSAM(p, rho=0.1, k=5, alpha=0.7, **SGD),
    "AE-SAM": lambda p: lk.AESAM(p, rho=0.1, steps=10, **SGD),
    "R-SAM": lambda p: lk.RSAM(p, rho=0.1, gamma=0.1, seed=3, **SGD),
    "Sparse SAM": lambda p: lk.SparseSAM(p, rho=0.1, sparsity=0.5, seed=3, **SGD),
    "Sparse SAM, dynamic": lambda p: lk.SparseSAM(p, rho=0.1, kind="dynamic", interval=3, steps=10, seed=3, **SGD),
    "Friendly SAM": lambda p: lk.FriendlySAM(p, rho=0.1, **SGD),
    "VaSSO": lambda p: lk.VaSSO(p, rho=0.1, **SGD),
    "GSAM": lambda p: lk.GSAM(p, rho=0.1, alpha=0.4, **SGD),
    "bSAM": lambda p: lk.BSAM(p, rho=0.05, lr=0.1, data_size=500, seed=3, **PLAIN),
    "LETS-SAM": lambda p: lk.LETSSAM(p, rho=0.1, **SGD),
    "LETS-ASAM": lambda p: lk.LETSASAM(p, rho=0.5, **SGD),
    "LETS, the gradient used again": lambda p: lk.SAM(p, rho=lk.LearnedRadius(0.1, reuse_train_gradient=True), **SGD),
}
SAVED_AFTER, STEPS = 4, 7


def begin():
    """Two parameters, float64 of shapes [6, 4] and [5]."""
    numbers = torch.arange(29, dtype=torch.float64).mul(0.37).sin()
    return [numbers[:24].reshape(6, 4).clone().requires_grad_(), numbers[24:].clone().requires_grad_()]


def copies(params):
    return [p.detach().clone() for p in params]


def train(opt, params, first, last):
    """The steps from number ``first`` to before ``last``: towards targets that change from step to step."""

    def closure(shift):
        opt.zero_grad()
        loss = sum(((p - 0.1 * shift) ** 2 * (1 + p.square())).sum() for p in params)
        loss.backward()
        return loss

    for step in range(first, last):
        validation = [lambda step=step: closure(step + 0.5)] if opt.radius.learns else []
        opt.step(lambda step=step: closure(step), *validation)


def written():
    """For every method its state after some steps, and the weights before and after the steps that followed."""
    found = {}
    for name, make in METHODS.items():
        params = begin()
        opt = make(params)
        train(opt, params, 0, SAVED_AFTER)
        at, state = copies(params), copy.deepcopy(opt.state_dict())
        train(opt, params, SAVED_AFTER, STEPS)
        found[name] = {"params": at, "state": state, "after": copies(params)}
    return found


if __name__ == "__main__":
    torch.save(written(), sys.argv[1])
