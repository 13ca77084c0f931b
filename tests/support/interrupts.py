"""Interrupts at random points, two ways: a timer's signal, and an exception out of a trace function at an instruction.

Python hands a signal over between two instructions of whatever code runs, torch's own among it; most fall where the
time goes. The trace function counts the instructions of chosen files and is even over those, however short they are.
"""

import contextlib
import copy
import random
import signal
import sys
import time
from pathlib import Path

import torch

import lets_kernels
from support.guard_bands import same_bits
from support.inside import held

PACKAGE = str(Path(lets_kernels.__file__).parent)


class Timer:
    """Raises KeyboardInterrupt from SIGALRM, at a random time up to somewhat more than the work takes."""

    def __init__(self, seed, where=PACKAGE):
        self.random, self.armed, self.durations = random.Random(seed), False, [1e-3]

    def __enter__(self):
        self.previous = signal.signal(signal.SIGALRM, self._handle)
        return self

    def __exit__(self, *_):
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self.previous)

    def _handle(self, number, frame):
        if self.armed:
            self.armed = False
            raise KeyboardInterrupt

    def measure(self, work):
        """Run it without an interrupt, to learn how long it takes."""
        began = time.perf_counter()
        work()
        self.durations = [*self.durations, time.perf_counter() - began][-9:]

    def strike(self, work):
        """Run it; True if it was interrupted."""
        typical = sorted(self.durations)[len(self.durations) // 2]
        try:
            self.armed = True
            signal.setitimer(signal.ITIMER_REAL, max(1e-6, self.random.uniform(0, 1.2 * typical)))
            work()
            self.armed = False
        except KeyboardInterrupt:
            return True
        finally:
            self.armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            torch.set_grad_enabled(True)  # torch's own no_grad can be interrupted before it puts this back
        return False


class Tracer:
    """Raises KeyboardInterrupt before a random instruction of the code below `where`, or as it returns."""

    def __init__(self, seed, where=PACKAGE):
        self.random, self.where, self.count, self.target, self.total = random.Random(seed), where, 0, -1, 0

    def __enter__(self):
        self.previous = sys.gettrace()
        return self

    def __exit__(self, *_):
        sys.settrace(self.previous)

    def _call(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(self.where):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._local

    def _local(self, frame, event, argument):
        if event != "exception":
            self.count += 1
            if self.count == self.target:
                raise KeyboardInterrupt
        return self._local

    def measure(self, work):
        """Run it without an interrupt, to learn how many instructions it takes."""
        if self.random.random() < 0.1 or self.total == 0:
            self._run(work, -1)
            self.total = self.count
        else:
            work()

    def strike(self, work):
        """Run it; True if it was interrupted."""
        try:
            self._run(work, self.random.randint(1, self.total))
        except KeyboardInterrupt:
            return True
        return False

    def _run(self, work, target):
        self.count, self.target = 0, target
        with contextlib.ExitStack() as stack:
            stack.callback(sys.settrace, self.previous)
            sys.settrace(self._call)
            work()


SHAPES = ((3, 2, 2, 2), (5,), (), (2, 9))


class Problem:
    """Two groups of two parameters, and a loss ½ Σ (θ − a)² whose gradient is written down, for batches of a's.

    `build` makes the optimizer from the groups. A method that looks at samples gets three of the a's in a step by
    closure, and autograd.
    """

    def __init__(self, dtype, build):
        generator = torch.Generator().manual_seed(0)

        def tensors():
            return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]

        self.params = [torch.nn.Parameter(t) for t in tensors()]
        self.batches = [tensors() for _ in range(6)]
        self.opt = build([{"params": self.params[:2]}, {"params": self.params[2:]}])
        self.learned = isinstance(self.opt, lets_kernels.SAM) and self.opt.radius.learns

    def weights(self):
        return [p.detach().clone() for p in self.params]

    def everything(self):
        """Copies of weights, state and radius."""
        tensors, inner = self.weights(), [getattr(self.opt, "base_optimizer", self.opt)]
        if isinstance(self.opt, lets_kernels.SAM):
            own = self.opt.state_dict()["lets_kernels"]
            numbers = [own["step"], own["gradients"], own["skipped"], *own["random"].values()]
            numbers += [v for part in ("direction", "schedule", "descent") for v in own[part].values()]
            tensors += [self.opt.rho, *(torch.as_tensor(v).clone() for v in numbers)]
            tensors += [t.clone() for p in self.params for _, t in sorted(held(self.opt).get(p, {}).items())]
        if self.learned:
            inner.append(self.opt.radius.optimizer)
        for optimizer in inner:
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                state = optimizer.state.get(p, {})
                tensors += [p.detach().clone(), *(state[k].clone() for k in sorted(state) if torch.is_tensor(state[k]))]
        return tensors

    def take_over(self, other):
        """Become what a checkpoint of the other would be."""
        with torch.no_grad():
            torch._foreach_copy_(self.params, other.params)
        self.opt.load_state_dict(copy.deepcopy(other.opt.state_dict()))

    def backward(self, i):
        loss = torch.zeros(())
        for p, a in zip(self.params, self.batches[i % 6], strict=True):
            p.grad = p.detach() - a
            loss = loss + 0.5 * p.grad.float().square().sum()
        return loss

    def samples(self, i, subset):
        """The losses of three samples, and their outputs θ − a for a method that weights samples by those."""
        targets = [self.batches[(i + j) % 6] for j in ([0, 1, 2] if subset is None else subset.tolist())]
        pairs = [zip(self.params, target, strict=True) for target in targets]
        outputs = torch.stack([torch.cat([(p - a).float().flatten() for p, a in pair]) for pair in pairs])
        losses = 0.5 * outputs.square().sum(dim=1)
        return (losses, outputs) if isinstance(self.opt.samples, lets_kernels.WeightedSamples) else losses

    def closures(self, i):
        if isinstance(self.opt, lets_kernels.SAM) and self.opt.samples.per_sample:  # the controls are none
            return ((lambda subset=None: self.samples(i, subset)),)
        train, validation = (lambda: self.backward(i)), (lambda: self.backward(i + 1))
        return (train, validation) if self.learned else (train,)

    def first_backward(self, i):
        """The first pass as its method wants it done in the shapes without a closure."""
        if self.opt.direction.starts:
            with self.opt.first_pass():
                self.backward(i)
        elif self.opt.direction.needs_gradient:
            self.backward(i)


def by_closure(problem, i):
    problem.opt.step(*problem.closures(i))


def by_two_steps(problem, i):
    problem.first_backward(i)
    problem.opt.first_step(zero_grad=True)
    problem.backward(i)
    while getattr(problem.opt, "ascents_left", 0):  # the controls have none
        problem.opt.first_step(zero_grad=True)
        problem.backward(i)
    problem.opt.second_step()
    if problem.learned:
        problem.opt.radius_step(*problem.closures(i))


def by_context(problem, i):
    problem.first_backward(i)
    with problem.opt.perturbed():
        problem.backward(i)
    while getattr(problem.opt, "ascents_left", 0):
        with problem.opt.perturbed():
            problem.backward(i)
    problem.opt.step()
    if problem.learned:
        problem.opt.radius_step(*problem.closures(i))


def sound(weights, before, after, groups):
    """Whether the weights are those from before or after the step, one choice for each group of parameters."""

    def are(those, group):
        return same_bits([weights[i] for i in group], [those[i] for i in group])

    return all(are(before, group) or are(after, group) for group in groups)


def strike(interrupts, problem, twin, take, groups, enter, count):
    """Interrupt `count` steps: how many left wrong weights at once, and how many still after `enter(problem)`.

    `twin`, never interrupted, says what is right: before every interrupt it takes over weights and state as a
    checkpoint would, and one whole step of both must give the same bits; its second step is the one cut short.
    """
    interrupted = at_once = later = 0
    for i in range(0, 40 * count, 2):
        if interrupted == count:
            return at_once, later
        twin.take_over(problem)
        take(twin, i)
        interrupts.measure(lambda i=i: take(problem, i))
        assert same_bits(problem.everything(), twin.everything()), "it does not go on as from a checkpoint"
        before = problem.weights()
        take(twin, i + 1)
        after = twin.weights()
        if interrupts.strike(lambda i=i: take(problem, i + 1)):
            interrupted += 1
            at_once += not sound(problem.weights(), before, after, groups)
            enter(problem)
            later += not sound(problem.weights(), before, after, groups)
        else:
            assert same_bits(problem.everything(), twin.everything())
    raise AssertionError(f"only {interrupted} of {count} interrupts arrived")
