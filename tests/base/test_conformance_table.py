"""Torch's generated optimizer tests by name: where each is answered here, or why it does not apply."""

import importlib
import re
from pathlib import Path

import pytest
from torch.testing._internal.common_optimizers import optim_db

from support.conformance_entries import ENTRIES, PAGES

#: torch's tests by name, and the test that shows the same here: one of test_conformance*.py where no file is named.
ANSWERED = {
    "test_optim_infos_do_not_specify_global_cliquey_kwargs": "test_no_configuration_chooses_an_implementation",
    "test_errors": "test_what_cannot_work_is_refused",
    "test_forloop_goes_right_direction": "test_the_loss_goes_down",
    "test_param_group_with_lrscheduler_goes_right_direction": "test_groups_and_schedulers_are_the_base_optimizers",
    "test_param_groups_lr": "test_groups_and_schedulers_are_the_base_optimizers",
    "test_param_groups_weight_decay": "test_groups_and_schedulers_are_the_base_optimizers",
    "test_tensor_lr": "test_a_learning_rate_may_be_a_tensor",
    "test_complex": "test_complex.py::test_steps_are_those_of_the_real_pairs",
    "test_complex_2d": "test_complex.py::test_steps_are_those_of_the_real_pairs",
    "test_rosenbrock_sparse": "test_sparse_gradients_are_refused_and_dense_ones_lead_to_the_minimum",
    "test_foreach_matches_forloop": "test_the_base_optimizers_implementations_change_no_step",
    "test_fused_matches_forloop": "test_the_base_optimizers_implementations_change_no_step",
    "test_set_default_dtype_works_with_foreach": "test_the_default_dtype_is_nobodys_concern",
    "test_fused_does_not_step_if_foundinf": "test_a_gradient_that_is_not_finite_changes_nothing",
    "test_step_is_noop_when_params_have_no_grad": "test_without_gradients_a_step_changes_nothing",
    "test_step_is_noop_for_zero_grads": "test_zero_gradients_move_nothing",
    "test_optimizer_can_be_printed": "test_it_can_be_printed",
    "test_state_dict_deterministic": "test_equal_optimizers_have_equal_states",
    "test_can_load_older_state_dict": "test_states_from_before_can_be_loaded",
    "test_load_nontensor_step": "test_states_from_before_can_be_loaded",
    "test_save_load_equality_with_weights_only": "test_a_saved_state_goes_on_to_the_same_bits",
    "test_cpu_load_state_dict": "test_a_state_follows_its_parameters_dtype",
    "test_can_load_from_to_named_state_dict": "test_states_with_and_without_names_can_be_exchanged",
    "test_deepcopy_copies_all_public_attrs": "test_a_copy_is_whole_and_goes_on_to_the_same_bits",
    "test_adamw_serialization": "test_a_copy_is_whole_and_goes_on_to_the_same_bits",
    "test_non_empty_state": "test_a_step_fills_the_state_the_base_optimizer_would",
    "test_grads_are_never_inplaced_into": "test_gradients_are_read_and_not_written",
    "test_correctness": "test_compile.py::test_a_step_inside_a_compiled_function_is_the_eager_step",
    "test_mixed_device_dtype": "test_several_dtypes_take_one_step",
    "test_step_pre_hook": "test_hooks.py::test_step_hooks_run_once_a_step_around_what_finishes_it",
    "test_step_post_hook": "test_hooks.py::test_step_hooks_run_once_a_step_around_what_finishes_it",
    "test_step_all_hooks": "test_hooks.py::test_global_hooks_see_a_step_once_fused_or_not",
    "test_state_dict_pre_hook": "test_hooks.py::test_state_dict_hooks_see_the_whole_state_and_may_replace_it",
    "test_state_dict_post_hook": "test_hooks.py::test_state_dict_hooks_see_the_whole_state_and_may_replace_it",
    "test_state_dict_pre_post_hook": "test_hooks.py::test_state_dict_hooks_see_the_whole_state_and_may_replace_it",
    "test_load_state_dict_pre_hook_and_prepend": "test_hooks.py::test_load_hooks_run_around_the_loading_and_leave_"
    "the_callers_dictionary_alone",
    "test_load_state_dict_post_hook": "test_hooks.py::test_load_hooks_run_around_the_loading_and_leave_"
    "the_callers_dictionary_alone",
    "test_load_state_dict_pre_post_hook": "test_hooks.py::test_load_hooks_run_around_the_loading_and_leave_"
    "the_callers_dictionary_alone",
    "test_peak_memory_foreach": "test_memory.py::test_the_package_keeps_one_saved_copy_and_nothing_else_of_"
    "the_weights_size",
    "test_state_dict_with_cuda_params": "test_gpu_state.py::test_a_model_that_moves_after_the_optimizer_was_built_"
    "takes_everything_along",
    "test_forloop_goes_right_direction_multigpu": "test_gpu_state.py::test_parameters_on_two_devices_take_one_step",
}

