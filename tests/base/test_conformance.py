"""SAM, ASAM and LETS-SAM over torch's optimizers in torch's generated optimizer tests: the machinery is torch's, the
entries are those of conformance_entries.py; test_conformance_table.py lists torch's tests and says which do not apply.

Many of these rest on a linear loss: its gradient is the same wherever it is taken, so a perturbation changes nothing,
and the step, the state and the options must be those of the base optimizer by itself, which torch computes.
"""

import copy

import pytest
import torch
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optims
from torch.testing._internal.common_utils import parametrize, set_default_dtype

from support.conformance_entries import (
    ENTRIES,
    REFUSED,
    SHAPES,
    Conformance,
    Linear,
    base_alone,
    configurations,
    parameters,
    take,
)
from support.given_gradients import weights
from support.guard_bands import same_bits


class TestConformance(Conformance):
    @optims(ENTRIES)
    def test_no_configuration_chooses_an_implementation(self, device, dtype, optim_info):
        found = [set(kwargs) for kwargs in configurations(optim_info, device)]
        assert len(found) >= 5 and not set.union(*found) & {"foreach", "fused", *REFUSED}
        assert not set(REFUSED) & {*optim_info.supported_impls, *optim_info.not_og_supported_flags}

    @optims(ENTRIES)
    def test_what_cannot_work_is_refused(self, device, dtype, optim_info):
        cases = optim_info.optim_error_inputs_func(device, dtype)
        assert len(cases) >= 15
        for case in cases:
            given, message = case.optimizer_error_input, case.error_regex
            assert case.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
            kinds = case.error_type if isinstance(case.error_type, tuple) else (case.error_type,)
            warned = issubclass(kinds[0], Warning)
            expected = pytest.warns(kinds, match=message) if warned else pytest.raises(kinds, match=message)
            with self.subTest(given.desc), expected:
                optim_info.optim_cls(given.params, **given.kwargs)

    @parametrize("contiguous", [True, False])
    @optims(ENTRIES, dtypes=[torch.float32, torch.float64])
    def test_the_loss_goes_down(self, device, dtype, optim_info, contiguous):
        for kwargs in configurations(optim_info, device):
            weight, bias = parameters(dtype, (10, 5, 2), (10, 2))
            if not contiguous:
                weight, bias = (torch.nn.Parameter(p.detach()[..., 0]) for p in (weight, bias))
            x = torch.linspace(-1, 1, 5, dtype=dtype)
            opt = optim_info.optim_cls([weight, bias], **kwargs)

            def closure():
                opt.zero_grad()
                loss = (torch.einsum("oi...,i->o...", weight, x) + bias).square().sum()
                loss.backward()
                return loss

            first = take(opt, closure)
            for _ in range(20):
                last = take(opt, closure)
            assert last < first, kwargs

    @optims(ENTRIES, dtypes=[torch.float32, torch.float64])
    def test_on_a_linear_loss_the_steps_are_the_base_optimizers(self, device, dtype, optim_info):
        for kwargs in configurations(optim_info, device):
            ours, theirs = (Linear(parameters(dtype, *SHAPES)) for _ in range(2))
            opt, own = optim_info.optim_cls(ours.params, **kwargs), base_alone(optim_info, theirs.params, kwargs)
            ours.run(opt)
            theirs.run(own)
            self.assert_same_steps(opt, own)

    @optims(ENTRIES)
    def test_groups_and_schedulers_are_the_base_optimizers(self, device, dtype, optim_info):
        """Every scheduler of the entry, on groups with a learning rate and a weight decay of their own."""
        found = configurations(optim_info, device)
        for n in range(max(len(found), len(optim_info.scheduler_inputs))):
            kwargs, make = found[n % len(found)], optim_info.scheduler_inputs[n % len(optim_info.scheduler_inputs)]
            ends = []
            for build in (optim_info.optim_cls, lambda p, **k: base_alone(optim_info, p, k)):
                task = Linear(parameters(dtype, *SHAPES))
                a, b, c, d = task.params
                groups = [{"params": [a]}, {"params": [b, c], "lr": 0.03}, {"params": [d], "weight_decay": 0.2}]
                opt = build(groups, **copy.deepcopy(kwargs))
                task.run(opt, 5, [scheduler(opt) for scheduler in make])
                ends.append(opt)
            self.assert_same_steps(*ends)

    @parametrize("dimensions", [0, 1])
    @optims(ENTRIES)
    def test_a_learning_rate_may_be_a_tensor(self, device, dtype, optim_info, dimensions):
        for kwargs in configurations(optim_info, device):
            rate = float(kwargs.pop("lr", 0.01))
            tensor = torch.full((1,) * dimensions, rate, dtype=torch.float64)
            ours, theirs = (Linear(parameters(dtype, *SHAPES)) for _ in range(2))
            opt = optim_info.optim_cls(ours.params, **kwargs, lr=tensor)
            own = base_alone(optim_info, theirs.params, {**kwargs, "lr": rate})
            for value in (rate, rate / 2):
                tensor.fill_(value)
                own.param_groups[0]["lr"] = value
                ours.run(opt)
                theirs.run(own)
            assert opt.param_groups[0]["lr"] is tensor
            opt.param_groups[0]["lr"] = own.param_groups[0]["lr"]
            self.assert_same_steps(opt, own)

    @optims(ENTRIES)
    def test_the_base_optimizers_implementations_change_no_step(self, device, dtype, optim_info):
        for flag in optim_info.supported_impls:
            for kwargs in configurations(optim_info, device):
                if isinstance(kwargs.get("lr"), torch.Tensor) and flag == "foreach":
                    continue  # which torch refuses for some optimizers
                ends = []
                for value in (True, False):
                    task = Linear(parameters(dtype, *SHAPES))
                    opt = optim_info.optim_cls(task.params, **copy.deepcopy(kwargs), **{flag: value})
                    task.run(opt)
                    assert opt.param_groups[0].pop(flag) is value
                    ends.append(opt)
                self.assert_same_steps(*ends)

    @optims(ENTRIES)
    def test_the_default_dtype_is_nobodys_concern(self, device, dtype, optim_info):
        ends = []
        for default in (torch.float32, torch.float64):
            with set_default_dtype(default):
                task = Linear(parameters(dtype, *SHAPES))
                opt = optim_info.optim_cls(task.params)
                task.run(opt)
            ends.append([opt.rho, *weights(task.params)])
        assert same_bits(*ends)

    @optims(ENTRIES)
    def test_several_dtypes_take_one_step(self, device, dtype, optim_info):
        dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
        ours, theirs = (Linear([parameters(d, (4, 3))[0] for d in dtypes]) for _ in range(2))
        opt, own = optim_info.optim_cls(ours.params), base_alone(optim_info, theirs.params, {})
        ours.run(opt)
        theirs.run(own)
        # Half precision: torch rounds to storage between the operations of a step, the ops once at its end.
        self.assert_same_steps(opt, own, rtol=0.02, atol=1e-3)


instantiate_device_type_tests(TestConformance, globals(), only_for="cpu")
