"""The examples of the README run as they stand, each in a process of its own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
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
