"""Machine code of GPU kernels in words, many kernels at a time, by nvdisasm (of Triton's package)."""

import itertools
import re
import struct
import subprocess
from pathlib import Path

#: Bytes of an instruction, since sm_70.
INSTRUCTION = 16


def functions(cubin):
    """The bytes of each function's machine code by its name: the sections ``.text.*`` of an ELF file."""
    table, (size, number, names) = struct.unpack_from("<Q", cubin, 40)[0], struct.unpack_from("<3H", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(number)]
    found = {}
    for name, _, _, _, offset, length in sections:
        begin = sections[names][4] + name
        section = cubin[begin : cubin.index(b"\0", begin)].decode()
        if section.startswith(".text."):
            found[section.removeprefix(".text.")] = cubin[offset : offset + length]
    return found


def disassembled(codes, architecture, folder):
    """The instructions of each of ``codes``, line by line, for an architecture such as "sm_80".

    One run of nvdisasm for all of them, since it takes a fifth of a second to start.
    """
    import triton

    image, begins = Path(folder) / "code", [0, *itertools.accumulate(len(code) // INSTRUCTION for code in codes)]
    image.write_bytes(b"".join(codes))
    command = [triton.knobs.nvidia.nvdisasm.path, "--binary", architecture.replace("sm_", "SM"), str(image)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/(.*)", listing, re.MULTILINE)
    assert [int(at, 16) for at, _ in lines] == list(range(0, begins[-1] * INSTRUCTION, INSTRUCTION))
    return ["\n".join(text for _, text in lines[slice(*pair)]) for pair in itertools.pairwise(begins)]
