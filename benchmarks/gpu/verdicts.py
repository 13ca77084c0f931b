"""Which of the promises hold, from the rows of all steps. What was not measured is never a pass."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

SHARE, FIRST_SHARE, LARGE = 0.90, 0.75, 25_000_000
LAUNCHES, BEST_EAGER = 1.5, 2.0
HOST, HOST_FLAT = 150.0, 40.0
MEMORY = (
    1.02  # one saved copy; its padding to 16 elements and the allocator's to 512 bytes are under 2 % at 161 tensors
)
GRADIENTS, INTERVAL_10 = 2.02, 1.12
SMALL = "161 x 16"  # as many tensors as ResNet-50 has, so small that nothing but launches shows
ITEM = {"fp32": 4, "bf16": 2}

Row = dict[str, Any]


@dataclass
class Verdict:
    """One promise: what was found, and whether it holds ("pass", "FAIL", "not measured")."""

    promise: str
    found: str
    status: str


class Results:
    """The steps of a results file, by name."""

    def __init__(self, steps: dict[str, Any], backends: Sequence[str]) -> None:
        self.steps, self.backends = steps, list(backends)

    def rows(self, step: str, **wanted: Any) -> list[Row]:
        rows = self.steps.get(step, {}).get("rows", [])
        return [r for r in rows if all(r.get(k) == v for k, v in wanted.items())]

    def incomplete(self, step: str) -> bool:
        s = self.steps.get(step, {})
        return bool(s.get("left_out") or s.get("failed"))

    def step_time(self, what: str, **wanted: Any) -> float | None:
        rows = self.rows("steps", **wanted)
        return rows[0][what]["median_us" if what == "host" else "median_ms"] if rows else None

    def eager(self, what: str, **wanted: Any) -> tuple[float, str] | None:
        """The best of the alternatives: its time, and its name."""
        rows = [r for r in self.rows("steps", **wanted) if not r["contender"].startswith("ours")]
        return min(((r[what]["median_ms"], r["contender"]) for r in rows), default=None)

    def kinds(self) -> list[tuple[str, str, str]]:
        """Set, method and base of every step that was measured, in order."""
        return list(dict.fromkeys((r["set"], r["method"], r["base"]) for r in self.rows("steps")))


def _worst(
    promise: str,
    rows: Iterable[tuple[float, str]],
    holds: Callable[[float], bool],
    show: Callable[[float], str],
    worst: Callable[..., tuple[float, str]],
    incomplete: bool,
) -> Verdict:
    found = list(rows)
    if not found:
        return Verdict(promise, "no row", "not measured")
    value, where = worst(found)
    status = ("pass (of what was measured)" if incomplete else "pass") if holds(value) else "FAIL"
    short = sum(not holds(v) for v, _ in found)
    missed = f", {short} of {len(found)} short" if short else f", the worst of {len(found)}"
    return Verdict(promise, f"{show(value)}: {where}{missed}", status)


def of_checks(r: Results) -> list[Verdict]:
    found = []
    for name, promise in (("build", "builds in place for this card"), ("tests", "all tests pass on both backends")):
        step = r.steps.get(name)
        if step is None or step["status"] == "left out":
            found.append(Verdict(promise, "not run", "not measured"))
            continue
        failed = step.get("failed", [])
        said = f"{failed[0][0]}: {failed[0][1]}"[:90] if failed else f"{step.get('seconds', 0):.0f} s"
        if name == "tests":
            counts = ", ".join(f"{n} on {b}" for b, n in step.get("passed", {}).items())
            said = f"passed: {counts or 'none'}; {len(failed)} against" + (f" ({said})" if failed else "")
        found.append(Verdict(promise, said, "pass" if step["status"] == "ok" else "FAIL"))
    rows = r.rows("sanitize")
    said = "; ".join(f"{row['tool']} over {row['tests']} tests: {row['said']}" for row in rows)
    clean = len(rows) == 2 and all(row["clean"] for row in rows)
    status = ("pass" if clean else "FAIL") if rows else "not measured"
    return [*found, Verdict("compute-sanitizer is clean", said or "not run", status)]


def of_ops(r: Results) -> list[Verdict]:
    found = []
    for backend in r.backends:
        rows = [
            (row["share_of_copy"], f"{row['op']} {row['direction']} {row['dtype']} at {row['set']}")
            for row in r.rows("ops", backend=backend)
            if "share_of_copy" in row and row["bytes"] >= LARGE * ITEM[row["dtype"]]
        ]
        v = _worst(
            f"{backend}: every op >= {SHARE:.0%} of a copy, N >= 25 M",
            rows,
            lambda x: x >= SHARE,
            lambda x: f"{x:.0%}",
            min,
            r.incomplete("ops"),
        )
        if v.status == "FAIL":
            v.found += f"; first landing ({FIRST_SHARE:.0%}) {'met' if min(rows)[0] >= FIRST_SHARE else 'not met'}"
        found.append(v)
        small = [
            (row["times_empty_chain"], f"{row['op']} {row['direction']} {row['dtype']}, {row['launches']} launches")
            for row in r.rows("ops", backend=backend, set=SMALL)
            if row.get("times_empty_chain")
        ]
        found.append(
            _worst(
                f"{backend}: small ops <= {LAUNCHES} x empty launches",
                small,
                lambda x: x <= LAUNCHES,
                lambda x: f"{x:.2f}x",
                max,
                r.incomplete("ops"),
            )
        )
    return found


def of_steps(r: Results) -> list[Verdict]:
    ours = f"ours {r.backends[0]}"
    found = []
    for what in ("elapsed", "device"):
        label = {"elapsed": "from an idle device", "device": "on the device alone"}[what]
        main = {"set": "ResNet-50", "method": "SAM", "base": "SGD"}
        own, best = r.step_time(what, contender=ours, **main), r.eager(what, **main)
        promise = f"SAM + SGD, ResNet-50 >= {BEST_EAGER:g} x best eager, {label}"
        if own is None or best is None:
            found.append(Verdict(promise, "no row", "not measured"))
        else:
            said = f"{best[0] / own:.2f}x {best[1]} ({own:.3f} against {best[0]:.3f} ms)"
            found.append(Verdict(promise, said, "pass" if best[0] >= BEST_EAGER * own else "FAIL"))
        ratios = []
        for label_of_set, method, base in r.kinds():
            key = {"set": label_of_set, "method": method, "base": base}
            own, best = r.step_time(what, contender=ours, **key), r.eager(what, **key)
            if own is not None and best is not None:
                ratios.append((best[0] / own, f"{method} + {base}, {label_of_set}, {best[1]}"))
        found.append(
            _worst(
                f"never slower than the best eager, {label}",
                ratios,
                lambda x: x >= 1,
                lambda x: f"{x:.2f}x",
                min,
                r.incomplete("steps"),
            )
        )
    for name, most in ((ours, HOST), (f"{ours} flatten", HOST_FLAT)):
        host = r.step_time("host", contender=name, set="ResNet-50", method="SAM", base="SGD")
        promise = f"host time of SAM + SGD, 161 tensors <= {most:g} us{', flattened' if 'flatten' in name else ''}"
        status = "not measured" if host is None else "pass" if host <= most else "FAIL"
        found.append(Verdict(promise, "no row" if host is None else f"{host:.0f} us", status))
    peaks = [
        (row["peak_over_params"], f"{row['method']} + {row['base']}, {row['set']}, {row['contender']}")
        for row in r.rows("steps")
        if row["contender"].startswith("ours") and not row["method"].startswith("LETS") and "peak_over_params" in row
    ]
    found.append(
        _worst(
            "SAM and ASAM keep one copy of the weights, nothing more",
            peaks,
            lambda x: x <= MEMORY,
            lambda x: f"{x:.3f} N",
            max,
            r.incomplete("steps"),
        )
    )
    return found


def of_training(r: Results) -> list[Verdict]:
    backend, found = r.backends[0], []
    for how in ("eager", "captured"):
        rows = {row["step"]: row for row in r.rows("end-to-end", how=how)}
        sam, lets = rows.get(f"SAM {backend}"), rows.get(f"LETS-SAM 10 {backend}")
        value = sam["times_gradient"] if sam else None
        status = "not measured" if value is None else "pass" if value <= GRADIENTS else "FAIL"
        said = "no row" if value is None else f"{value:.3f} gradients"
        found.append(Verdict(f"ResNet-18 {how}: SAM <= {GRADIENTS} gradients", said, status))
        value = lets["median_ms"] / sam["median_ms"] if lets and sam else None
        status = "not measured" if value is None else "pass" if value <= INTERVAL_10 else "FAIL"
        said = "no row" if value is None else f"{value:.3f} x SAM"
        found.append(Verdict(f"ResNet-18 {how}: LETS every 10th step <= {INTERVAL_10} x SAM", said, status))
    rows = r.rows("graphs")
    for key, promise in (
        ("replay_equals_eager", "a captured step replays to the bits of eager"),
        ("deterministic", "ten runs give the same bits"),
    ):
        bad = [f"{x['method']} + {x['base']} {x['backend']}" for x in rows if not x.get(key)]
        status = "not measured" if not rows else "FAIL" if bad or r.steps["graphs"].get("failed") else "pass"
        if status == "pass" and r.incomplete("graphs"):
            status = "pass (of what was measured)"
        said = f"{len(rows) - len(bad)} of {len(rows)}" + (f"; not: {', '.join(bad[:2])}" if bad else "")
        found.append(Verdict(promise, said, status))
    return found


def verdicts(steps: dict[str, Any], backends: Sequence[str], dry: bool) -> list[Verdict]:
    """All promises; in a dry run they are computed like any, and then marked as what they are: nothing."""
    r = Results(steps, backends)
    found = [*of_checks(r), *of_ops(r), *of_steps(r), *of_training(r)]
    if dry:
        for v in found:
            v.status = "dry run"
    return found
