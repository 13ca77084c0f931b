"""A program, `make first-hour`: what a new user does, in a fresh clone of the last commit. Some fifteen minutes.

The README's first command with fewer epochs, its examples, an own script, the commands, a benchmark, the site, a wheel
in an empty environment. Ends at the first step that fails, with what the user would see. (CI runs the second command,
`make test`, in a fresh clone.) Writes tests/results/first_hour.json.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "tests" / "results" / "first_hour.json"


class Hour:
    """Steps in a folder, each with its time."""

    def __init__(self, folder):
        self.folder, self.clone, self.steps = folder, folder / "lets_kernels", []

    def step(self, name, *command, cwd=None, **variables):
        """What the command printed; the program ends if it fails."""
        begin = time.monotonic()
        known = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        done = subprocess.run(
            [str(word) for word in command],
            cwd=cwd or self.clone,
            env=known | variables,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        seconds = round(time.monotonic() - begin, 1)
        print(f"{seconds:7.1f} s  {name}", flush=True)
        if done.returncode:
            sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}")
        self.steps.append({"step": name, "seconds": seconds})
        return done.stdout

    def blocks(self):
        """The README's examples, each pasted into an empty file."""
        readme = (self.clone / "README.md").read_text()
        for number, text in enumerate(re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL), 1):
            file = self.folder / f"example_{number}.py"
            file.write_text(text)
            yield number, file


def main():
    with tempfile.TemporaryDirectory(prefix="first-hour-") as name:
        hour = Hour(Path(name))
        hour.step("git clone", "git", "clone", "--quiet", ROOT, hour.clone, cwd=hour.folder)
        hour.step("make demo, short", "make", "demo", "ARGS=--epochs 3 --seeds 1")
        made = list((hour.clone / "runs" / "demo").iterdir())
        assert {file.suffix for file in made} >= {".json", ".png"}, made
        python = hour.clone / ".venv" / "bin" / "python"
        hour.step("make build", "make", "build")
        for number, file in hour.blocks():
            hour.step(f"README, example {number}", python, file, cwd=hour.folder)
        script = shutil.copy(hour.clone / "tests" / "support" / "own_script.py", hour.folder)
        print(hour.step("an own script, and mistakes", python, script, cwd=hour.folder))
        for words in (["info"], ["methods", "gsam"], ["experiment"], ["experiment", "cifar10-small", "--toy"]):
            hour.step(f"lets-kernels {' '.join(words)}", python, "-m", "lets_kernels", *words, cwd=hour.folder)
        hour.step("lets-kernels bench", python, "-m", "lets_kernels", "bench", cwd=hour.folder)
        hour.step("make docs", "make", "docs")
        assert (hour.clone / "build" / "site" / "index.html").exists()
        hour.step("make wheels", "make", "wheels")
        machine = hour.step(
            "what it ran on",
            python,
            "-c",
            "import json; from lets_kernels.record import environment; print(json.dumps(environment()))",
        )
        whole = round(sum(step["seconds"] for step in hour.steps), 1)
        print(f"{whole:7.1f} s  in all")
        about = {**json.loads(machine), "seconds": whole, "steps": hour.steps}
        RESULTS.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
