"""Machine code of GPU kernels: what its ELF files hold; and NVIDIA's in words, by nvdisasm (of Triton's package)."""

import itertools
import re
import struct
import subprocess
from pathlib import Path

#: Bytes of an instruction, since sm_70.
INSTRUCTION = 16


def _sections(elf):
    """The sections of an ELF file: name, type, offset, size, and which section holds their names."""
    table, (size, number, names) = struct.unpack_from("<Q", elf, 40)[0], struct.unpack_from("<3H", elf, 58)
    headers = [struct.unpack_from("<IIQQQQI", elf, table + i * size) for i in range(number)]
    begin = headers[names][4]
    return [(_string(elf, begin + name), kind, at, length, link) for name, kind, _, _, at, length, link in headers]


def _string(elf, begin):
    return elf[begin : elf.index(b"\0", begin)].decode()


def functions(cubin):
    """The bytes of each function's machine code by its name: the sections ``.text.*`` of an ELF file."""
    found = _sections(cubin)
    return {n.removeprefix(".text."): cubin[at : at + size] for n, _, at, size, _ in found if n.startswith(".text.")}


def symbols(hsaco):
    """The sizes of what an ELF file offers to others, by name."""
    sections, found = _sections(hsaco), {}
    for _, kind, at, length, link in sections:
        if kind == 11:  # SHT_DYNSYM
            for entry in range(at, at + length, 24):
                name, _, _, _, _, size = struct.unpack_from("<IBBHQQ", hsaco, entry)
                found[_string(hsaco, sections[link][2] + name)] = size
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
