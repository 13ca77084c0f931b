"""The examples of the README run as they stand, each in a process of its own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
PRINTED = (2, 10, 2)  # numbers that each example prints
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_there_are_examples():
    assert len(EXAMPLES) == len(PRINTED)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_pasted_into_an_empty_file_runs(number, tmp_path):
    file = tmp_path / "example.py"
    file.write_text(EXAMPLES[number])
    result = subprocess.run([sys.executable, file], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    values = [float(x) for x in re.findall(r"\d+\.\d+", result.stdout)]
    assert len(values) == PRINTED[number]
    assert values[0] != values[1]


def test_a_type_checker_has_nothing_to_say(tmp_path):
    """From a folder that does not know the repository: the editable install has to lead to the package."""
    folder = tmp_path / "readme"
    folder.mkdir()
    for number, example in enumerate(EXAMPLES):
        (folder / f"example_{number}.py").write_text(example)
    options = ["--config-file", ROOT / "pyproject.toml", "--cache-dir", ROOT / ".mypy_cache"]
    command = [sys.executable, "-m", "mypy", *options, "-p", "readme"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    (folder / "wrong.py").write_text("import lets_kernels\nlets_kernels.ScheduledRadius.cosine(1, 2)\n")
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1 and '"steps"' in result.stdout, "the package's types are not seen"
