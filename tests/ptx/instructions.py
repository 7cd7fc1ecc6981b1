"""Turns the instructions of a kernel into steps that the machine runs for all its threads at once."""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from arithmetic import DTYPES, SEMANTICS, SIZES
from memory import Memory
from parser import Address, Instruction, Kernel, Operand, PTXError
from registers import Lanes

if TYPE_CHECKING:
    from machine import Machine

SHARED_SHIFT = 16  # 64 KiB of addresses for every shared array
SHARED_LIMIT = 48 * 1024  # of a block, on every GPU

Values = np.ndarray
Reader = Callable[["Machine", Lanes], Values]


class Meeting(enum.Enum):
    """Whom a thread waits for before the step."""

    BLOCK, WARP = enum.auto(), enum.auto()


@dataclass(frozen=True)
class Step:
    instruction: Instruction
    run: Callable[[Machine, Lanes], Values | bool | None]  # of a branch: which threads take it
    target: int | None = None
    meeting: Meeting | None = None


@dataclass
class Program:
    """A kernel ready to run, and how many threads have executed each of its instructions so far."""

    kernel: Kernel
    steps: list[Step] = field(init=False)
    joins: frozenset[int] = field(init=False)
    executed: Values = field(init=False)

    def __post_init__(self) -> None:
        self.steps = [_Decoder(self.kernel).step(i) for i in self.kernel.instructions]
        self.joins = frozenset(self.kernel.labels.values())
        self.executed = np.zeros(len(self.steps), np.int64)

    def shared_memory(self, dynamic_bytes: int, blocks: int) -> Memory:
        sizes = [dynamic_bytes if array.size is None else array.size for array in self.kernel.shared]
        if sum(sizes) > SHARED_LIMIT:
            raise PTXError(f"{sum(sizes)} bytes of shared memory, more than every GPU grants")
        return Memory(SHARED_SHIFT, sizes, blocks)


