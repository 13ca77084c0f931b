"""``--model mine.py:make``: the user's module, and a batch of its if the function returns one."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lets_kernels.bench.shapes import Shape


class ModelError(ValueError):
    """The user's module cannot be had; the message says why."""


@dataclass
class Own:
    """A module with its loss on a batch; ``batch`` None: only the shapes of its parameters are used."""

    module: nn.Module
    batch: Any = None

    @property
    def shapes(self) -> list[Shape]:
        return [tuple(p.shape) for p in self.module.parameters() if p.requires_grad]

    def loss(self, module: nn.Module) -> Tensor:
        """The output's ``loss`` if it has one, else the mean square of its first tensor: what it is costs no more."""
        if isinstance(self.batch, Mapping):
            output = module(**self.batch)
        elif isinstance(self.batch, Sequence):
            output = module(*self.batch)
        else:
            output = module(self.batch)
        loss = output["loss"] if isinstance(output, Mapping) and "loss" in output else getattr(output, "loss", None)
        return loss if isinstance(loss, Tensor) else _first(output).float().square().mean()


def called(text: str) -> Any:
    """What a function without arguments in a file returns, for ``file.py:function``.

    Raises:
        ModelError: no such file or function; the file or the function raises.
    """
    file, _, name = text.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise ModelError(f"there is no file {file!r}; write FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ModelError(f"{file} is no Python file")
    code = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(code)
    except Exception as error:
        raise ModelError(f"{file} does not run: {type(error).__name__}: {error}") from error
    make = getattr(code, name, None)
    if not callable(make):
        raise ModelError(f"{file} has no function {name!r}")
    try:
        return make()
    except Exception as error:
        raise ModelError(f"{name}() in {file} failed: {type(error).__name__}: {error}") from error


def load(text: str) -> Own:
    """The module that ``make()`` in a file returns, or module and batch in a tuple, for ``file.py:make``.

    The batch is the module's argument: a tensor, a tuple of arguments, or a dict of keyword arguments.

    Raises:
        ModelError: no such file or function; the file or the function raises; no module with parameters comes back.
    """
    made = called(text)
    file, _, name = text.rpartition(":")
    module, batch = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, nn.Module):
        raise ModelError(f"{name}() in {file} returns {type(module).__name__}; return a module, or (module, batch)")
    own = Own(module, batch)
    if not own.shapes:
        raise ModelError(f"the module that {name}() in {file} returns has no parameters that require gradients")
    if batch is not None:
        try:
            own.loss(module).backward()
        except Exception as error:
            raise ModelError(
                f"the module of {file} does not take its batch: {type(error).__name__}: {error}"
            ) from error
        module.zero_grad()
    return own


def _first(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, Sequence) else ()
    for value in values:
        if isinstance(value, Tensor) and torch.is_floating_point(value):
            return value
    raise ModelError(f"the module returns {type(output).__name__}, in which there is no tensor to take a loss of")
