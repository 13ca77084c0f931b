"""The site builds without a warning, and holds a reference of all that is exported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lets_kernels

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_the_reference_has_everything_that_is_exported(site):
    text = "".join(page.read_text() for page in (site / "api").glob("*.html"))
    expected = set(lets_kernels.__all__) - {"__version__"}
    assert sorted(re.findall(r'<h2 id="lets_kernels\.(\w+)"', text)) == sorted(expected)


def test_no_role_of_another_generator_is_left(site):
    for page in (site / "api").glob("*.html"):
        assert not re.findall(r":(?:class|meth|func|mod):", page.read_text())


def test_nothing_is_fetched_from_another_server(site):
    for page in site.rglob("*.html"):
        fetched = re.findall(r'<(?:script|img|link)[^>]* (?:src|href)="?(https?://[^">]*)', page.read_text())
        assert not fetched, page


def test_a_link_to_a_file_that_is_not_there_stops_the_build():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from site_pages import place
    finally:
        sys.path.pop(0)
    assert place("radius.md", "../benchmarks/experiments/results/radii.png").endswith("radii.png")
    assert place("index.md", "docs/radius.md") == "docs/radius.md"  # README.md, as seen from the root
    with pytest.raises(ValueError, match="no file"):
        place("radius.md", "nowhere.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT / "docs")))
def test_a_page_says_at_its_top_for_whom_it_is(page):
    assert re.match(r"# .+\n\nFor ", page.read_text())