class _Decoder:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.shared = {array.name: (i + 1) << SHARED_SHIFT for i, array in enumerate(kernel.shared)}

    def step(self, instruction: Instruction) -> Step:
        opcode, mnemonic, operands = instruction.opcode, instruction.mnemonic, instruction.operands
        if instruction.guard and opcode != "bra":
            raise PTXError(f"a guard on {instruction}")
        if opcode == "mov" and any(isinstance(x, tuple) for x in operands):
            return Step(instruction, self._reshape(instruction))
        if mnemonic in SEMANTICS:
            return Step(instruction, self._arithmetic(instruction))
        if opcode == "bra":
            return Step(instruction, self._branch(instruction), self.kernel.labels[instruction.target])
        if mnemonic == "ret":
            return Step(instruction, lambda machine, lanes: True, len(self.kernel.instructions))
        if mnemonic == "bar.sync" and operands == ("0",):
            return Step(instruction, _pass_barrier, meeting=Meeting.BLOCK)
        if mnemonic == "shfl.sync.bfly.b32":
            return Step(instruction, self._shuffle(operands), meeting=Meeting.WARP)
        if mnemonic.startswith("ld.param."):
            return Step(instruction, self._parameter(instruction))
        if opcode in ("ld", "st"):
            return Step(instruction, self._memory_access(instruction))
        raise PTXError(f"unknown instruction {instruction}")

    # ---- what an instruction does ----------------------------------------------------------------------------------

    def _arithmetic(self, instruction: Instruction) -> Callable[[Machine, Lanes], None]:
        target, *operands = instruction.operands
        semantics = SEMANTICS[instruction.mnemonic]
        if len(operands) != len(semantics.operands):
            raise PTXError(f"operands of {instruction}")
        readers = [self._reader(x, t) for x, t in zip(operands, semantics.operands, strict=True)]
        write, sources = self._writer(target, semantics.result), registers_in(operands)
        unknown_of = _UNKNOWN.get(instruction.mnemonic)
        approximate = ".approx" in instruction.mnemonic

        def run(machine: Machine, lanes: Lanes) -> None:
            values = [read(machine, lanes) for read in readers]
            unknown = machine.registers.unknown(sources, lanes)
            if unknown is not None and unknown_of is not None:
                parts = [machine.registers.unknown(registers_in([x]), lanes) for x in operands]
                unknown = unknown_of(values, [np.False_ if part is None else part for part in parts])
            result = semantics.function(*values)
            write(machine, machine.perturbed(result) if approximate else result, lanes, unknown)

        return run

    def _reshape(self, instruction: Instruction) -> Callable[[Machine, Lanes], None]:
        """mov.b64 {%r1, %r2}, %rd1 and back"""
        target, source = instruction.operands
        whole = instruction.mnemonic.partition(".")[2]
        parts = target if isinstance(target, tuple) else source
        part = f"b{8 * SIZES[whole] // len(parts)}"
        sources = registers_in([source])
        if isinstance(target, tuple):
            read = self._reader(source, whole)
            writers = [self._writer(x, part) for x in target]

            def split(machine: Machine, lanes: Lanes) -> None:
                values = np.ascontiguousarray(read(machine, lanes)).view(DTYPES[part]).reshape(-1, len(parts))
                unknown = machine.registers.unknown(sources, lanes)
                for i, write in enumerate(writers):
                    write(machine, np.ascontiguousarray(values[:, i]), lanes, unknown)

            return split
        readers = [self._reader(x, part) for x in source]
        write = self._writer(target, whole)

        def join(machine: Machine, lanes: Lanes) -> None:
            values = np.stack(np.broadcast_arrays(*(read(machine, lanes) for read in readers)), -1)
            write(machine, values.view(DTYPES[whole])[..., 0], lanes, machine.registers.unknown(sources, lanes))

        return join

    def _branch(self, instruction: Instruction) -> Callable[[Machine, Lanes], Values | bool]:
        guard, negated = instruction.guard, instruction.negated
        if guard is None:
            return lambda machine, lanes: True

        def run(machine: Machine, lanes: Lanes) -> Values:
            machine.require_known((guard,), lanes)
            condition = machine.registers.get(guard, lanes)
            return ~condition if negated else condition

        return run

    def _shuffle(self, operands: tuple[Operand, ...]) -> Callable[[Machine, Lanes], None]:
        """The value of the lane whose number differs in the bits of the mask, with all lanes of the warp."""
        target, _, all_in_range = str(operands[0]).partition("|")
        write, sources = self._writer(target, "b32"), registers_in(operands[1:])
        value, mask, clamp, members = (self._reader(x, "u32") for x in operands[1:])

        def run(machine: Machine, lanes: Lanes) -> None:
            machine.require_known(sources, lanes)
            if np.any(clamp(machine, lanes) != 31) or np.any(members(machine, lanes) != 0xFFFFFFFF):
                raise PTXError("a shuffle of less than a warp")
            values = value(machine, lanes).reshape(-1, 32)
            flipped = np.broadcast_to(mask(machine, lanes), values.size).reshape(-1, 32).astype(np.int64)
            if np.any(flipped > 31):
                raise PTXError("a shuffle beyond the warp")
            write(machine, np.take_along_axis(values, np.arange(32) ^ flipped, 1).reshape(-1), lanes, None)
            if all_in_range:
                machine.registers.put(all_in_range, np.True_, lanes)

        return run

    def _parameter(self, instruction: Instruction) -> Callable[[Machine, Lanes], None]:
        target, address = instruction.operands
        assert isinstance(address, Address)
        kind = instruction.mnemonic.rpartition(".")[2]
        write = self._writer(target, kind)

        def run(machine: Machine, lanes: Lanes) -> None:
            value = np.frombuffer(machine.parameters[address.base], DTYPES[kind], 1, address.offset)[0]
            write(machine, np.asarray(value), lanes, None)

        return run

    def _memory_access(self, instruction: Instruction) -> Callable[[Machine, Lanes], None]:
        found = re.fullmatch(r"(ld|st)\.(global|shared)(?:\.v([24]))?\.(\w+)", instruction.mnemonic)
        if found is None or found[4] not in DTYPES:
            raise PTXError(f"unknown instruction {instruction}")
        space, kind, load = found[2], found[4], found[1] == "ld"
        values, address = instruction.operands if load else instruction.operands[::-1]
        values = values if isinstance(values, tuple) else (values,)
        assert isinstance(address, Address)
        if len(values) != int(found[3] or 1):
            raise PTXError(f"operands of {instruction}")
        base = self._reader(address.base, "u64" if space == "global" else "u32")
        width, needed = SIZES[kind] * len(values), registers_in([address] if load else [address, values])
        writers = [self._writer(x, kind) for x in values] if load else []
        readers = [] if load else [self._reader(x, kind) for x in values]

        def run(machine: Machine, lanes: Lanes) -> None:
            machine.require_known(needed, lanes)
            count = machine.size if lanes is None else len(lanes)
            at = np.broadcast_to(base(machine, lanes).astype(np.int64) + address.offset, count)
            memory, copy = machine.space(space, lanes)
            if machine.counters is not None:
                machine.counters.access(space, load, memory.locate(at, width), machine.warps(lanes))
            if load:
                content = memory.read(at, width, machine.who(lanes), copy).view(DTYPES[kind])
                for i, write in enumerate(writers):
                    write(machine, np.ascontiguousarray(content[:, i]), lanes, None)
            else:
                columns = [np.broadcast_to(read(machine, lanes), count) for read in readers]
                memory.write(at, np.stack(columns, 1).view(np.uint8), machine.who(lanes), copy)

        return run

    # ---- operands --------------------------------------------------------------------------------------------------

    def _reader(self, operand: Operand, kind: str) -> Reader:
        """The operand's values as a type of PTX. A register may be wider than that: its lower bits count."""
        assert isinstance(operand, str)
        dtype = DTYPES[kind]
        if operand in ("%tid.x", "%ctaid.x", "%ctaid.y", "%ntid.x", "%nctaid.x", "%nctaid.y"):
            return lambda machine, lanes: machine.special[operand] if lanes is None else machine.special[operand][lanes]
        if operand.startswith("%"):
            held = DTYPES[self.kernel.register_type(operand)]
            if held == dtype:
                return lambda machine, lanes: machine.registers.get(operand, lanes)
            if np.dtype(held).itemsize == SIZES[kind]:
                return lambda machine, lanes: machine.registers.get(operand, lanes).view(dtype)
            if np.dtype(held).itemsize < SIZES[kind]:
                raise PTXError(f"{operand} is narrower than {kind}")
            return lambda machine, lanes: machine.registers.get(operand, lanes).astype(f"u{SIZES[kind]}").view(dtype)
        constant = np.asarray(self.shared[operand] if operand in self.shared else _number(operand, kind), dtype)
        return lambda machine, lanes: constant

    def _writer(self, operand: Operand, kind: str) -> Callable[[Machine, Values, Lanes, Values | None], None]:
        """A register may be wider than what is written: signed values are extended by their sign."""
        assert isinstance(operand, str)
        held, dtype = DTYPES[self.kernel.register_type(operand)], DTYPES[kind]
        size = np.dtype(held).itemsize
        if size < SIZES[kind]:
            raise PTXError(f"{operand} is narrower than {kind}")

        def write(machine: Machine, values: Values, lanes: Lanes, unknown: Values | None) -> None:
            if held != dtype:
                wide = values if size == SIZES[kind] else values.astype(f"{'i' if kind[0] == 's' else 'u'}{size}")
                values = wide.view(held)
            machine.registers.put(operand, values, lanes, unknown)

        return write