#: torch's tests that ask for something that is not there, and why it is not.
NOT_APPLICABLE = {
    "test_defaults_changed_to_foreach": "foreach is not a way of this package; the base optimizer's default is its own",
    "test_foreach_large_tensor": "there is no foreach path; long tensors are a matter of the ops' 64-bit offsets",
    "test_fused_large_tensor": "its 2^31 elements are for a GPU's memory; offsets are tested in the ops' own chunks",
    "test_fused_error_on_params_on_meta": "parameters on meta go the way of the reference, which runs on every device",
    "test_fused_cpu_matches_cuda": "both devices are held against one float64 oracle, in every op test",
    "test_second_order_optims_return_consistent_types": "LBFGS calls its closure itself and is refused as a base",
    "test_step_iteration": "a step counter as torch.compile sees it; under torch.compile a step runs as plain Python",
}


# ---- the lists themselves

TESTS = Path(__file__).resolve().parents[1]
OURS = ("test_conformance.py", "test_conformance_state.py")


def names_in(name):
    (file,) = TESTS.glob(f"*/{name}")
    return {*re.findall(r"def (test_\w+)\(", file.read_text())}


def test_every_test_that_torch_names_is_answered_or_does_not_apply():
    """The names that the installed torch mentions in its entries; its test files themselves are not installed."""
    named = {d.test_name for info in optim_db for d in info.decorators if hasattr(d, "test_name") and d.test_name}
    assert len(named) >= 15
    assert named <= {*ANSWERED, *NOT_APPLICABLE}
    assert not {*ANSWERED} & {*NOT_APPLICABLE}


@pytest.mark.parametrize("theirs", ANSWERED)
def test_the_answer_is_there(theirs):
    file, _, name = ANSWERED[theirs].rpartition("::")
    assert any(name in names_in(each) for each in ([file] if file else OURS)), f"no test {name}"


def test_whatever_is_generated_here_answers_one_of_torchs_tests():
    beyond = {"test_on_a_linear_loss_the_steps_are_the_base_optimizers"}
    answers = {name for name in ANSWERED.values() if "::" not in name}
    assert answers == set.union(*map(names_in, OURS)) - beyond


@pytest.mark.parametrize("theirs", NOT_APPLICABLE)
def test_what_does_not_apply_has_a_reason_in_words(theirs):
    assert len(NOT_APPLICABLE[theirs].split()) >= 8


def test_torch_has_collected_the_tests_of_every_entry():
    assert len({info.name for info in ENTRIES}) == len(ENTRIES) == 10 + len(PAGES)
    for module, cls in (
        ("test_conformance", "TestConformanceCPU"),
        ("test_conformance_state", "TestConformanceStateCPU"),
    ):
        generated = {name for name in dir(getattr(importlib.import_module(module), cls)) if name.startswith("test_")}
        for test in names_in(f"{module}.py"):
            for info in ENTRIES:
                assert any(name.startswith(test) and f"_{info.name}_" in name for name in generated), (test, info.name)
