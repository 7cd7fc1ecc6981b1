"""Compiles the emulator: the kernels of ``csrc/cuda`` with g++ instead of nvcc.

    build()                                              the plain emulator with every operator and dtype
    build("tsan", dtypes=["float32"])                    another kind, fewer dtypes
    build(operators=["pgd_step"], source=copy_of_csrc)   one operator of changed sources: a mutant

Each translation unit is cached under ``build/simt`` by the content of all that it includes, so a changed kernel
compiles that kernel alone.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "simt"

OPERATORS = tuple(sorted(path.stem for path in (HERE / "operators").glob("*.cpp")))
DTYPES = {"float32": "float", "float64": "double", "float16": "dtf::Half", "bfloat16": "dtf::BFloat16"}

COMPILER = os.environ.get("CXX", "g++")
# No contraction, as nvcc's --fmad=false; kernels read memory through packs of another type.
FLAGS = ("-std=c++20", "-O1", "-g1", "-fno-strict-aliasing", "-ffp-contract=off")
KINDS = {
    "plain": (),
    "asan": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "tsan": ("-fsanitize=thread",),
    "portable": ("-DDTF_PORTABLE_FIBERS",),  # the fibers of other processors than x86-64
}


def build(
    kind: str = "plain",
    operators: Sequence[str] = OPERATORS,
    dtypes: Sequence[str] = tuple(DTYPES),
    source: Path = CSRC,
) -> Path:
    """The program that emulates these operators (stems of ``operators/``) and dtypes, compiled from ``source``."""
    types = "-DDTF_TYPES=" + ",".join(DTYPES[dtype] for dtype in dtypes)
    unsanitized = [flag for flag in KINDS[kind] if not flag.startswith("-f")]  # see scheduler.cpp
    units = [(HERE / "scheduler.cpp", unsanitized, CSRC), (HERE / "driver.cpp", KINDS[kind], CSRC)]
    units += [(HERE / "operators" / f"{name}.cpp", (*KINDS[kind], types), source) for name in operators]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(_compile, *zip(*units, strict=True)))
    program = CACHE / f"{kind}-{_digest(*map(str, objects))}"
    # -rdynamic: kernels are found by the names that they are exported under
    _make(program, [*KINDS[kind], "-rdynamic", *map(str, objects), "-ldl"])
    return program


def changed_sources(folder: Path, file: str, old: str, new: str) -> Path:
    """A copy of ``csrc`` in ``folder``, in which the one occurrence of ``old`` in ``file`` is replaced by ``new``."""
    copy = folder / "csrc"
    shutil.copytree(CSRC, copy)
    text = (copy / file).read_text()
    if text.count(old) != 1:
        raise ValueError(f"{file} has {text.count(old)} times, not once:\n{old}")
    (copy / file).write_text(text.replace(old, new))
    return copy


def _compile(unit: Path, flags: Sequence[str], source: Path) -> Path:
    texts = [path.read_text() for path in _includes(unit, source)]
    flags = [*FLAGS, *flags]
    target = CACHE / f"{unit.stem}-{_digest(_version(), *flags, *texts)}.o"
    _make(target, [*flags, "-I", str(source), "-I", str(HERE), "-c", str(unit)])
    return target


def _make(target: Path, arguments: Sequence[str]) -> None:
    if target.exists():
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{target.name}.{os.getpid()}.{threading.get_ident()}")  # others may make it, too
    result = subprocess.run([COMPILER, *arguments, "-o", str(unfinished)], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{target.name} does not compile:\n{result.stderr}")
    unfinished.rename(target)


def _includes(unit: Path, source: Path) -> list[Path]:
    """The unit and all files of the project that it includes, in the order in which they are met."""
    found = [unit]
    for path in found:
        for name in re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE):
            candidates = (folder / name for folder in (path.parent, source, HERE))
            found += [p for p in (next(c.resolve() for c in candidates if c.exists()),) if p not in found]
    return found


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


@cache
def _version() -> str:
    return subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True).stdout
