"""As test_conformance.py: what a step leaves alone, where it minimises, and saving, loading and copying."""

import copy
import io
import pickle

import pytest
import torch
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import optims
from torch.testing._internal.common_utils import parametrize
from torch.utils._pytree import tree_flatten

from support.conformance_entries import (
    ENTRIES,
    SHAPES,
    Conformance,
    Linear,
    base_alone,
    configurations,
    parameters,
    take,
)
from support.given_gradients import snapshot, weights
from support.guard_bands import same_bits

FLAGS = ("foreach", "fused", "differentiable", "maximize", "capturable")


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


class TestConformanceState(Conformance):
    def goes_on(self, info, kwargs, transfer, steps=3):
        """Everything after some steps, a transfer to other weights and another optimizer, and some steps more."""
        task = Linear(parameters(torch.float32, *SHAPES))
        opt = info.optim_cls(task.params, **copy.deepcopy(kwargs))
        task.run(opt, steps)
        task, opt = transfer(task, opt)
        task.run(opt, steps)
        return snapshot(opt)

    def moved_by(self, change, info, kwargs):
        """The transfer through a state dict that ``change`` has been at, to an optimizer over equal parameters."""

        def transfer(task, opt):
            other = copy.deepcopy(task)
            fresh = info.optim_cls(other.params, **copy.deepcopy(kwargs))
            fresh.load_state_dict(change(opt.state_dict()))
            return other, fresh

        return transfer

    # ---- what a step leaves alone

    @parametrize("shape", ["closure", "two-steps", "context"])
    @optims(ENTRIES)
    def test_without_gradients_a_step_changes_nothing(self, device, dtype, optim_info, shape):
        for kwargs in configurations(optim_info, device):
            task = Linear(parameters(dtype, *SHAPES))
            opt = optim_info.optim_cls(task.params, **kwargs)
            task.run(opt, 1)
            opt.zero_grad()
            before = snapshot(opt)
            if shape == "closure":
                take(opt, lambda: torch.tensor(1.0))
            elif shape == "two-steps":
                with opt.first_pass():
                    pass
                opt.first_step()
                opt.second_step()
            else:
                with opt.first_pass():
                    pass
                with opt.perturbed():
                    pass
                opt.step()
            assert same_bits(snapshot(opt), before)

    @optims(ENTRIES)
    def test_zero_gradients_move_nothing(self, device, dtype, optim_info):
        """Neither do weight decay and momentum, where there has been none; a step that is counted counts."""
        for kwargs in configurations(optim_info, device):
            kwargs["weight_decay"] = 0.0
            params = parameters(dtype, *SHAPES)
            opt = optim_info.optim_cls(params, **kwargs)
            before = weights(params)

            def closure():
                if not opt.direction.draws:  # and goes along what it draws
                    assert same_bits(weights(params), before)  # in the second pass as well
                opt.zero_grad()
                loss = sum((p * 0.0).sum() for p in params)
                loss.backward()
                return loss

            take(opt, closure)
            assert same_bits(weights(params), before)

    @optims(ENTRIES)
    def test_a_gradient_that_is_not_finite_changes_nothing(self, device, dtype, optim_info):
        for kwargs in configurations(optim_info, device, check_finite=True):
            task = Linear(parameters(dtype, *SHAPES))
            opt = optim_info.optim_cls(task.params, **kwargs)
            task.run(opt, 1)
            for which, value in ((0, torch.inf), (1, torch.nan)):
                before, calls = snapshot(opt), []

                def closure():
                    loss = task.closure()
                    if len(calls) == which * opt.direction.needs_gradient:  # those with one pass have no other
                        task.params[1].grad[2] = value
                    calls.append(which)
                    return loss

                take(opt, closure)
                assert same_bits(snapshot(opt), before)
            assert opt.metrics()["skipped_steps"].item() == 2

    @optims(ENTRIES)
    def test_gradients_are_read_and_not_written(self, device, dtype, optim_info):
        for kwargs in configurations(optim_info, device):
            task = Linear(parameters(dtype, *SHAPES))
            opt, given = optim_info.optim_cls(task.params, **kwargs), []

            def closure():
                loss = task.closure()
                given.extend((p.grad, p.grad._version) for p in task.params)
                return loss

            take(opt, closure)
            assert all(g._version == version for g, version in given)
            assert same_bits([g for g, _ in given], task.coefficients() * (len(given) // len(SHAPES)))

    @optims(ENTRIES, dtypes=[torch.float64])
    def test_sparse_gradients_are_refused_and_dense_ones_lead_to_the_minimum(self, device, dtype, optim_info):
        """Rosenbrock's valley, from (1.5, 1.5) towards (1, 1)."""
        p = torch.nn.Parameter(torch.tensor([1.5, 1.5], dtype=dtype))
        opt = optim_info.optim_cls([p], rho=1e-3, lr=1e-3 if optim_info.optim_cls.base is torch.optim.SGD else 0.05)

        def closure(sparse=False):
            opt.zero_grad()
            loss = (1 - p[0]).square() + 100 * (p[1] - p[0].square()).square()
            loss.backward()
            p.grad = p.grad.to_sparse() if sparse else p.grad
            return loss

        begin, before = (p.detach() - 1).norm(), weights([p])
        with pytest.raises(TypeError, match="sparse"):
            take(opt, lambda: closure(sparse=True))
        assert same_bits(weights([p]), before) and not optim_info.supports_sparse
        first = take(opt, closure)
        for _ in range(200):
            last = take(opt, closure)
        assert last < 0.02 * first and (p.detach() - 1).norm() < begin

    @optims(ENTRIES)
    def test_a_step_fills_the_state_the_base_optimizer_would(self, device, dtype, optim_info):
        for kwargs in configurations(optim_info, device):
            ours, theirs = (Linear(parameters(dtype, *SHAPES)) for _ in range(2))
            opt, own = optim_info.optim_cls(ours.params, **kwargs), base_alone(optim_info, theirs.params, kwargs)
            assert {*opt.state} == set() == {*own.state}
            ours.run(opt, 1)
            theirs.run(own, 1)
            found, expected = opt.state_dict(), own.state_dict()
            kinds = [{i: {k: type(v) for k, v in e.items()} for i, e in s["state"].items()} for s in (found, expected)]
            kept = {f"lets_kernels.{name}" for name in opt.direction.held}
            assert all({k for k in e if k in kept} == kept for e in kinds[0].values())
            kinds[0] = {i: {k: t for k, t in e.items() if k not in kept} for i, e in kinds[0].items()}
            empty = {i: {k: t for k, t in e.items() if t is not type(None)} for i, e in kinds[1].items()}
            assert {i: e for i, e in kinds[0].items() if e} == {i: e for i, e in empty.items() if e}
            assert {"state", "param_groups", "lets_kernels"} == {*found}

    @optims(ENTRIES)
    def test_it_can_be_printed(self, device, dtype, optim_info):
        for kwargs in configurations(optim_info, device):
            text = repr(optim_info.optim_cls(parameters(dtype, *SHAPES), **kwargs))
            assert text.startswith(f"{optim_info.name} (") and "    rho: " in text and "    lr: " in text

    # ---- saving, loading, copying

    @optims(ENTRIES)
    def test_equal_optimizers_have_equal_states(self, device, dtype, optim_info):
        for kwargs in configurations(optim_info, device):
            states = []
            for _ in range(2):
                task = Linear(parameters(dtype, *SHAPES))
                opt = optim_info.optim_cls(task.params, **copy.deepcopy(kwargs))
                task.run(opt)
                states += [copy.deepcopy(opt.state_dict()), opt.state_dict()]
            first, *others = [tree_flatten(state) for state in states]
            for leaves, structure in others:
                assert structure == first[1]
                for a, b in zip(leaves, first[0], strict=True):
                    assert type(a) is type(b) and (same_bits(a, b) if torch.is_tensor(a) else a == b)

    @optims(ENTRIES)
    def test_a_saved_state_goes_on_to_the_same_bits(self, device, dtype, optim_info):
        for kwargs in configurations(optim_info, device):
            expected = self.goes_on(optim_info, kwargs, lambda task, opt: (task, opt))
            for change in (copy.deepcopy, through_a_file):
                assert same_bits(self.goes_on(optim_info, kwargs, self.moved_by(change, optim_info, kwargs)), expected)

    @optims(ENTRIES)
    def test_states_from_before_can_be_loaded(self, device, dtype, optim_info):
        """Without the flags that torch added later, with steps that are numbers, and from the base optimizer alone."""

        def older(state):
            for group in state["param_groups"]:
                for flag in FLAGS:
                    group.pop(flag, None)
            for own in state["state"].values():
                own.update({name: value.item() for name, value in own.items() if name == "step"})
            return state

        def bare(state):
            return {name: value for name, value in state.items() if name != "lets_kernels"}

        for kwargs in configurations(optim_info, device):
            expected = self.goes_on(optim_info, kwargs, lambda task, opt: (task, opt))
            for change in (older, bare):
                found = self.goes_on(optim_info, kwargs, self.moved_by(change, optim_info, kwargs))
                # A base optimizer's state has no rho, which comes first, and no nu with its Adam, the last four.
                theirs = slice(1, -4) if "LETS" in optim_info.name and change is bare else slice(None)
                assert same_bits(found[theirs], expected[theirs])

    @optims(ENTRIES)
    def test_states_with_and_without_names_can_be_exchanged(self, device, dtype, optim_info):
        for kwargs in configurations(optim_info, device):
            expected = self.goes_on(optim_info, kwargs, lambda task, opt: (task, opt))
            for before, after in ((True, False), (False, True), (True, True)):
                task = Linear(parameters(dtype, *SHAPES))
                named = [(f"p{i}", p) for i, p in enumerate(task.params)]
                opt = optim_info.optim_cls(named if before else task.params, **copy.deepcopy(kwargs))
                task.run(opt)
                state = opt.state_dict()
                assert ("param_names" in state["param_groups"][0]) is before
                opt = optim_info.optim_cls(named if after else task.params, **copy.deepcopy(kwargs))
                opt.load_state_dict(state)
                assert "param_names" in opt.param_groups[0] or not (before or after)
                task.run(opt)
                assert same_bits(snapshot(opt), expected)

    @optims(ENTRIES)
    def test_a_state_follows_its_parameters_dtype(self, device, dtype, optim_info):
        """Loaded over float64 parameters, float32 averages become float64, as with torch's own; step counts stay."""
        for kwargs in configurations(optim_info, device):
            task = Linear(parameters(torch.float32, *SHAPES))
            opt = optim_info.optim_cls(task.params, **copy.deepcopy(kwargs))
            task.run(opt, 2)
            wide = Linear([torch.nn.Parameter(p.detach().double()) for p in task.params])
            other = optim_info.optim_cls(wide.params, **copy.deepcopy(kwargs))
            other.load_state_dict(opt.state_dict())
            for p, q in zip(task.params, wide.params, strict=True):
                for name, value in opt.state[p].items():
                    if torch.is_tensor(value):
                        moved = other.state[q][name]
                        assert moved.dtype == (value.dtype if name == "step" else torch.float64)
                        assert torch.equal(moved.double(), value.double())
            assert other.rho == opt.rho
            before = weights(wide.params)
            wide.run(other)
            assert not same_bits(weights(wide.params), before)

    @optims(ENTRIES)
    def test_a_copy_is_whole_and_goes_on_to_the_same_bits(self, device, dtype, optim_info):
        def copied(through):
            def transfer(task, opt):
                other = through(opt)
                assert {k for k in vars(other) if k[0] != "_"} == {k for k in vars(opt) if k[0] != "_"}
                moved = Linear([p for group in other.param_groups for p in group["params"]])
                moved.step = task.step
                assert other.base_optimizer is not opt.base_optimizer and other.param_groups is not opt.param_groups
                return moved, other

            return transfer

        for kwargs in configurations(optim_info, device):
            expected = self.goes_on(optim_info, kwargs, lambda task, opt: (task, opt))
            for through in (copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))):
                assert same_bits(self.goes_on(optim_info, kwargs, copied(through)), expected)


instantiate_device_type_tests(TestConformanceState, globals(), only_for="cpu")
