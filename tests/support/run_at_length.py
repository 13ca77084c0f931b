"""A program, `make long`: the tests of which `make test` runs a part, whole, and random ones with new numbers.

Writes tests/results/long.json if nothing failed. The exit status is pytest's.
"""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

TESTS = Path(__file__).resolve().parents[1]
SUMMARY = TESTS / "results" / "long.json"
#: Files that ask support/lengths.py how long they are, or have it thin out their parameters.
LONG = [p.name for p in sorted(TESTS.glob("*/test_*.py")) if re.search(r"at_length|mark\.pairwise", p.read_text())]


def ran(file, **environment):
    """pytest on one file: its exit status, and how many tests there were."""
    (path,) = TESTS.glob(f"*/{file}")
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", str(path), f"--junitxml={report}"]
        status = subprocess.run(command, env=os.environ | environment).returncode
        suite = ET.parse(report).getroot().find("testsuite")
    return status, int(suite.get("tests")) - int(suite.get("skipped"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=250, help="rows of 40 moves, of each method (250)")
    parser.add_argument("--calls", type=int, default=5000, help="calls of each op (5000)")
    given = parser.parse_args()
    examples = {"test_sequences.py": given.sequences, "test_random_calls.py": given.calls}
    found, begin = {}, time.monotonic()
    for file in (*LONG, *examples):
        count = examples.get(file)
        options = {"LETS_KERNELS_LONG": "1"} if count is None else {"LETS_KERNELS_EXAMPLES": str(count)}
        status, tests = ran(file, **options)
        if status:
            return status
        found[file] = {"tests": tests} if count is None else {"examples": count, "tests": tests}
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=TESTS).stdout
    summary = {
        "files": found,
        "seconds": round(time.monotonic() - begin),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "date": datetime.date.today().isoformat(),
        "commit": git.strip() or "unknown",
    }
    SUMMARY.write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
