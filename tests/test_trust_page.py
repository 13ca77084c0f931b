"""docs/trust.md names tests that exist, and figures that are in tests/results."""

import json
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "trust.md").read_text()
ROWS = re.findall(r"^\| (\d+) \|(.*)$", PAGE, flags=re.MULTILINE)
NAMED = sorted(set(re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", PAGE)))


def test_there_is_a_row_for_each_requirement_and_a_test_in_each():
    assert [int(number) for number, _ in ROWS] == list(range(1, 16))
    assert all("`test_" in row for _, row in ROWS)


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_what_is_named_exists(file, name):
    text = (TESTS / file).read_text()
    assert f"def {name or 'test_'}" in text


def test_figures_are_those_of_the_results():
    sanitize = json.loads((TESTS / "results" / "sanitize.json").read_text())
    mutants = json.loads((TESTS / "results" / "mutants.json").read_text())
    ops = sum(kind["ops"] for kind in sanitize["walk"].values())
    assert f"{ops:,} ops on random layouts, {sanitize['fuzz']['inputs']:,} fuzzed tables" in PAGE
    assert f"{mutants['killed']} of {mutants['total']} mutations" in PAGE
