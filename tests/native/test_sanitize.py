"""The kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer: a short form of `make sanitize`.

No Python runs there: the ops are called from C++, on random layouts between guard bands (tests/sanitize).
"""

import subprocess

import pytest

from lets_kernels.ops.declared import OPS
from support import sanitized


def has_sanitizers():
    """Whether a program that asks for them can be linked: their libraries are not there with every compiler."""
    compiler = sanitized.toolchain.find_compiler()
    if isinstance(compiler, str):
        return False
    for flags in sanitized.SANITIZERS.values():
        command = [*compiler.command, *flags.split(), "-x", "c++", "-", "-o", "/dev/null"]
        if subprocess.run(command, input=b"int main() {}", capture_output=True).returncode != 0:
            return False
    return True


pytestmark = pytest.mark.skipif(not has_sanitizers(), reason="no C++ compiler with sanitizers")


@pytest.fixture(scope="module")
def programs():
    """The directory of the programs. Threads are shared out before the instruction set matters: one will do there."""
    isas = sanitized.toolchain.find_compiler().isas
    targets = ["thread/walk-small", *(f"address/{name}" for name in ("walk-small", "fuzz", "sizes", "sizes-small"))]
    return sanitized.build(*targets, isas={"address": [isas[0], isas[-1]], "thread": isas[:1]})


def test_every_op_stays_within_its_memory(programs):
    """Chunks of 43 elements, half of the stores streaming; every byte is what a plain loop over elements gives."""
    for options in (("--threads", 3, "--isa", "baseline"), ("--threads", 2), ("--callers", 2, "--layouts", 5)):
        done = sanitized.counts(programs / "address/walk-small", "--layouts", 20, *options)
        assert done["layouts"] == done["ops"] / len(OPS) >= 40 and done["elements"] > 100_000


def test_threads_of_an_op_and_callers_at_once_do_not_race(programs):
    for options in (("--threads", 3), ("--threads", 2, "--callers", 3)):
        done = sanitized.counts(programs / "thread/walk-small", "--layouts", 3, *options)
        assert done["ops"] >= 12 * len(OPS) and done["elements"] > 10_000


@pytest.mark.parametrize("sanitizer, fault", [(s, f) for s, faults in sanitized.FAULTS.items() for f in faults])
def test_a_fault_on_purpose_is_reported(programs, sanitizer, fault):
    """A silent sanitizer proves something only if it is known to speak."""
    sanitized.check_fault(programs / sanitizer / "walk-small", fault, *sanitized.FAULTS[sanitizer][fault])


def test_no_table_or_list_leads_out_of_bounds(programs):
    done = sanitized.counts(programs / "address/fuzz", "--inputs", 20_000)
    assert done["inputs"] == 20_000 and 0.2 < done["ran"] / done["inputs"] < 0.95, "one of the two is not tested"


def test_runs_beyond_2_31_elements_are_cut_and_addressed_right(programs):
    """With the limits that ship, where no memory has to stand behind the sizes, and with small ones."""
    assert sanitized.counts(programs / "address/sizes")["most_elements"] > 2**33
    assert sanitized.counts(programs / "address/sizes-small")["launches"] > 1000
