"""A program, `make sequences`: the long versions of test_sequences.py and test_random_calls.py, with new numbers.

Writes tests/results/sequences.json where nothing failed. The exit status is pytest's.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

TESTS = Path(__file__).resolve().parents[1]
SUMMARY = TESTS / "results" / "sequences.json"


def ran(file, examples):
    """pytest on one file with that many new examples: its exit status, and how many tests there were."""
    (path,) = TESTS.glob(f"*/{file}")
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", str(path), f"--junitxml={report}"]
        status = subprocess.run(command, env={**os.environ, "LETS_KERNELS_EXAMPLES": str(examples)}).returncode
        suite = ET.parse(report).getroot().find("testsuite")
    return status, int(suite.get("tests")) - int(suite.get("skipped"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=300, help="rows of 40 moves, of each method (300)")
    parser.add_argument("--calls", type=int, default=10000, help="calls of each op (10000)")
    given = parser.parse_args()
    found, begin = {}, time.monotonic()
    for file, examples in (("test_sequences.py", given.sequences), ("test_random_calls.py", given.calls)):
        status, tests = ran(file, examples)
        if status:
            return status
        found[file] = {"examples": examples, "tests": tests}
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
