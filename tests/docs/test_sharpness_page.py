"""docs/sharpness.md: its blocks are one program, which runs as it stands; and its table is that of the results file."""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/sharpness.md").read_text()


def test_its_blocks_run(tmp_path):
    file = tmp_path / "page.py"
    file.write_text("\n".join(re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)))
    result = subprocess.run([sys.executable, file], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert len(result.stdout.splitlines()) == 4
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {
        "line.png", "contours.png", "surface.png", "spectrum.png", "training.png",
    }  # fmt: skip


def test_its_table_is_what_was_measured():
    found = json.loads((ROOT / "benchmarks/results" / re.search(r"sharpness-[\w-]+\.json", PAGE)[0]).read_text())
    assert "\n".join(found["table"]) in PAGE
    assert len({run["seed"] for run in found["runs"]}) == 3 and "dirty" not in found["environment"]["commit"]
