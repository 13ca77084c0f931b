"""`make gpu-check` without a GPU: its dry run, its parameter sets, and how it judges.

What only a GPU shows (events, graphs, the cuda and triton backends) is tried there and nowhere else.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from benchmarks.common import FLOORS, RESULTS, ROOT
from benchmarks.gpu import (
    checks,
    contenders,
    graphs,
    outcomes,
    process,
    report,
    shapes,
    shards,
    steps,
    timing,
    verdicts,
    worker,
    worker_rows,
)
from benchmarks.gpu import ops as bench_ops
from lets_kernels import ops
from lets_kernels.bench.shapes import numel
from lets_kernels.ops import reference
from support.imports import needed
from support.needs import NEEDS

SCRIPT = ROOT / "benchmarks" / "gpu_check.py"
FORKED = ROOT / "tests" / "support" / "forked.py"
STEPS = ["build", "tests", "ops", "steps", "end-to-end", "graphs"]


def gpu_check(*options, script=SCRIPT, **more):
    return subprocess.run(
        [sys.executable, str(script), *options], capture_output=True, text=True, timeout=300, check=False, **more
    )


# ---- the dry run


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    if os.environ.get("LETS_KERNELS_TESTS_WITHOUT_EXTENSION") == "1":
        pytest.skip("LETS_KERNELS_TESTS_WITHOUT_EXTENSION=1")
    out = tmp_path_factory.mktemp("gpu-check") / "dry.json"
    ran = gpu_check("--device", "cpu", "--out", str(out), cwd=out.parent, script=FORKED)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    return json.loads(out.read_text()), out.with_suffix(".txt").read_text(), ran.stdout


def test_the_dry_run_takes_every_step_and_says_that_it_measures_nothing(dry):
    results, summary, printed = dry
    assert results["dry_run"] is True
    assert results["note"] == report.NOT_A_MEASUREMENT
    assert list(results["steps"]) == STEPS
    assert {name: s["failed"] for name, s in results["steps"].items()} == {name: [] for name in STEPS}
    assert {s["status"] for s in results["steps"].values()} == {"ok"}
    assert {v["status"] for v in results["verdicts"]} == {"dry run"}
    assert report.NOT_A_MEASUREMENT.upper() in summary.splitlines()[0]
    assert printed.endswith(summary), "the summary is printed last"
    assert len(summary.splitlines()) <= report.MOST_LINES


def test_the_results_say_on_what_and_with_what(dry):
    environment = dry[0]["environment"]
    assert {"gpu", "torch", "triton", "cuda", "nvcc", "python", "commit", "date", "cpu_cores"} <= set(environment)
    assert environment["torch"] == torch.__version__
    assert set(dry[0]["steps"]["build"]["backends"]) == set(ops.NAMES)


def test_every_op_is_timed_on_both_backends_beside_a_copy_of_the_same_bytes(dry):
    rows = [r for r in dry[0]["steps"]["ops"]["rows"] if "check" not in r]
    for backend in ("cpu", "reference"):
        found = {(r["op"], r["direction"], r["dtype"]) for r in rows if r["backend"] == backend}
        assert {op for op, *_ in found} == {*FLOORS, "all_finite_"}
        assert {dtype for *_, dtype in found} == {"fp32", "bf16"}
        assert {d for op, d, _ in found if op == "perturb_"} == {"plain", "element", "filter", "fisher"}
    assert all(r["share_of_copy"] > 0 and r["copy_us"] > 0 for r in rows if r["op"] in FLOORS)
    perturb = next(r for r in rows if (r["op"], r["dtype"]) == ("perturb_", "bf16"))
    assert perturb["bytes"] == 4 * 2 * perturb["elements"]


def test_the_steps_are_those_of_every_contender(dry):
    rows = dry[0]["steps"]["steps"]["rows"]
    sam = {r["contender"] for r in rows if (r["method"], r["base"]) == ("SAM", "SGD")}
    ours = {"ours cpu", "ours cpu flatten", "ours cpu no check", "ours reference", "ours reference flatten"}
    swapped = {"foreach swapped", "foreach swapped waiting"}
    assert sam == ours | swapped | {"per tensor", "foreach", "foreach waiting", "torch.compile"}
    assert {r["method"] for r in rows} >= {"SAM", "ASAM filter-wise", "LETS secant"}
    assert all(r["device"]["median_ms"] > 0 and r["host"]["median_us"] > 0 for r in rows)
    floor = next(r for r in rows if r["contender"] == "ours cpu" and r["method"] == "SAM" and r["base"] == "SGD")
    assert floor["bytes"] == 11 * 4 * floor["elements"]  # 1 + 4 + 5, and 1 for check_finite


def test_training_steps_are_multiples_of_a_gradient_and_of_sgd(dry):
    rows = {(r["how"], r["step"]): r for r in dry[0]["steps"]["end-to-end"]["rows"]}
    assert rows["eager", "gradient"]["times_gradient"] == 1
    assert rows["eager", "SGD"]["times_SGD"] == 1
    assert {step for how, step in rows if how == "captured"} >= {"SAM cpu", "LETS-SAM 1 cpu", "LETS-SAM 10 reference"}
    refused = dict(dry[0]["steps"]["end-to-end"]["left_out"])
    assert list(refused) == ["SAM per tensor captured"]


def test_the_tests_are_sharded_and_those_of_the_reference_come_last(dry):
    step = dry[0]["steps"]["tests"]
    assert [(row["shard"], row["tests"], row["ran"], row["failed"]) for row in step["rows"]] == [
        ("ops/test_no_runs.py", 1, 1, 0),
        ("ops/test_no_runs.py (reference)", 1, 1, 0),
    ]
    assert step["passed"] == {"cpu": 1, "reference": 1}
    assert step["smoke"]["checked"] == len([r for r in dry[0]["steps"]["ops"]["rows"] if "check" in r]) > 0


def test_repeated_steps_give_the_same_bits(dry):
    rows = dry[0]["steps"]["graphs"]["rows"]
    assert len(rows) == 8
    assert all(r["deterministic"] is True and r["replay_equals_eager"] is True for r in rows)


# ---- what it refuses


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_sentence(tmp_path):
    ran = gpu_check("--out", str(tmp_path / "x.json"))
    assert ran.returncode != 0
    assert ran.stdout == ""
    assert ran.stderr.splitlines() == [
        "gpu-check needs a GPU that torch can use, and there is none here; --device cpu is a dry run"
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", ["x.json", "below/x.json"])
def test_a_dry_run_writes_nothing_among_the_results(out):
    before = sorted(RESULTS.rglob("*"))
    ran = gpu_check("--device", "cpu", "--only", "build", "--out", str(RESULTS / out))
    assert ran.returncode != 0
    assert "not a measurement" in ran.stderr
    assert sorted(RESULTS.rglob("*")) == before


def test_an_unknown_step_is_refused():
    ran = gpu_check("--device", "cpu", "--only", "ops,speed")
    assert ran.returncode != 0
    assert "no step is called 'speed'" in ran.stderr


def test_a_step_for_which_there_is_no_time_is_named(tmp_path):
    ran = gpu_check("--device", "cpu", "--budget", "1", "--only", "ops,steps", "--out", str(tmp_path / "x.json"))
    assert ran.returncode == 1
    steps = json.loads((tmp_path / "x.json").read_text())["steps"]
    assert {s["reason"] for s in steps.values()} == {"no time was left"}
    assert "ops: left out: no time was left" in ran.stdout


def junit(*cases):
    body = "".join(f'<testcase classname="tests.test_gpu" name="{name}">{inner}</testcase>' for name, inner in cases)
    return f'<testsuites><testsuite name="pytest">{body}</testsuite></testsuites>'


# ---- a machine that has little beside torch


TESTS = sorted((ROOT / "tests").glob("*/test_*.py"))


def test_a_test_file_needs_torch_triton_and_pytest_alone_or_says_what_else():
    here = {*sys.stdlib_module_names, "torch", "triton", "pytest"}
    lacking = {str(f.relative_to(ROOT / "tests")): needed(f) - here for f in TESTS}
    unsaid = {file: names - set(NEEDS.get(file, ())) for file, names in lacking.items()}
    assert {file: names for file, names in unsaid.items() if names} == {}
    assert set(NEEDS) <= set(lacking)
    assert lacking["step/test_sequences.py"] == {"hypothesis"}, "what is imported is not seen"


def test_gpu_check_itself_needs_torch_and_pytest_alone():
    files = [SCRIPT, *(ROOT / "benchmarks" / "gpu").glob("*.py"), ROOT / "tests" / "conftest.py"]
    assert set().union(*map(needed, files)) - set(sys.stdlib_module_names) == {"torch", "pytest"}


def test_no_test_on_a_gpu_is_left_out_for_want_of_a_package():
    on_a_gpu = re.compile(r"pytest\.mark\.(ops|gpu)\b|support\.accelerator\b")
    found = {str(f.relative_to(ROOT / "tests")) for f in TESTS if on_a_gpu.search(f.read_text())}
    assert {"ops/test_random.py", "gpu/test_graphs.py"} <= found
    assert found & set(NEEDS) == set()


def test_files_that_lack_a_package_are_named_and_are_no_failure(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "hypothesis" else find(name))
    assert ["tests/step/test_sequences.py", "not run: needs hypothesis"] in shards.without_packages()
    monkeypatch.setattr(importlib.util, "find_spec", find)
    assert all("hypothesis" not in reason for _, reason in shards.without_packages())


# ---- the tests, in several processes


LISTING = """tests/ops/test_norm.py::test_a[cuda-gpu-1]
tests/ops/test_norm.py::test_a[triton-gpu-1]
tests/ops/test_norm.py::test_a[reference-gpu-1]
tests/gpu/test_graphs.py::TestX::test_b[cuda]
tests/gpu/test_gpu.py::test_c[cuda-a: b::c]
tests/ops/test_step.py::test_a[cuda-gpu-1]
tests/ops/test_step.py::test_a[reference-gpu-1]
tests/ops/test_step.py::test_a[reference-gpu-2]

