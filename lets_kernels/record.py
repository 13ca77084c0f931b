"""What a measured number means nothing without (hardware, versions, commit, date), and JSON files that are whole."""

import json
import math
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import lets_kernels

SOURCES = ("csrc", "lets_kernels", "benchmarks/*.py")


def cpu() -> str:
    """The processor's name."""
    found = re.search(r"model name\s*: (.*)", _cpuinfo())
    return found[1] if found else platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the source tree of this package, with "-dirty" if its code was edited since; None without one."""
    root = Path(lets_kernels.__file__).parents[1]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", *SOURCES) else "")
    except (OSError, subprocess.SubprocessError):
        return None


def now() -> str:
    """Date and time in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def environment() -> dict[str, Any]:
    """Hardware, versions, threads, commit and date of a measurement on the CPU."""
    family = re.search(r"cpu family\s*: (\d+)", _cpuinfo())
    return {
        "cpu": cpu(),
        "cpu_family": int(family[1]) if family else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "backend": lets_kernels.backends()["cpu"],
        "lets_kernels": lets_kernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit() or "unknown",
        "date": now(),
        "load_average": [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None,
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes the file in one go, so that no reader sees half of it. NaN and infinity become null."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(_finite(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(path)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cpuinfo() -> str:
    info = Path("/proc/cpuinfo")
    return info.read_text() if info.exists() else ""
