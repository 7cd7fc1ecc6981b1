"""Shows on the PTX that what a kernel touches, and when, does not depend on the data.

No address, no branch around memory or barriers, no barrier, shuffle or shuffled lane depends on a value that was loaded
from memory. Then a launch touches the same places in the same order for all data, and one run without a race or an
access out of bounds stands for all inputs of that shape.

Allowed is a branch on data that skips forward over arithmetic alone, such as the slow path of a logarithm. What is
assigned there depends on the data as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from instructions import registers_in
from parser import Address, Instruction, Kernel

#: What makes a difference outside of a thread's own registers.
EFFECTS = ("ld", "st", "bar", "shfl", "ret", "exit", "atom", "red", "vote", "call")


@dataclass(frozen=True)
class Finding:
    what: str
    instruction: Instruction

    def __str__(self) -> str:
        return f"{self.what} depends on data: {self.instruction}"


def findings(kernel: Kernel) -> list[Finding]:
    """Where the kernel is not data-oblivious; empty if it is."""
    tainted = _tainted_registers(kernel)
    return list(_violations(kernel, tainted))


def _tainted_registers(kernel: Kernel) -> set[str]:
    """Registers that may hold something that depends on loaded data, wherever in the kernel they are looked at."""
    flows = [(_targets(i), set(_sources(i)), i) for i in kernel.instructions]
    tainted = {name for targets, _, i in flows if _loads_data(i) for name in targets}
    before = -1
    while len(tainted) > before:
        before = len(tainted)
        for at, (targets, sources, i) in enumerate(flows):
            if i.opcode == "bra" and i.guard in tainted:
                for skipped in _skipped(kernel, at):
                    tainted.update(flows[skipped][0])
            elif not tainted.isdisjoint(sources):
                tainted.update(targets)
    return tainted


def _violations(kernel: Kernel, tainted: set[str]) -> Iterator[Finding]:
    for at, i in enumerate(kernel.instructions):
        if i.guard in tainted and not (i.opcode == "bra" and _skipped(kernel, at)):
            yield Finding("a branch", i)
        if any(isinstance(x, Address) and x.base in tainted for x in i.operands):
            yield Finding("an address", i)
        if i.opcode == "shfl" and not tainted.isdisjoint(registers_in(i.operands[2:])):
            yield Finding("a shuffled lane", i)


def _skipped(kernel: Kernel, at: int) -> range:
    """The arithmetic that a branch may skip, up to where all ways meet again; empty if there is anything else."""
    end, inside = kernel.labels[kernel.instructions[at].target], at + 1
    while inside < end:
        i = kernel.instructions[inside]
        if i.opcode in EFFECTS:
            return range(0)
        if i.opcode == "bra":
            if kernel.labels[i.target] <= inside:
                return range(0)
            end = max(end, kernel.labels[i.target])
        inside += 1
    return range(at + 1, end)


def _loads_data(i: Instruction) -> bool:
    return i.opcode in ("ld", "atom") and not i.mnemonic.startswith("ld.param")


def _targets(i: Instruction) -> tuple[str, ...]:
    if i.opcode in ("st", "bra", "bar", "ret"):
        return ()
    first = i.operands[0]
    return tuple(first.split("|")) if isinstance(first, str) else registers_in([first])


def _sources(i: Instruction) -> tuple[str, ...]:
    return registers_in(i.operands if i.opcode in ("st", "bar") else i.operands[1:])
