"""PTX as data: kernels, their instructions, and where in the sources these come from.

Only what nvcc writes for these kernels is understood; everything else raises.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path


class PTXError(Exception):
    """PTX that is not understood, or that does what it must not do."""


@dataclass(frozen=True)
class Address:
    """[base + offset]; the base is a register or the name of a parameter or array."""

    base: str
    offset: int


Operand = str | Address | tuple[str, ...]  # a register, symbol or number; an address; {%r1, %r2}


@dataclass(frozen=True)
class Instruction:
    mnemonic: str  # ld.global.v4.f32
    operands: tuple[Operand, ...]
    guard: str | None  # of @%p1 and @!%p1
    negated: bool
    source: str  # rows.cuh:80

    @property
    def opcode(self) -> str:
        return self.mnemonic.partition(".")[0]

    @property
    def target(self) -> str:
        """Of a branch."""
        assert isinstance(self.operands[0], str)
        return self.operands[0]

    def __str__(self) -> str:
        return f"{self.mnemonic} ({self.source})"


@dataclass(frozen=True)
class Array:
    """A shared array; the size of the dynamic one is the launch's."""

    name: str
    align: int
    size: int | None


@dataclass(frozen=True)
class Kernel:
    name: str
    parameters: tuple[str, ...]
    shared: tuple[Array, ...]
    registers: dict[str, str]  # prefix -> type: %rd -> b64
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]  # -> index of the next instruction

    def register_type(self, name: str) -> str:
        return self.registers[name.rstrip("0123456789")]

    @cached_property
    def code(self) -> tuple:
        """The same for kernels of two architectures that are one program."""
        steps = [
            (i.mnemonic, (self.labels[i.target],) if i.opcode == "bra" else i.operands, i.guard, i.negated)
            for i in self.instructions
        ]
        return self.name, self.shared, tuple(sorted(self.registers.items())), tuple(steps)

    def without(self, index: int) -> Kernel:
        """This kernel with one instruction left out."""
        kept = self.instructions[:index] + self.instructions[index + 1 :]
        labels = {name: at - (at > index) for name, at in self.labels.items()}
        return Kernel(self.name, self.parameters, self.shared, self.registers, kept, labels)


ENTRY = re.compile(r"^\.visible \.entry (\w+)\((.*?)^\)(.*?)^\{\n(.*?)^\}\n", re.MULTILINE | re.DOTALL)
SHARED = re.compile(r"^\t?(?:\.extern )?\.shared \.align (\d+) \.b8 (\w+)\[(\d*)\];$", re.MULTILINE)


class Module:
    """What nvcc made of one source. Kernels are parsed when they are asked for."""

    def __init__(self, text: str) -> None:
        self._texts = {found[1]: found for found in ENTRY.finditer(text)}
        self._arrays = [_array(found) for found in SHARED.finditer(ENTRY.sub("", text))]
        self._files = {n: Path(path).name for n, path in re.findall(r'^\t\.file\t(\d+) "(.*?)"', text, re.MULTILINE)}
        self._kernels: dict[str, Kernel] = {}
        if re.search(r"^\.(func|const|global|weak)", text, re.MULTILINE):
            raise PTXError("functions and global variables are not supported")

    def names(self) -> list[str]:
        return list(self._texts)

    def kernel(self, name: str) -> Kernel:
        if name not in self._kernels:
            self._kernels[name] = self._parse(self._texts[name])
        return self._kernels[name]

    def _parse(self, found: re.Match[str]) -> Kernel:
        name, parameters, body = found[1], re.findall(r"(\w+)(?:\[\d+\])?,?$", found[2], re.MULTILINE), found[4]
        arrays = [array for array in self._arrays if array.name in body]
        registers: dict[str, str] = {}
        instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        source = "?"
        for line in body.splitlines():
            line = line.partition("//")[0].strip()
            if line.startswith("{") and line.endswith("}"):  # inline assembly: a scope of its own
                line = line[1:-1].strip()
            if line.startswith(".loc"):
                number, row = line.split()[1:3]
                source = f"{self._files[number]}:{row}"
            elif line.startswith(".reg"):
                _, kind, register = re.fullmatch(r"(\.reg) \.(\w+)\s+(%\w+?)(?:<\d+>)?;", line).groups()
                if registers.setdefault(register, kind) != kind:
                    raise PTXError(f"{register} has two types")
            elif line.startswith(".shared"):
                arrays.append(_array(SHARED.fullmatch(line)))
            elif line.endswith(":"):
                labels[line[:-1]] = len(instructions)
            elif line not in ("", "{", "}", '.pragma "nounroll";'):
                instructions.append(_instruction(line, source))
        instructions = _parameters_by_name(instructions, parameters)
        return Kernel(name, tuple(parameters), tuple(arrays), registers, tuple(instructions), labels)


def _parameters_by_name(instructions: list[Instruction], parameters: list[str]) -> list[Instruction]:
    """Where a register holds the address of a parameter, what is loaded from there by the parameter's name."""
    held: dict[Operand, Address] = {}
    result = []
    for i in instructions:
        target, *sources = i.operands or ("",)
        if target in held and i.opcode != "st":
            raise PTXError(f"an address of a parameter is replaced by {i}")
        if i.opcode == "mov" and sources[0] in parameters:
            held[target] = Address(sources[0], 0)
            i = replace(i, operands=(target, "0"))
        elif i.mnemonic == "add.s64" and sources[0] in held and not sources[1].startswith("%"):
            of = held[sources[0]]
            held[target] = Address(of.base, of.offset + int(sources[1]))
        elif i.mnemonic.startswith("ld.param") and sources[0].base in held:
            of = held[sources[0].base]
            i = replace(i, operands=(target, Address(of.base, of.offset + sources[0].offset)))
        result.append(i)
    return result


def _array(found: re.Match[str]) -> Array:
    return Array(found[2], int(found[1]), int(found[3]) if found[3] else None)


def _instruction(line: str, source: str) -> Instruction:
    found = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.]*)\s*(.*);", line)
    if found is None:
        raise PTXError(f"cannot read {line!r}")
    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^\s,{}\[\]]+", found[4])
    return Instruction(found[3], tuple(map(_operand, operands)), found[2], found[1] == "!", source)


def _operand(text: str) -> Operand:
    if text[0] == "{":
        return tuple(re.findall(r"[^\s,{}]+", text))
    if text[0] == "[":
        base, _, offset = text[1:-1].partition("+")
        return Address(base.strip(), int(offset or 0))
    return text
