"""Reading what a measuring step has written, also while it runs and after it was cut off.

A step writes one JSON object a line, at once: ``{"plan": [case, ...]}``, ``{"begin": case}``, ``{"row": {...}}``,
``{"done": case}``, ``{"left_out": [case, reason]}``, ``{"failed": [case, reason]}``.
"""

import json
from pathlib import Path
from typing import Any


def collect(rows: Path) -> dict[str, Any]:
    """What a step has written: its rows, what failed, and what was left out, each with the reason."""
    found: dict[str, Any] = {"rows": [], "failed": [], "left_out": []}
    planned: list[str] = []
    settled: set[str] = set()
    begun = None
    for line in rows.read_text().splitlines() if rows.exists() else ():
        try:
            ((kind, value),) = json.loads(line).items()
        except ValueError:
            continue  # the last line of a process that was killed while it wrote
        if kind == "plan":
            planned += value
        elif kind == "begin":
            begun = value
        elif kind == "row":
            found["rows"].append(value)
        elif kind == "done":
            settled.add(value)
        else:
            found[kind].append(value)
            settled.add(value[0])
    for case in planned:
        if case not in settled:
            reason = "begun, and cut off" if case == begun else "no time was left"
            found["left_out"].append([case, reason])
    return found
