"""The summary: aligned text, a hundred lines at most, with everything that was left out."""

from collections.abc import Sequence
from typing import Any

from benchmarks.gpu.verdicts import Results, Row, verdicts

NOT_A_MEASUREMENT = "dry run, not a measurement"
MOST_LINES, MOST_NAMED, WIDTH = 100, 4, 150
COLUMNS = ("25 M", "100 M", "1 B", "ResNet-50", "DeBERTa-base", "1 M")
# Of the steps, by set, method and base; all others are in the JSON.
SHOWN = [("ResNet-50", None, "SGD"), ("ResNet-50", "SAM", "AdamW"), (None, "SAM", "SGD"), (None, "LETS secant", "SGD")]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as aligned lines; the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def header(results: dict[str, Any]) -> list[str]:
    e = results["environment"]
    title = "make gpu-check" + (f": {NOT_A_MEASUREMENT.upper()}" if results["dry_run"] else "")
    card = f"{e['gpu']}, driver {e.get('driver')}, {e.get('memory_GiB')} GiB" if e["gpu"] else "no GPU"
    versions = f"torch {e['torch']}, triton {e['triton']}, CUDA {e['cuda']}, nvcc {e['nvcc']}, Python {e['python']}"
    seconds = f"{results['seconds']:.0f} of {results['budget_s']:.0f} s"
    return [title, card, versions, f"commit {e['commit']}, {e['date']}, {seconds}"]


def ops_table(r: Results) -> list[str]:
    """One row an op: the share of a copy, backend by backend, at each size."""
    rows = r.rows("ops")
    shown = [x for x in rows if "share_of_copy" in x and x.get("summary", True)]
    kinds = list(dict.fromkeys((x["op"], x["direction"], x["dtype"]) for x in shown))
    present = [c for c in COLUMNS if any(x.get("set") == c for x in rows)]
    if not kinds:
        return []
    found = [["op, T, dtype", *(f"{c}" for c in present), "GB/s 100 M"]]
    for op, direction, dtype in sorted(kinds, key=lambda k: k[2] != "fp32"):
        key = {"op": op, "direction": direction, "dtype": dtype}

        def cell(what: str, where: str, form: str, key: dict[str, str] = key) -> str:
            values = [next(iter(r.rows("ops", backend=b, set=where, **key)), {}).get(what) for b in r.backends]
            return " ".join("-" if v is None else format(v, form) for v in values)

        shares = [cell("share_of_copy", c, ".0%") for c in present]
        found.append([f"{op} {direction} {dtype}", *shares, cell("GB/s", "100 M", ".0f")])
    return [f"Ops: share of a device-to-device copy of the same bytes ({', '.join(r.backends)})", *table(found)]


def steps_table(r: Results) -> list[str]:
    ours, other = (f"ours {b}" for b in r.backends)
    head = ["step", "ours", "flat", other.removeprefix("ours "), "best eager", "", "per tensor", "elapsed", "host us"]
    found = [[*head, "flat", "memory"]]
    for kind in r.kinds():
        if not any(all(want in (None, is_) for want, is_ in zip(rule, kind, strict=True)) for rule in SHOWN):
            continue
        key = dict(zip(("set", "method", "base"), kind, strict=True))

        def get(what: str, name: str, form: str = ".3f", key: dict[str, str] = key) -> str:
            value = r.step_time(what, contender=name, **key)
            return "-" if value is None else format(value, form)

        best, idle = r.eager("device", **key), r.eager("elapsed", **key)
        own = r.step_time("elapsed", contender=ours, **key)
        row = next(iter(r.rows("steps", contender=ours, **key)), {})
        found.append(
            [
                f"{kind[1]} + {kind[2]}, {kind[0]}",
                *(get("device", name) for name in (ours, f"{ours} flatten", other)),
                *((f"{best[0]:.3f}", best[1]) if best else ("-", "")),
                get("device", "per tensor"),
                f"{idle[0] / own:.2f}x" if idle and own else "-",
                get("host", ours, ".0f"),
                get("host", f"{ours} flatten", ".0f"),
                f"{row['peak_over_params']:.2f} N" if "peak_over_params" in row else "-",
            ]
        )
    if len(found) == 1:
        return []
    title = "Steps outside forward and backward: ms on the device; elapsed: best eager over ours, from an idle device"
    return [title, *table(found)]


def training_table(r: Results) -> list[str]:
    rows = {how: {x["step"]: x for x in r.rows("end-to-end", how=how)} for how in ("eager", "captured")}
    names = list(dict.fromkeys(name for each in rows.values() for name in each))
    if not names:
        return []

    def cells(row: Row | None) -> list[str]:
        if row is None:
            return ["-", "", ""]
        return [f"{row['median_ms']:.3f}", *(f"{row.get(f'times_{a}', 0):.2f}x" for a in ("gradient", "SGD"))]

    found = [["step", "eager ms", "of a gradient", "of SGD", "captured ms", "of a gradient", "of SGD"]]
    found += [[name, *cells(rows["eager"].get(name)), *cells(rows["captured"].get(name))] for name in names]
    return ["ResNet-18, 32 x 32, batch 128, bf16 autocast, channels_last: a training step", *table(found)]


def missing(results: dict[str, Any]) -> list[str]:
    """Every step's failures and omissions, a few by name and all by number."""
    lines = []
    for name, step in results["steps"].items():
        if step["status"] == "left out":
            lines.append(f"{name}: left out: {step['reason']}")
        for kind in ("failed", "left_out"):
            entries = step.get(kind, [])
            reasons: dict[str, list[str]] = {}
            for case, reason in entries:
                reasons.setdefault(reason, []).append(case)
            for reason, cases in list(reasons.items())[:MOST_NAMED]:
                more = f" and {len(cases) - 2} more" if len(cases) > 2 else ""
                lines.append(f"{name}: {kind.replace('_', ' ')}: {', '.join(cases[:2])}{more}: {reason}"[:WIDTH])
            if len(reasons) > MOST_NAMED:
                lines.append(
                    f"{name}: {kind.replace('_', ' ')} for {len(reasons) - MOST_NAMED} more reasons (in the JSON)"
                )
    return lines


def summary(results: dict[str, Any], where: str) -> str:
    """The whole summary; the verdicts stand last, where an eye and a cut-off log look."""
    r = Results(results["steps"], results["backends"])
    found = verdicts(results["steps"], results["backends"], results["dry_run"])
    timing = ", ".join(f"{n} {s['status']} {s.get('seconds', 0):.0f} s" for n, s in results["steps"].items())
    judged = table([["promise", "status"], *([v.promise, v.status] for v in found)])
    judged = [f"{line}  {v.found}" for line, v in zip(judged[1:], found, strict=True)]
    blocks = [header(results), ops_table(r), steps_table(r), training_table(r), missing(results), judged]
    lines = []
    for block in blocks:
        lines += [*block, ""] if block else []
    lines += [f"steps: {timing}", f"results: {where}"]
    over = len(lines) - MOST_LINES
    if over > 0:  # the least telling lines go: those of what was left out, whose numbers the JSON has
        named = missing(results)
        at = lines.index(named[0]) if named else 0
        cut = min(len(named) - 1, over + 1) if named else 0
        lines[at : at + cut] = [f"({cut} lines on what failed or was left out are in the JSON alone)"] if cut else []
    return "\n".join(line.rstrip() for line in lines) + "\n"
