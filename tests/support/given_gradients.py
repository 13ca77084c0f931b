"""Parameters with gradients given by hand, and snapshots of everything that a step may change."""

import torch

from support.conv_net import Task

SHAPES = ((3, 4, 2, 2), (7,), (), (5, 6), (0,), (1, 33))


class Toy:
    """A handful of parameters of odd shapes; `grads(i)` are the i-th gradients, the same in every process.

    `dtype` may be one for each shape: what has one dtype forms a bucket.
    """

    def __init__(self, dtype=torch.float32, shapes=SHAPES, seed=0, device="cpu"):
        self.generator = torch.Generator().manual_seed(seed)
        self.seed, self.shapes, self.dtype, self.device = seed, shapes, dtype, device
        self.params = [torch.nn.Parameter(x) for x in self._randn()]

    def _randn(self):
        dtypes = self.dtype if isinstance(self.dtype, (list, tuple)) else [self.dtype] * len(self.shapes)
        return [
            torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.device, dtype)
            for shape, dtype in zip(self.shapes, dtypes, strict=True)
        ]

    def grads(self, i):
        self.generator.manual_seed(1000 * (self.seed + 1) + i)
        return self._randn()

    def set_grads(self, grads):
        for p, g in zip(self.params, grads, strict=True):
            p.grad = None if g is None else g.clone()

    def two_steps(self, opt, first, second):
        """One step in the two-step shape with these gradients."""
        with opt.first_pass():
            self.set_grads(first)
        opt.first_step(zero_grad=True)
        self.set_grads(second)
        while opt.ascents_left:
            opt.first_step(zero_grad=True)
            self.set_grads(second)
        opt.second_step(zero_grad=True)

    def steps(self, opt, count, start=0):
        for i in range(start, start + count):
            self.two_steps(opt, self.grads(2 * i), self.grads(2 * i + 1))


def closures(opt, *losses):
    """One closure for each loss, a function of how often it was called."""

    def closure_of(loss):
        calls = iter(range(1000))

        def closure():
            opt.zero_grad()
            value = loss(next(calls))
            value.backward()
            return value

        return closure

    return [closure_of(loss) for loss in losses]


def weights(source):
    """Copies of the weights of a Task, a Toy, a module or a list of parameters."""
    if isinstance(source, Task):
        source = source.net
    params = source.params if isinstance(source, Toy) else source
    params = params.parameters() if isinstance(params, torch.nn.Module) else params
    return [p.detach().clone() for p in params]


def snapshot(opt):
    """Copies of the weights, the base optimizer's state (in the order of its keys) and the radius."""
    result = [opt.rho.clone()]
    optimizers = [opt.base_optimizer] + ([opt.radius.optimizer] if opt.radius.learns else [])
    for inner in optimizers:
        for p in (p for group in inner.param_groups for p in group["params"]):
            state = inner.state.get(p, {})
            result += [p.detach().clone(), *(state[k].clone() for k in sorted(state) if torch.is_tensor(state[k]))]
    return result
