"""What the compiler says of the machine code: registers, spills, shared memory (ptxas), and the instructions themselves
(nvdisasm, from PyPI)."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import compiler

REGISTERS_OF_A_MULTIPROCESSOR = 65536
#: one line of nvdisasm: /*0010*/ @!P0 LDG.E.128 R4, ...
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", re.MULTILINE)


@dataclass(frozen=True)
class Report:
    """ptxas on one kernel."""

    registers: int
    stack: int  # bytes
    spills: int  # bytes
    shared: int  # bytes, static


@cache
def ptxas(arch: int) -> dict[str, Report]:
    """By the kernels' mangled names."""
    found = {}
    for _, log in compiler.in_parallel(lambda stem: compiler.cubin(stem, arch), compiler.STEMS):
        for part in log.split("Compiling entry function ")[1:]:
            numbers = [int(n) for n in re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", part)]
            registers = int(re.search(r"Used (\d+) registers", part)[1])
            shared = re.search(r"(\d+) bytes smem", part)
            name = re.match(r"'(\w+)'", part)[1]
            found[name] = Report(registers, numbers[0], sum(numbers[1:]), int(shared[1]) if shared else 0)
    return found


def disassembler() -> Path | None:
    """nvdisasm of the package nvidia-cuda-nvdisasm, or of a whole toolkit."""
    package = importlib.util.find_spec("nvidia")
    folders = [Path(folder) / "cu13" / "bin" for folder in (package.submodule_search_locations if package else ())]
    candidates = [folder / "nvdisasm" for folder in (*folders, compiler.toolkit() / "bin")]
    return next((path for path in candidates if path.is_file()), None)


@cache
def sass(arch: int) -> dict[str, Counter[str]]:
    """How often each machine instruction occurs in each kernel, with its modifiers: LDG.E.128.CONSTANT."""
    found = {}
    for stem in compiler.STEMS:
        path, _ = compiler.cubin(stem, arch)
        text = subprocess.run([disassembler(), "-c", path], capture_output=True, text=True, check=True).stdout
        for section in text.split(".section\t.text.")[1:]:
            name = re.match(r"\w+", section)[0]
            found[name] = Counter(INSTRUCTION.findall(section))
    return found
