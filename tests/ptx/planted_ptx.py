"""Bugs of tests/simt/planted.py in the PTX that nvcc makes of them."""

from __future__ import annotations

import re
from pathlib import Path

from barriers import ARCH
from builds import changed_sources
from cases import CHECKS
from engine import Engine, Library
from helpers import F32
from kernels import Kernels
from parser import PTXError
from planted import BUGS, Bug

#: Those that are in the kernels, not in their launches -> what the report must say.
REPORTS = {
    "no barrier before shared memory is used again": "data race",
    "no barrier between write and read": "uninitialised memory|data race",
    "no barrier where the next sample is shared out differently": "data race",
    "a shuffle beyond the warp": "beyond the warp",
    "a barrier that one warp does not reach": "wait for others|data race",
    "warps that wait at different barriers": "wait for others",
    "return before a reduction": "wait for others",
    "a step through shared memory within a warp, without __syncwarp": "data race",
    "one element too many in global memory": "out of bounds",
    "vector access to any address": "misaligned access",
    "a sum that several blocks add to": "data race",
}
PLANTED = [bug for bug in BUGS if bug.name in REPORTS]


def outcome(bug: Bug, library: Library) -> str | None:
    """The report of the launch that shows the bug; None if there is none."""
    launch = {name: value for name, value in bug.options.items() if name in ("shift", "max_blocks")}
    kernels = Kernels(Engine(library).run, **launch)
    try:
        CHECKS[bug.operator](kernels, *bug.size, F32)
    except PTXError as error:
        return str(error)
    return None


def compiled(bug: Bug, folder: Path) -> Library:
    """The bug's operator, for float alone."""
    source = changed_sources(folder, bug.file, bug.old, bug.new)
    entry = source / "cuda" / f"{bug.operator}.cu"
    entry.write_text(re.sub(r"(DTF_DEFINE_CUDA_KERNEL)\((\w+)\)", r"\1_FOR(\2, float)", entry.read_text()))
    return Library(ARCH, source, (bug.operator,))
