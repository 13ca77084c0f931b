"""The declaration of the ops: what is derived from it, and that a forgotten place has a name."""

import inspect
import re
import subprocess
from pathlib import Path

import pytest

from benchmarks.gpu import calls
from lets_kernels.ops import declared, foreach, reference
from support import emulated

toolchain = emulated.toolchain
ROOT = Path(__file__).resolve().parents[2]
NAMES = [op.name for op in declared.OPS]


def test_the_table_in_the_documentation_is_current():
    current = f"\n\n{declared.table()}\n" in (ROOT / "docs" / "ops.md").read_text()
    assert current, "replace the table of docs/ops.md by what lets_kernels.ops.declared.table() returns"


def test_triton_has_a_launcher_of_every_op():
    """Without Triton: by what the files say that they have."""
    files = (ROOT / "lets_kernels" / "ops" / "triton").glob("*.py")
    listed = re.findall(r"^__all__ = \[(.*?)\]", "\n".join(map(Path.read_text, files)), re.MULTILINE | re.DOTALL)
    assert sorted(re.findall(r'"(\w+)"', "".join(listed))) == sorted(NAMES)


@pytest.mark.parametrize("op", NAMES)
def test_an_op_has_a_test_of_its_own(op):
    """Beside those that go through all that are declared."""
    files = (ROOT / "tests" / "ops").glob("test_*.py")
    assert any(re.search(rf"\b{op}\(", path.read_text()) for path in files), f"no test in tests/ops calls {op}()"


@pytest.mark.parametrize("op", NAMES)
def test_an_op_is_timed_on_a_gpu(op):
    """But for all_finite_, which looks at a few numbers."""
    timed = {name for name, _ in (*calls.CASES, *calls.VECTOR_CASES)} | {"all_finite_"}
    assert op in timed, "benchmarks/gpu/calls.py has no line for it"


@pytest.mark.parametrize("op", declared.OPS, ids=NAMES)
def test_an_op_is_declared_whole(op):
    """What it must move are arguments of its own, of the size of a parameter; what it does is one line."""
    kinds = {a.name: a.kind for a in op.arguments}
    lists = ("Tensors", "MaybeTensors", "Flat", "Mask")
    assert all(kinds[name] in lists for name in (*op.reads, *op.element_wise, *op.filter_wise))
    assert op.doc and "\n" not in op.doc


@pytest.mark.parametrize("op", declared.OPS, ids=NAMES)
def test_the_reference_has_the_op_and_says_what_it_is(op):
    """Its formula is documented where it stands; the arguments have the declared names, in the declared order."""
    function = getattr(reference, op.name)
    assert list(inspect.signature(function).parameters) == [a.name for a in op.arguments]
    assert len(inspect.getdoc(function) or "") > 60


@pytest.mark.parametrize("op", declared.OPS, ids=NAMES)
def test_foreach_has_the_op_itself_or_the_reference_s(op):
    function = getattr(foreach, op.name)
    assert list(inspect.signature(function).parameters) == [a.name for a in op.arguments]
    assert function is getattr(reference, op.name) or function.__module__.startswith("lets_kernels.ops.foreach.")


@pytest.mark.parametrize("annotation", ["Tensorss", "Written[Tensor]", "list[Tensor]", "Tensors | int"])
def test_what_is_no_kind_of_argument_is_refused(annotation):
    with pytest.raises(TypeError, match="is no kind of argument"):
        declared._argument(inspect.Parameter("x", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation))


def test_an_argument_called_as_something_of_the_generated_code_is_refused():
    op = declared.OPS[0]
    named = op._replace(arguments=(op.arguments[0]._replace(name="count"), *op.arguments[1:]))
    with pytest.raises(ValueError, match=f"{op.name}: an argument cannot be called count"):
        toolchain.generate.check_names([named])


@pytest.mark.skipif(isinstance(toolchain.find_compiler(), str), reason="no C++ compiler")
@pytest.mark.parametrize("missing", ["grad_norm", "restore_sgd_", "peaks_"])
def test_a_kernel_that_is_missing_is_an_error_of_the_linker_that_names_it(tmp_path, missing):
    """The table of kernels, linked with empty ones but for one; with all of them it links."""
    command = [*toolchain.find_compiler().command, *toolchain.FLAGS, *toolchain.declared(), "-shared"]

    def link(left_out):
        empty = tmp_path / "empty.cpp"
        kernel = "#define KERNEL(op, result) result op(const chunk_of::op&) { __builtin_trap(); }\n"
        results = {None: "void", (): "double", (3,): "Three"}
        runs = [op for op in declared.OPS if any(a.kind == "Table" for a in op.arguments) and op.name != left_out]
        kernels = "".join(f"KERNEL({op.name}, {results[op.shape]})\n" for op in runs)
        include = f'#include "{ROOT}/csrc/cpu/kernels.h"\n'
        empty.write_text(f"{include}{kernel}namespace lets::cpu::baseline {{\n{kernels}}}\n")
        files = [ROOT / "csrc" / "isa.cpp", empty, "-o", tmp_path / "table.so"]
        return subprocess.run([*command, *files], capture_output=True, text=True)

    assert link(None).returncode == 0
    found = link(missing)
    assert found.returncode != 0 and f"baseline::{missing}(" in found.stderr
