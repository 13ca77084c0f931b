"""Options, the reports that the benchmarks fill, and what is printed and saved at the end."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from benchmarks.common import WAIT_FOR_QUIET, Report
from lets_kernels.bench.clock import threads
from lets_kernels.record import environment

_REPORTS = pytest.StashKey[dict[str, Report]]()
_MACHINE = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lets_kernels benchmarks")
    group.addoption("--save-results", action="store_true", help="write benchmarks/results/*.json")
    group.addoption("--wait", type=float, default=0, help="seconds to wait for a quiet machine before each comparison")
    group.addoption("--rounds", type=int, default=15, help="rounds of every contender, in turn (default: 15)")
    group.addoption("--torch-compile", action="store_true", help="compile the eager step as well: minutes")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_REPORTS] = {}
    WAIT_FOR_QUIET[0] = config.getoption("--wait")
    config.stash[_MACHINE] = environment()
    if config.getoption("verbose", 0) < 1:
        config.option.benchmark_quiet = True  # our tables have more to say than pytest-benchmark's


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """For everything but the timing itself."""
    with threads(1):
        yield


@pytest.fixture(scope="session")
def rounds(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("--rounds")


@pytest.fixture(scope="session")
def report(request: pytest.FixtureRequest) -> Callable[[str, str], Report]:
    """The report of one file, by name; the first call gives it its title."""
    reports = request.config.stash[_REPORTS]
    return lambda name, title: reports.setdefault(name, Report(title))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    filled = {name: report for name, report in config.stash[_REPORTS].items() if report.rows}
    if not filled:
        return
    machine = config.stash[_MACHINE]
    machine["load_average_after"] = environment()["load_average"]
    terminalreporter.section("benchmarks")
    terminalreporter.write_line(
        f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores, torch {machine['torch']}, "
        f"{machine['backend']}, commit {machine['commit'][:9]}{' (dirty)' if 'dirty' in machine['commit'] else ''}, "
        f"load {machine['load_average'][0]} before"
    )
    terminalreporter.write_line(
        "Milliseconds are medians over rounds run in turn; ratios are medians of the rounds' own."
    )
    for name, report in filled.items():
        terminalreporter.write_line("")
        terminalreporter.write_line(report.text())
        if report.disturbed:
            terminalreporter.write_line("Other processes were busy: the rows marked so say nothing and are not saved.")
        if config.getoption("--save-results") and not all(row.get("disturbed") for row in report.rows):
            terminalreporter.write_line(f"saved: {report.save(name, machine)}")