8/20 tests collected (12 deselected) in 0.01s
"""


def test_files_are_packed_into_shards_and_the_reference_comes_last():
    norm, step = "tests/ops/test_norm.py", "tests/ops/test_step.py"
    graphs, gpu = "tests/gpu/test_graphs.py", "tests/gpu/test_gpu.py"
    assert shards.planned(LISTING, shards.GPU, 2) == [
        shards.Shard((norm,), False, 2),
        shards.Shard((gpu, graphs), False, 2),
        shards.Shard((step,), False, 1),
        shards.Shard((step,), True, 2),
        shards.Shard((norm,), True, 1),
    ]
    assert len(shards.planned(LISTING, shards.GPU, 100)) == 2
    assert shards.planned("ERROR tests/ops/test_norm.py - no\n", shards.GPU, 2) == []


class Pytest:
    """Stands in for the processes: `ends` says of each by its first file what it wrote, and how it ended."""

    def __init__(self, ends, smoke=()):
        self.ends, self.smoke, self.commands = ends, smoke, []

    def __call__(self, command, seconds, environment=None, look_in=None, output=None):
        assert seconds > 0
        if "benchmarks.gpu.smoke" in command:
            rows = Path(command[command.index("--rows") + 1])
            rows.write_text("".join(json.dumps(line) + "\n" for line in self.smoke))
            return process.Outcome(int(bool(self.smoke)), 1.0, False)
        assert environment == {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        written = Path(next(x for x in command if x.startswith("--junitxml=")).removeprefix("--junitxml="))
        if "--collect-only" in command:
            found, code, text = self.ends.get("listed", junit()), 0, LISTING
        else:
            self.commands.append(command)
            name = next(x for x in command if x.endswith(".py")) + " reference" * ("reference-gpu" in command)
            found, code, text = *self.ends[name], ""
        if found is not None:
            written.write_text(found)
        return process.Outcome(abs(code), 1.0, code == CUT_OFF, text)


CUT_OFF = -99
SKIPPED = '<skipped type="pytest.skip" message="no GPU"/>'
GONE_WELL = {
    "tests/ops/test_norm.py": (junit(("a[cuda-gpu]", ""), ("a[triton-gpu]", "")), 0),
    "tests/gpu/test_gpu.py": (junit(("b[cuda]", ""), ("c[cuda]", "")), 0),
    "tests/ops/test_step.py": (junit(("d[cuda]", "")), 0),
    "tests/ops/test_step.py reference": (junit(("e[reference-gpu]", ""), ("f[reference-gpu]", "")), 0),
    "tests/ops/test_norm.py reference": (junit(("g[reference-gpu]", "")), 0),
}


@pytest.fixture
def sharded(monkeypatch):
    monkeypatch.setattr(shards, "SIZE", 2)
    monkeypatch.setattr(shards, "without_packages", lambda: [["tests/x.py", "not run: needs y"]])

    def run(changed=(), smoke=(), seconds=60.0):
        pytests = Pytest({**GONE_WELL, **dict(changed)}, smoke)
        monkeypatch.setattr(shards, "run", pytests)
        kept = []
        return shards.tests("cuda", ("cuda", "triton"), seconds, kept.append), kept, pytests.commands

    return run


def test_the_shards_results_are_added_up(sharded):
    found, kept, commands = sharded()
    assert (found["passed"], found["failed"], found["skipped"]) == ({"cuda": 4, "triton": 1}, [], 0)
    assert found["left_out"] == [["tests/x.py", "not run: needs y"]]
    assert len(found["rows"]) == len(kept) == 5, "there is something to see after every shard"
    assert [c[c.index("-k") + 1] for c in commands].count("reference-gpu") == 2
    assert all(c[c.index("-m", 3) + 1] == "gpu" for c in commands)


@pytest.mark.parametrize(
    "changed, against",
    [
        ({"tests/gpu/test_gpu.py": (None, 134)}, {"tests", "gpu/test_gpu.py, gpu/test_graphs.py"}),
        ({"tests/gpu/test_gpu.py": (junit(("b[cuda]", "")), 0)}, {"gpu/test_gpu.py, gpu/test_graphs.py"}),
        ({"tests/ops/test_step.py": (junit(("d[cuda]", "")), CUT_OFF)}, {"ops/test_step.py"}),
        ({"tests/ops/test_step.py": (junit(("d[cuda]", "")), 3)}, {"ops/test_step.py"}),
        (
            {"tests/ops/test_norm.py reference": (junit(("g[reference-gpu]", '<failure message="lost"/>')), 1)},
            {"tests.test_gpu::g[reference-gpu]"},
        ),
        ({"listed": junit(("tests.ops.x", '<error message="collection failure"/>'))}, {"tests.test_gpu::tests.ops.x"}),
        ({"listed": junit(("tests.ops.x", f"{SKIPPED[:-2]}>no</skipped>"))}, {"tests.test_gpu::tests.ops.x"}),
    ],
)
def test_a_shard_that_fails_is_named_and_the_others_count(sharded, changed, against):
    found, _, _ = sharded(changed)
    assert {label for label, _ in found["failed"]} == against
    assert len(found["rows"]) == 5
    assert found["passed"]["triton"] == 1


def test_a_file_that_skips_itself_for_want_of_a_package_is_named_and_is_no_failure(sharded):
    said = "Skipped: could not import 'scipy.stats': No module named 'scipy'"
    skips = f'<skipped message="collection skipped">("x.py", 3, "{said}")</skipped>'
    found, _, _ = sharded({"listed": junit(("tests.ops.x", skips))})
    assert found["failed"] == []
    assert ["tests.test_gpu::tests.ops.x", "not run: needs scipy.stats"] in found["left_out"]


def test_what_an_op_did_wrong_at_its_first_call_is_named_first(sharded):
    lines = [{"row": {"check": "norm"}}, {"failed": ["check perturb_ plain fp32 cuda", "wrong by 1"]}]
    found, _, _ = sharded({"tests/ops/test_step.py": (None, 134)}, lines)
    assert found["failed"][0] == ["smoke: check perturb_ plain fp32 cuda", "wrong by 1"]
    assert found["smoke"]["checked"] == 1


def test_shards_for_which_there_is_no_time_are_named(sharded):
    found, _, commands = sharded(seconds=0.5 * shards.LEAST)
    assert commands == []
    assert ["ops/test_norm.py (reference)", "no time was left"] in found["failed"]


def test_an_interrupt_ends_the_commands_of_all_shards(tmp_path):
    waiting = threading.Event()
    run_of = shards.Tests(shards.GPU, "cuda", ("cuda",), 60.0, tmp_path)

    def first():
        assert waiting.wait(30)
        raise KeyboardInterrupt

    def second():
        waiting.set()
        process.run(["sleep", "60"], 60.0, look_in=run_of._look_in, every=0.05)

    with pytest.raises(KeyboardInterrupt):
        list(run_of.all([first, second, lambda: pytest.fail("it began")], 2))


# ---- the parameter sets


PUBLISHED = {
    "ResNet-18": (62, 11_689_512),
    "ResNet-50": (161, 25_557_032),
    "ViT-B/16": (152, 86_567_656),
    "DeBERTa-base": (196, 138_601_728),  # 139 M
    "transformer 1B": (220, 1_011_476_480),
}


@pytest.mark.parametrize("name", shapes.MODELS)
def test_the_sets_have_the_published_number_of_parameters(name):
    found = shapes.MODELS[name]
    assert (len(found), numel(found)) == PUBLISHED[name]


@pytest.mark.parametrize("millions", [1, 4, 25, 100, 1000])
def test_single_tensors_have_their_size_and_filters(millions):
    ((rows, length, one),) = shapes.single(millions)
    assert (rows * length * one, one) == (millions * 2**20, 1)


# ---- how tests are judged


GOOD = (("test_a[cuda-gpu-float32]", ""), ("test_a[triton-gpu-float32]", ""))


def test_tests_that_passed_on_both_backends_are_a_pass():
    assert outcomes.judge(junit(*GOOD), ("cuda", "triton")) == {
        "passed": {"cuda": 1, "triton": 1},
        "skipped": 0,
        "failed": [],
    }


@pytest.mark.parametrize(
    "cases, against",
    [
        ((), ["tests on cuda", "tests on triton"]),
        (GOOD[:1], ["tests on triton"]),
        (GOOD[1:], ["tests on cuda"]),
        # A name that merely holds the word is no proof that the backend ran.
        ((("test_cuda_is_named", ""), ("test_b[not_cuda]", ""), GOOD[1]), ["tests on cuda"]),
        ((*GOOD, ("test_b[cuda-gpu]", SKIPPED)), ["tests.test_gpu::test_b[cuda-gpu]"]),
        ((("test_a[cuda-gpu]", SKIPPED), GOOD[1]), ["tests on cuda", "tests.test_gpu::test_a[cuda-gpu]"]),
        ((*GOOD, ("test_b[cuda-gpu]", '<failure message="off"/>')), ["tests.test_gpu::test_b[cuda-gpu]"]),
        ((*GOOD, ("test_b[triton-gpu]", '<error message="fixture"/>')), ["tests.test_gpu::test_b[triton-gpu]"]),
    ],
)
def test_what_speaks_against_a_pass(cases, against):
    assert sorted(label for label, _ in outcomes.judge(junit(*cases), ("cuda", "triton"))["failed"]) == sorted(against)


def test_no_results_of_pytest_are_no_pass():
    assert outcomes.judge(None, ("cuda", "triton"))["failed"][0] == ["tests", "pytest wrote no results"]


@pytest.mark.parametrize(
    "output, code, cut_off, passed, clean",
    [
        ("========= ERROR SUMMARY: 0 errors", 0, False, 8, True),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, False, 8, True),
        ("========= ERROR SUMMARY: 10 errors", 99, False, 8, False),
        ("========= ERROR SUMMARY: 10 errors", 0, False, 8, False),
        ("========= RACECHECK SUMMARY: 10 hazards displayed (10 errors, 0 warnings)", 0, False, 8, False),
        ("========= ERROR SUMMARY: 0 errors", 0, False, 0, False),
        ("========= ERROR SUMMARY: 0 errors", 1, False, 8, False),
        ("", 0, False, 8, False),
        ("========= ERROR SUMMARY: 0 errors", 0, True, 8, False),
    ],
)
def test_the_sanitizer_is_clean_only_by_its_own_word(output, code, cut_off, passed, clean):
    assert checks.sanitizer_verdict(output, code, cut_off, passed)["clean"] is clean


# ---- how numbers are judged


def op_row(share, **other):
    row = {"op": "perturb_", "direction": "plain", "dtype": "fp32", "set": "25 M", "backend": "cuda"}
    return {**row, "bytes": 4 * 4 * 25 * 2**20, "share_of_copy": share, **other}


def step_row(contender, milliseconds, **other):
    row = {"set": "ResNet-50", "method": "SAM", "base": "SGD", "contender": contender}
    times = {what: {"median_ms": milliseconds} for what in ("device", "elapsed")}
    return {**row, **times, "host": {"median_us": 100.0}, **other}


def statuses(steps):
    steps = {name: {"status": "ok", "failed": [], "left_out": [], "rows": [], **step} for name, step in steps.items()}
    return {v.promise: v.status for v in verdicts.verdicts(steps, ("cuda", "triton"), dry=False)}


def test_what_was_not_measured_is_no_pass():
    assert set(statuses({}).values()) == {"not measured"}


OPS = "cuda: every op >= 90% of a copy, N >= 25 M"


@pytest.mark.parametrize(
    "rows, left_out, status",
    [
        ([op_row(0.95), op_row(0.9)], [], "pass"),
        ([op_row(0.95), op_row(0.89)], [], "FAIL"),
        ([op_row(0.95), op_row(0.1, bytes=4 * 2**20)], [], "pass"),  # small: launches, not bytes
        ([op_row(0.95), op_row(0.1, backend="triton")], [], "pass"),
        ([op_row(0.95)], [["perturb_ plain bf16 at 1 B", "no time was left"]], "pass (of what was measured)"),
    ],
)
def test_the_share_of_a_copy(rows, left_out, status):
    assert statuses({"ops": {"rows": rows, "left_out": left_out}})[OPS] == status


def test_a_step_is_held_against_the_best_alternative():
    rows = [step_row("ours cuda", 1.0), step_row("per tensor", 4.0), step_row("foreach", 2.1)]
    promise = "SAM + SGD, ResNet-50 >= 2 x best eager, on the device alone"
    slower = "never slower than the best eager, on the device alone"
    assert statuses({"steps": {"rows": rows}})[promise] == "pass"
    rows.append(step_row("torch.compile", 1.9))
    assert statuses({"steps": {"rows": rows}})[promise] == "FAIL"
    assert statuses({"steps": {"rows": rows}})[slower] == "pass"
    rows += [step_row("ours cuda", 1.0, set="ViT-B/16"), step_row("foreach", 0.9, set="ViT-B/16")]
    assert statuses({"steps": {"rows": rows}})[slower] == "FAIL"


@pytest.mark.parametrize("good", [True, False])
def test_host_memory_training_and_graphs(good):
    host = 140.0 if good else 160.0
    ours = step_row("ours cuda", 1.0, host={"median_us": host}, peak_over_params=1.0 if good else 2.0)
    training = [
        {"how": "eager", "step": "SAM cuda", "times_gradient": 2.0 if good else 2.1, "median_ms": 10.0},
        {"how": "eager", "step": "LETS-SAM 10 cuda", "times_gradient": 2.0, "median_ms": 11.0 if good else 12.0},
    ]
    graph = {"method": "SAM", "base": "SGD", "backend": "cuda", "replay_equals_eager": good, "deterministic": good}
    rows = {"steps": [ours], "end-to-end": training, "graphs": [graph]}
    found = statuses({name: {"rows": r} for name, r in rows.items()})
    for promise in (
        "host time of SAM + SGD, 161 tensors <= 150 us",
        "SAM and ASAM keep one copy of the weights, nothing more",
        "ResNet-18 eager: SAM <= 2.02 gradients",
        "ResNet-18 eager: LETS every 10th step <= 1.12 x SAM",
        "a captured step replays to the bits of eager",
        "ten runs give the same bits",
    ):
        assert found[promise] == ("pass" if good else "FAIL"), promise


def test_a_failed_build_or_test_is_no_pass():
    failed = {"status": "failed", "failed": [["x", "y"]], "seconds": 1.0}
    found = statuses({"build": failed, "tests": {**failed, "passed": {"cuda": 3, "triton": 3}}})
    assert found["builds in place for this card"] == "FAIL"
    assert found["all tests pass on both backends"] == "FAIL"


# ---- what is wrong is not timed


@pytest.fixture
def work(tmp_path):
    return worker.Work(timing.Device("cpu"), time.time() + 60, tmp_path / "rows")


def written(work):
    return worker_rows.collect(work.path)


class Off:
    """The reference, with one op that adds a thousandth to the weights."""

    def __getattr__(self, op):
        return getattr(reference, op)

    def perturb_(self, params, *arguments):
        reference.perturb_(params, *arguments)
        for p in params:
            p.add_(1e-3)


def test_an_op_whose_result_is_off_is_not_timed(work, monkeypatch):
    monkeypatch.setattr(ops, "load", lambda name: (Off() if name == "cpu" else reference, ""))
    right = bench_ops.check_all(work)
    wrong = {case for case, ok in right.items() if not ok}
    assert wrong == {
        ("cpu", "perturb_", d, t) for d in ("plain", "element", "filter", "fisher") for t in ("fp32", "bf16")
    }
    assert work.failed
    assert all("not timed" in reason for _, reason in written(work)["failed"])


def test_a_contender_that_steps_elsewhere_is_not_timed(work):
    def halved(params):
        found = contenders.PerTensor(params, "SAM", "SGD")
        found.rho /= 2
        return found

    def broken(params):
        raise ValueError("cannot be built")

    makers = {
        "per tensor": lambda params: contenders.PerTensor(params, "SAM", "SGD"),
        "half the radius": halved,
        "broken": broken,
    }
    sizes = [(5, 3), (7,)]
    grads = contenders.passes(work.device, sizes, learns=False)
    steps.compete(work, {"set": "x", "method": "SAM", "base": "SGD"}, sizes, grads, makers)
    found = written(work)
    assert [row["contender"] for row in found["rows"]] == ["per tensor"]
    (half, wrong), (raised, reason) = found["failed"]
    assert half.endswith("half the radius")
    assert "not timed" in wrong
    assert raised.endswith("broken")
    assert reason == "ValueError: cannot be built"


def test_bits_are_compared_and_not_values():
    zeros = [torch.zeros(3), torch.zeros((), dtype=torch.float64)]
    assert graphs.same(zeros, [z.clone() for z in zeros])
    assert not graphs.same(zeros, [-zeros[0], zeros[1]])
    assert not graphs.same(zeros, zeros[:1])


# ---- the rows of a step that was cut off, and the clock


def test_a_failed_case_is_named_and_three_in_a_row_end_the_step(work):
    def fails():
        raise RuntimeError("lost\nmore")

    done = []
    for name in ("a", "b"):
        work.case(name, fails)
    work.case("c", lambda: done.append("c"))
    for name in ("d", "e"):
        work.case(name, fails)
    with pytest.raises(SystemExit):
        work.case("f", fails)
    assert done == ["c"]
    assert written(work)["failed"] == [[name, "RuntimeError: lost"] for name in "abdef"]


def test_a_step_ends_when_the_device_is_lost(work, monkeypatch):
    def lost():
        raise RuntimeError("an illegal memory access was encountered")

    class Faulty:
        def __getattr__(self, op):
            return getattr(reference, op)

        def perturb_(self, *_):
            monkeypatch.setattr(work.device, "synchronize", lost)

    monkeypatch.setattr(ops, "load", lambda name: (Faulty(), ""))
    with pytest.raises(SystemExit):
        bench_ops.check_all(work)
    first, second = written(work)["failed"]
    assert first[0] == "check perturb_ plain fp32 cpu"
    assert second == ["the device", "is lost: RuntimeError: an illegal memory access was encountered"]


def test_no_case_begins_after_the_time_is_over(tmp_path):
    late = worker.Work(timing.Device("cpu"), time.time() - 1, tmp_path / "rows")
    late.write(plan=["a"])
    late.case("a", lambda: pytest.fail("it began"))
    assert written(late)["left_out"] == [["a", "no time was left"]]


# What a shell starts in the background ignores the request to end.
@pytest.mark.parametrize("starts", ["sh -c '{child}'; true", "sh -c '{child}' & wait"], ids=["heeds", "ignores"])
def test_a_command_that_takes_too_long_is_ended_with_its_children(tmp_path, starts):
    fifo = tmp_path / "alive"
    os.mkfifo(fifo)
    end = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    child = f"exec 3> {fifo}; echo alive >&3; exec sleep 60"  # which holds its end of the FIFO as long as it lives
    outcome = process.run(["sh", "-c", starts.format(child=child)], 0.5, output=tmp_path / "log")
    assert (outcome.cut_off, outcome.ok) == (True, False)
    assert outcome.seconds < process.GRACE  # on a machine as busy as it may be
    with open(end, "rb") as alive:
        os.set_blocking(end, True)
        assert alive.read() == b"alive\n"  # to the end, which is there when no process has the FIFO open


def test_what_a_step_did_not_come_to_is_left_out_by_name(tmp_path):
    lines = [{"plan": ["a", "b", "c", "d"]}, {"begin": "a"}, {"row": {"x": 1}}, {"done": "a"}]
    lines += [{"failed": ["d", "wrong"]}, {"begin": "b"}, {"row": {"x": 2}}]
    rows = tmp_path / "rows"
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"row": {"x"')
    assert worker_rows.collect(rows) == {
        "rows": [{"x": 1}, {"x": 2}],
        "failed": [["d", "wrong"]],
        "left_out": [["b", "begun, and cut off"], ["c", "no time was left"]],
    }
    assert worker_rows.collect(Path("no such file")) == {"rows": [], "failed": [], "left_out": []}


def test_contenders_take_turns_on_buffer_sets_of_their_own():
    calls, prepared = [], []
    contenders = {
        "a": timing.Contender(lambda i: calls.append(("a", i)), prepared.append),
        "b": timing.Contender(lambda i: calls.append(("b", i))),
    }
    seconds = timing.measure(timing.Device("cpu"), contenders, rounds=4, sets=4)
    assert [len(values) for values in seconds.values()] == [4, 4]
    assert [name for name, _ in calls] == ["a", "b"] * 8  # four rounds of warming up, one for each set
    assert [i for name, i in calls[8:] if name == "a"] == [0, 1, 2, 3]
    assert [i for name, i in calls[8:] if name == "b"] == [2, 3, 0, 1]
    assert prepared == [0, 1, 2, 3] * 2


@pytest.mark.parametrize("kinds", [0, 60])
def test_the_summary_names_what_was_left_out_within_its_length(kinds):
    rows = [op_row(0.5, **{"op": f"op {i}", "GB/s": 1.0}) for i in range(kinds)]
    many = [[f"case {i}", f"reason {i}"] for i in range(200)]
    step = {"status": "failed", "seconds": 1.0, "failed": many, "left_out": many}
    found = {"ops": {**step, "rows": rows}, "graphs": {**step, "rows": []}}
    environment = dict.fromkeys(("gpu", "torch", "triton", "cuda", "nvcc", "python", "commit", "date"))
    results = {"environment": environment, "dry_run": False, "backends": ["cuda", "triton"], "steps": found}
    lines = report.summary({**results, "seconds": 1.0, "budget_s": 2.0}, "x.json").splitlines()
    assert len(lines) <= report.MOST_LINES
    assert "ops: failed: case 0: reason 0" in lines or kinds
    assert "ops: left out for 196 more reasons (in the JSON)" in lines or kinds
    assert (
        any(re.match(r"\(\d+ lines on what failed or was left out are in the JSON alone\)", x) for x in lines)
        or not kinds
    )
