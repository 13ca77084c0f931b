"""docs/kernel.md: what it names is in the files that it names, and the loop that it shows is in the machine code."""

import re
import subprocess
from pathlib import Path

import pytest

from lets_kernels import _C
from support.docs_blocks import blocks

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "kernel.md"
ROWS = re.findall(r"^\| \d+ \| `([\w/.]+)` \| (.+?) \|", PAGE.read_text(), re.MULTILINE)
LOOP, MACHINE_CODE = (text for _, text in blocks(PAGE, "text"))


@pytest.mark.parametrize(("file", "names"), ROWS)
def test_what_is_named_is_in_the_file(file, names):
    text = (ROOT / file).read_text()
    for name in re.findall(r"`([^`]+)`", names):
        assert re.search(rf"\b{re.escape(name)}\b", text), name


def test_there_is_a_way_down_on_both_devices():
    assert len(ROWS) == 14
    for path in re.findall(r"`((?:lets_kernels|csrc|tests)/[\w/.]+)`", PAGE.read_text()):
        assert (ROOT / path).exists(), path


def test_the_loop_is_that_of_the_source():
    assert LOOP.strip() in (ROOT / "csrc" / "cpu" / "perturb.cpp").read_text()


@pytest.mark.skipif("avx512" not in Path(_C.__file__).read_bytes().decode("latin1"), reason="built without AVX-512")
def test_the_instructions_are_those_of_the_library():
    symbol = "_ZN4lets3cpu6avx51212_GLOBAL__N_14walkIfEEvRKNS_8chunk_of8perturb_E"
    command = ["objdump", "-d", "--no-show-raw-insn", f"--disassemble={symbol}", _C.__file__]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    shown = [line.split()[0] for line in MACHINE_CODE.splitlines()]
    found = re.findall(r"^ +[0-9a-f]+:\t(\w+)", code, re.MULTILINE)
    assert shown[:3] == ["vmulps", "vaddps", "vmovups"]
    assert any(found[i : i + len(shown)] == shown for i in range(len(found)))
    assert not [name for name in found if "fmadd" in name]
