"""What a number means nothing without: hardware, driver, versions, commit, date."""

import datetime
import importlib.metadata
import platform
import re
import shutil
import subprocess
from typing import Any

from benchmarks.gpu.process import ROOT, cores

SOURCES = ("csrc", "lets_kernels", "benchmarks/*.py", "benchmarks/gpu", "setup.py")


def _said(*command: str) -> str:
    """What a program prints; empty where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    found = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=30)
    return found.stdout.strip() if found.returncode == 0 else ""


def commit() -> str:
    """The commit and whether its sources were changed; "unknown" outside a repository."""
    head = _said("git", "rev-parse", "HEAD")
    if not head:
        return "unknown"
    return head + (" (dirty)" if _said("git", "status", "--porcelain", "--", *SOURCES) else "")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(device: str) -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {
        "device": device,
        "gpu": None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "nvcc": (re.findall(r"release ([\d.]+)", _said("nvcc", "--version")) or [None])[0],
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu_cores": cores(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if device == "cuda":
        p = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": p.name,
            "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
            "capability": f"{p.major}.{p.minor}",
            "memory_GiB": round(p.total_memory / 2**30, 1),
            "multiprocessors": p.multi_processor_count,
            "L2_MiB": round(p.L2_cache_size / 2**20, 1),
        }
    return found
