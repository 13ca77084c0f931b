"""States that an earlier commit has saved still load, and training goes on from them as it did there."""

from pathlib import Path

import pytest
import torch

from support.older_states import METHODS, SAVED_AFTER, STEPS, train

OLDER = torch.load(Path(__file__).with_name("a4cfd8a.pt"), weights_only=True)


def test_every_method_has_been_saved_there():
    assert OLDER.keys() == METHODS.keys()


@pytest.mark.parametrize("method", METHODS)
def test_a_state_of_a4cfd8a_goes_on_as_it_did_there(method):
    saved = OLDER[method]
    params = [p.clone().requires_grad_() for p in saved["params"]]
    opt = METHODS[method](params)
    opt.load_state_dict(saved["state"])
    train(opt, params, SAVED_AFTER, STEPS)
    for p, before, after in zip(params, saved["params"], saved["after"], strict=True):
        # Three steps in float64 of a smooth function: powers and roots may round otherwise on another machine, by some
        # 1e-16 each, while without the state every one of these is off by more than 1e-4.
        torch.testing.assert_close(p.detach(), after, rtol=0, atol=1e-12)
        assert (p.detach() - before).abs().max() > 1e-4
