"""Machine code of every architecture: registers within their caps, nothing spilled, 16 bytes at a time."""

from __future__ import annotations

import re

import compiler
import pytest
from reports import REGISTERS_OF_A_MULTIPROCESSOR, disassembler, ptxas, sass

pytestmark = pytest.mark.nvcc

each_architecture = pytest.mark.parametrize("arch", compiler.ARCHITECTURES)
#: Registers of a thread. A row in registers needs many; for pixels as many threads as possible are to run at a time.
CAPS = {
    "pixels": 64,
    "rows of half and float": 128,
    "rows of double": 255,
}
PIXELS = ("pgd_step", "sample_stats", "lambda_x", "random_start")
#: kernel -> what it reads and writes 16 bytes at a time
VECTORS = {
    "pgd_step_linf": ("LDG", "STG"),
    "pgd_step_l2": ("LDG", "STG"),
    "sample_stats": ("LDG",),
    "lambda_x": ("LDG",),
    "random_start": ("LDG", "STG"),
    "random_start_l2": ("LDG", "STG"),
}


@pytest.fixture(scope="module")
def nvdisasm() -> None:
    if disassembler() is None:
        pytest.skip("no nvdisasm (pip install nvidia-cuda-nvdisasm): machine code was not checked")


def cap(kernel: str) -> int:
    if any(name in kernel for name in PIXELS):
        return CAPS["pixels"]
    return CAPS["rows of double" if "Id" in kernel else "rows of half and float"]


@each_architecture
def test_nothing_is_spilled(arch: int) -> None:
    spilled = {name: report for name, report in ptxas(arch).items() if report.spills or report.stack}
    assert not spilled


@each_architecture
def test_registers_are_within_their_caps(arch: int) -> None:
    for name, report in ptxas(arch).items():
        assert report.registers <= cap(name), f"{name}: {report.registers}"


@each_architecture
def test_a_block_finds_its_registers_and_shared_memory(arch: int) -> None:
    """The largest block of each kernel runs at all; what is left of 48 KiB is for dynamic shared memory."""
    for stem in compiler.STEMS:
        text = compiler.ptx(stem, arch).read_text()
        for name, threads in re.findall(r"\.visible \.entry (\w+)\(.*?\.maxntid (\d+),", text, re.DOTALL):
            report = ptxas(arch)[name]
            assert report.registers * int(threads) <= REGISTERS_OF_A_MULTIPROCESSOR, name
            assert report.shared <= 1024, name


@pytest.mark.usefixtures("nvdisasm")
@each_architecture
def test_no_local_memory(arch: int) -> None:
    for name, instructions in sass(arch).items():
        local = [i for i in instructions if i.startswith(("LDL", "STL"))]
        assert not local, f"{name}: {local}"


@pytest.mark.usefixtures("nvdisasm")
@each_architecture
@pytest.mark.parametrize("kernel", VECTORS)
def test_pixels_move_16_bytes_at_a_time(kernel: str, arch: int) -> None:
    found = {name: i for name, i in sass(arch).items() if f"{len(kernel)}{kernel}I" in name}
    assert found
    for name, instructions in found.items():
        for access in VECTORS[kernel]:
            assert any(re.match(rf"{access}\..*\b128\b", i) for i in instructions), f"{name}: no {access}.128"
