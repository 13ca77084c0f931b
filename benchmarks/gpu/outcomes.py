"""What pytest's XML says of tests: what passed on which backend, and what speaks against a pass."""

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from typing import Any

MOST_NAMED = 15


def read(junit: str | None, backends: Sequence[str]) -> dict[str, Any]:
    """How many tests ran, and passed on each backend; what failed and what was skipped, each with the reason.

    A test belongs to a backend whose name is one of the parts of its id: ``test_x[cuda-float32]``.
    """
    if junit is None:
        return {"failed": [["tests", "pytest wrote no results"]]}
    passed, failed, skipped, ran = dict.fromkeys(backends, 0), [], [], set()
    for case in ElementTree.fromstring(junit).iter("testcase"):
        name = case.get("name", "")
        kinds = {child.tag: child.get("message", "") for child in case}
        texts = {child.tag: child.text or "" for child in case}
        label = f"{case.get('classname', '')}::{name}"
        ran.add(label)
        if "failure" in kinds or "error" in kinds:
            message = (kinds.get("failure") or kinds.get("error") or "").strip()
            failed.append([label, (message.splitlines() or ["no message"])[0][:200]])
        elif "skipped" in kinds:
            said = kinds["skipped"] if kinds["skipped"] != "collection skipped" else texts["skipped"]
            skipped.append([label, f"skipped: {said[-160:]}"])
        else:
            parts = set(re.split(r"[\[\]\-, ]", name[name.find("[") :] if "[" in name else ""))
            for backend in backends:
                passed[backend] += backend in parts
    return {"passed": passed, "ran": len(ran), "failed": failed, "skipped": skipped}


def merged(reports: Iterable[dict[str, Any]], backends: Sequence[str]) -> dict[str, Any]:
    """Several reports as one: `failed` is empty only if tests passed on each backend, none failed, none was skipped."""
    passed, failed, skipped = dict.fromkeys(backends, 0), [], []
    for report in reports:
        failed += report["failed"]
        skipped += report.get("skipped", [])
        for backend, count in report.get("passed", {}).items():
            passed[backend] += count
    failed += [[f"tests on {backend}", "not one of them passed"] for backend, count in passed.items() if count == 0]
    return {"passed": passed, "skipped": len(skipped), "failed": [*failed, *skipped]}


def judge(junit: str | None, backends: Sequence[str]) -> dict[str, Any]:
    """What one XML file says."""
    return merged([read(junit, backends)], backends)


def shortened(failed: list[list[str]]) -> list[list[str]]:
    """The first of them, and how many more there are."""
    more = len(failed) - MOST_NAMED
    return [*failed[:MOST_NAMED], [f"{more} more", "not named here"]] if more > 0 else failed
