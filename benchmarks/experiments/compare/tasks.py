"""The tasks: the digits, and a smaller CIFAR-10; labels right, and 40 % of them wrong."""

from dataclasses import replace
from functools import partial

from torch import Tensor
from torch.nn.functional import avg_pool2d

from benchmarks.experiments import data
from benchmarks.experiments.data import Data
from benchmarks.experiments.tasks import TASKS as FULL
from benchmarks.experiments.tasks import Task, convolutions

VALIDATION = 5  # one in so many training samples


def small_cifar(seed: int, noise: float, train: int, test: int) -> Data:
    """Inputs are float32 [n, 3, 16, 16], means of two by two pixels."""
    found = data.cifar(seed, noise, train, test)
    return replace(found, train_inputs=_halved(found.train_inputs), test_inputs=_halved(found.test_inputs))


def _halved(images: Tensor) -> Tensor:
    return avg_pool2d(images, 2)


def held_out(found: Data) -> Data:
    """The last fifth of the training set as the test set, its wrong labels among them; the others to train on."""
    kept = len(found.train_inputs) - len(found.train_inputs) // VALIDATION
    inputs, targets = found.train_inputs, found.train_targets
    return Data(inputs[:kept], targets[:kept], inputs[kept:], targets[kept:])


def _cifar(noise: float) -> Task:
    load = partial(small_cifar, noise=noise, train=2_048, test=2_000)
    name = f"cifar-{noise:.0%}".rstrip("%")
    return Task(name, load, partial(convolutions, 16, 32, 64), 400, 64, lr=0.1, check=data.cifar_file)


TASKS = {
    **{name: FULL[name] for name in ("digits-0", "digits-40")},
    **{task.name: task for task in map(_cifar, (0.0, 0.4))},
}
