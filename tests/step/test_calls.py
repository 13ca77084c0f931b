"""How much of the package one step passes through: what a reader has to follow, and the host has to run."""

import sys
from pathlib import Path

import torch

import lets_kernels as lk

ROOT = str(Path(lk.__file__).parent)
#: Calls outside of the reference's arithmetic: each more is one more to read and to run.
MOST = 70


def calls(function):
    """Every call of a function of the package, by its file and name."""
    found = []

    def seen(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(ROOT):
            found.append((frame.f_code.co_filename, frame.f_code.co_name))

    sys.setprofile(seen)
    try:
        function()
    finally:
        sys.setprofile(None)
    return found


def test_a_warm_first_step_is_short():
    params = [torch.nn.Parameter(torch.randn(8, 8)) for _ in range(161)]
    opt = lk.SAM(params, torch.optim.SGD, lr=0.1, momentum=0.9, backend="reference")

    def backward():
        for p in params:
            p.grad = torch.randn(8, 8)

    for _ in range(3):
        backward()
        opt.first_step(zero_grad=True)
        backward()
        opt.second_step()
    backward()
    found = [call for call in calls(lambda: opt.first_step(zero_grad=True)) if "/ops/reference/" not in call[0]]
    assert 30 < len(found) <= MOST, found
