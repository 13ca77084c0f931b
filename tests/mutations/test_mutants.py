"""The table of `make mutants` fits the sources and the tests, its results fit the table, and the program works."""

import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from mutants_kernels import MATH
from mutants_reference import REFERENCE
from mutants_table import MUTANTS

from lets_kernels.methods import catalogue

ROOT = Path(__file__).resolve().parents[2]
PARTS = sorted({part for m in catalogue.methods() for part in m.parts}, key=lambda part: part.__name__)
STEMS = sorted(path.stem for path in (ROOT / REFERENCE).glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.file}:{m.text[:40]}")
def test_the_text_stands_once_in_its_file_and_the_tests_are_there(mutant):
    assert (ROOT / mutant.file).read_text().count(mutant.text) == 1
    assert mutant.replacement != mutant.text
    files = [word for word in shlex.split(mutant.tests) if word.endswith(".py")]
    assert files and all((ROOT / file).is_file() for file in files)


def test_no_mutation_is_there_twice_and_the_formulas_have_enough():
    assert len({(m.file, m.text, m.replacement) for m in MUTANTS}) == len(MUTANTS)
    count = {start: sum(m.file.startswith(start) for m in MUTANTS) for start in (REFERENCE, MATH)}
    assert count[REFERENCE] >= 80 and count[MATH] >= 30


@pytest.mark.parametrize("stem", STEMS)
def test_every_function_of_the_reference_is_mutated(stem):
    """But for those that only look at tensors from another side."""
    source = (ROOT / REFERENCE / f"{stem}.py").read_text()
    functions = re.findall(r"^def \w+\(.*?(?=^def |\Z)", source, re.DOTALL | re.MULTILINE)
    texts = [m.text for m in MUTANTS if m.file == f"{REFERENCE}{stem}.py"]
    missed = {re.match(r"def (\w+)", f).group(1) for f in functions if not any(text in f for text in texts)}
    assert missed <= {"runs", "wide"}


def test_every_formula_of_the_kernels_is_mutated():
    """But for what copies the options of a base optimizer into the arithmetic type."""
    formulas = (ROOT / MATH).read_text().partition("// ---- where to perturb")[2].split("\n\n")
    texts = [m.text for m in MUTANTS if m.file == MATH]
    missed = [f for f in formulas if "return" in f and not any(text in f for text in texts)]
    assert {re.search(r"(\w+)\(", f).group(1) for f in missed} == {"sgd_of", "lion_of", "bsam_of"}


@pytest.mark.parametrize("part", PARTS, ids=lambda p: p.__name__)
def test_every_part_of_a_method_is_mutated(part):
    file, source = Path(inspect.getsourcefile(part)), inspect.getsource(part)
    assert any(m.text in source for m in MUTANTS if ROOT / m.file == file)


def test_every_mutation_of_the_committed_run_was_killed():
    """`make mutants` writes the file anew, `make mutants ARGS=--missing` adds what the table has gained."""
    results = json.loads((ROOT / "tests" / "results" / "mutants.json").read_text())
    assert results["killed"] == results["total"] == len(results["mutants"])
    ran = {(row["file"], row["text"], row["replacement"]) for row in results["mutants"]}
    assert len(ran & {(m.file, m.text, m.replacement) for m in MUTANTS}) > 0.9 * len(MUTANTS)
    assert all(row["killed"] for row in results["mutants"])


def program(*arguments):
    """`make mutants` on a few mutations, in a process that imports nothing of this tree."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "mutations" / "mutants.py"), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout + done.stderr


def test_two_mutations_are_killed_in_a_copy_of_the_tree():
    before = (ROOT / "lets_kernels" / "base" / "guarded.py").read_text()
    code, output = program("--only", "guarded.py")
    assert code == 0 and "2 of 2 killed" in output, output
    assert (ROOT / "lets_kernels" / "base" / "guarded.py").read_text() == before


BROKEN = """
import sys
sys.path.insert(0, {folder!r})
import mutants
good = next(m for m in mutants.MUTANTS if m.file.endswith("guarded.py"))
sys.argv = ["mutants.py", "--only", ""]
for change in {changes!r}:
    mutants.MUTANTS[:] = [good._replace(**change)]
    try:
        print("exit status", mutants.main())
    except AssertionError as error:
        print("refused:", error)
"""


def test_a_survivor_and_a_table_that_does_not_fit_are_failures():
    changes = [
        {"replacement": "if not gate.item() == 0:"},
        {"text": "if gate.item() > 7:"},
        {"tests": "tests/test_nothing.py"},
    ]
    script = BROKEN.format(folder=str(ROOT / "tests" / "mutations"), changes=changes)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=600)
    found = re.findall(r"SURVIVED|exit status 1|refused: .*", done.stdout)
    assert found[:2] == ["SURVIVED", "exit status 1"], done.stdout + done.stderr
    assert "not there once" in found[2] and "test_nothing.py: 4" in found[3] and len(found) == 4, found
