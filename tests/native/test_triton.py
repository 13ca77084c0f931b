"""The Triton backend without a GPU: its ops in Triton's interpreter, in a process of their own, and its import."""

import collections
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from support.lengths import at_length

ROOT = Path(__file__).resolve().parents[2]
#: Of the op tests, every layout in small, and everything that is the same for every dtype once (float32) or twice.
CHOSEN = (
    "not same_bits and not large and "
    "(0-d or numel-0 or numel-17 or filters-of-1 or 300-filters or channels-last or dense-permuted or unaligned- "
    "or several- and (float32 or bfloat16) or every_q and float32 and list or every_q and float32 and runs "
    "or every_kind and float32 and runs or non_finite and not (float64 or float16) or zero and not total or gate "
    "or starts_from or restore_of)"
)
#: Of those of the ops on vectors, where the layout matters less: every dtype once, and each way an element can go.
FEWER = (
    "not same_bits and (unaligned-torch or no_runs or same_size or arithmetic_type or 32_bits "
    "or 300-filters and float32 or channels-last and bfloat16 or closed_gate and float16 "
    f"or members and torch.float16 {at_length('', 'and (2-flat or -1-list)')} "
    "or bisection and 0.4 and False or nan and 719 "
    "or not several- and (as_plain_torch and precision and float32 or first_vector or would_stand and float64))"
)


def run(*arguments, interpret=True):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", **({"TRITON_INTERPRET": "1"} if interpret else {})}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    return done.returncode, done.stdout + done.stderr


VECTORS = ("combine", "average", "bsam_step", "fisher", "swapped", "noise", "mask", "peaks", "no_runs")
#: Files with the tests that are chosen from them, and how many there are at least.
INTERPRETED = (
    ([f"tests/ops/test_{stem}.py" for stem in ("norm", "perturb", "step", "rho")], CHOSEN, at_length(500, 300)),
    ([f"tests/ops/test_{stem}.py" for stem in VECTORS], FEWER, 100),
    (["tests/ops/test_lion.py"], "(unaligned-torch or starts_from) and float32", 1),
    ([f"tests/native/triton_interpreted{suffix}.py" for suffix in ("", "_tables", "_numbers")], "triton", 160),
)


@pytest.fixture(scope="module")
def passed(tmp_path_factory):
    """How many tests passed in the interpreter, by file; all of them must, and none may be skipped.

    One process for all: to import Triton and to collect the tests takes as long as many of them.
    """
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    numpy = pytest.importorskip("numpy")
    if [*map(int, triton.__version__.split(".")[:2])] < [3, 7] and [*map(int, numpy.__version__.split(".")[:2])] > [
        2,
        3,
    ]:
        pytest.skip("the interpreter of Triton 3.6 takes no NumPy from 2.4 on")
    files = [file for group, _, _ in INTERPRETED for file in group]
    which = " or ".join(
        f"({' or '.join(map(os.path.basename, group))}) and {chosen}" for group, chosen, _ in INTERPRETED
    )
    report = tmp_path_factory.mktemp("interpreter") / "report.xml"
    code, output = run(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", "-o", "junit_family=xunit1", *files),
        *("-k", f"triton and ({which})"),
    )
    assert code == 0, output[-6000:]
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert [suite.get(what) for what in ("skipped", "failures", "errors")] == ["0"] * 3, output[-6000:]
    return collections.Counter(case.get("file") for case in suite.iter("testcase"))


@pytest.mark.parametrize(
    "files, least", [(files, least) for files, _, least in INTERPRETED], ids=["sam", "vectors", "lion", "own"]
)
def test_the_op_tests_pass_in_the_interpreter(passed, files, least):
    assert all(passed[file] for file in files), passed
    assert sum(passed[file] for file in files) > least, passed


def test_importing_the_package_imports_no_triton():
    code, output = run("-c", "import sys, lets_kernels; assert 'triton' not in sys.modules", interpret=False)
    assert code == 0, output


MISSING = "sys.modules['triton'] = None"
OLD = "m = types.ModuleType('triton'); m.__version__ = '3.5.1'; sys.modules['triton'] = m"


@pytest.mark.parametrize("pretend, reason", [(MISSING, "not installed"), (OLD, "3.5.1 is too old; 3.6 or later")])
def test_where_triton_is_missing_or_too_old_the_backend_says_so(pretend, reason):
    code, output = run("-c", f"import sys, types; {pretend}; import lets_kernels; print(lets_kernels.backends())")
    assert code == 0, output
    assert re.search(f"'triton': 'not available: [^']*{reason}", output), output