def _pass_barrier(machine: Machine, lanes: Lanes) -> None:
    machine.interval[slice(None) if lanes is None else lanes] += 1


def _number(text: str, kind: str) -> Values:
    if found := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})|0[dD]([0-9A-Fa-f]{16})", text):
        digits = found[1] or found[2]
        return np.frombuffer(bytes.fromhex(digits)[::-1], f"f{len(digits) // 2}")[0]
    value = int(text, 0)
    if kind == "pred":
        return np.bool_(value)
    return np.array(value % (1 << 8 * SIZES[kind]), f"u{SIZES[kind]}").view(DTYPES[kind])


def registers_in(operands: Iterable[Operand]) -> tuple[str, ...]:
    """The general registers among the operands."""
    names: list[str] = []
    for operand in operands:
        parts = operand if isinstance(operand, tuple) else (operand.base if isinstance(operand, Address) else operand,)
        names += [x for x in parts if x.startswith("%") and "." not in x]
    return tuple(names)


# ---- which results are known although an operand is not ------------------------------------------------------------


def _of_selection(values: list[Values], unknown: list[Values]) -> Values:
    return np.where(values[2], unknown[0], unknown[1]) | unknown[2]


def _of_junction(decides: bool) -> Callable[[list[Values], list[Values]], Values]:
    """False decides `and`, True decides `or`, whatever the other operand is."""

    def unknown_of(values: list[Values], unknown: list[Values]) -> Values:
        decided = [(value == decides) & ~missing for value, missing in zip(values, unknown, strict=True)]
        return (unknown[0] | unknown[1]) & ~decided[0] & ~decided[1]

    return unknown_of


_UNKNOWN = {name: _of_selection for name in SEMANTICS if name.startswith("selp.")}
_UNKNOWN |= {"and.pred": _of_junction(False), "or.pred": _of_junction(True)}
