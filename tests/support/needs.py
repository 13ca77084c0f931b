"""What some test files need beyond torch, triton and pytest.

`make test` installs it all; `make gpu-check` does with what is there, and names the files that it leaves out. No file
with tests for a GPU may be among them. benchmarks/gpu/shards.py reads this file, too, where support is no package.
"""

import importlib.util

FRAMEWORKS = ("accelerate", "lightning", "transformers")
NEEDS = {
    "base/test_conformance.py": ("expecttest",),
    "base/test_conformance_state.py": ("expecttest",),
    "base/test_conformance_table.py": ("expecttest",),
    "docs/test_examples.py": FRAMEWORKS,
    "docs/test_federated.py": ("sklearn",),
    "docs/test_sampa_two_devices.py": ("sklearn",),
    "docs/test_notebook.py": ("matplotlib",),
    "frameworks/test_frameworks_accelerate.py": ("accelerate",),
    "frameworks/test_frameworks_lightning.py": ("lightning",),
    "frameworks/test_frameworks_replicas.py": FRAMEWORKS,
    "frameworks/test_frameworks_transformers.py": ("accelerate", "transformers"),
    "ops/test_hypothesis.py": ("hypothesis",),
    "ops/test_random_calls.py": ("hypothesis",),
    "programs/test_compare.py": ("numpy", "rich", "sklearn"),
    "programs/test_demo.py": ("matplotlib", "numpy", "rich", "sklearn"),
    "programs/test_experiment_texts.py": ("tokenizers", "torchmetrics", "transformers"),
    "docs/test_experiments_page.py": ("numpy", "transformers", "torchmetrics"),
    "programs/test_experiment.py": ("PIL", "matplotlib", "numpy", "torchmetrics", "transformers"),
    "programs/test_experiments.py": ("matplotlib", "numpy", "rich", "scipy", "sklearn"),
    "programs/test_experiments_batched.py": ("numpy", "rich", "sklearn"),
    "sharpness/test_ball.py": ("scipy",),
    "sharpness/test_hessian.py": ("scipy",),
    "sharpness/test_landscape.py": ("scipy",),
    "sharpness/test_objective.py": ("numpy", "scipy"),
    "sharpness/test_sharpness_command.py": ("matplotlib", "numpy", "scipy", "sklearn"),
    "space/test_layout_random.py": ("hypothesis",),
    "state/test_joined.py": ("lightning",),
    "step/test_sequences.py": ("hypothesis",),
}


def missing():
    """The files that cannot be imported here, each with the packages that it lacks."""
    lacking = {
        file: [name for name in names if importlib.util.find_spec(name) is None] for file, names in NEEDS.items()
    }
    return {file: names for file, names in lacking.items() if names}
