"""nvcc and ptxas as the product's build calls them, one call per source and architecture, cached under ``build/ptx``.

ptx("pgd_step", 80)                        the path of the PTX
cubin("pgd_step", 80)                      machine code that ptxas makes of that PTX, and its report
ptx("pgd_step", 80, source=copy_of_csrc)   of changed sources
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import cuda_toolkit

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "ptx"
STEMS = tuple(sorted(path.stem for path in (CSRC / "cuda").glob("*.cu")))
#: 75, 80, 86, 90: those of the product's build
ARCHITECTURES = tuple(int(name.replace(".", "")) for name in re.findall(r"\d+\.\d", cuda_toolkit.ARCHITECTURES))


def ptx(stem: str, arch: int, source: Path = CSRC) -> Path:
    return _made(
        f"{stem}.{arch}.ptx",
        [source / "cuda" / f"{stem}.cu", *sorted(source.rglob("*.h")), *sorted(source.rglob("*.cuh"))],
        ["nvcc", *cuda_toolkit.NVCC_FLAGS, "--generate-line-info", f"-arch=compute_{arch}", "-ptx"],
    )


def cubin(stem: str, arch: int) -> tuple[Path, str]:
    code = ptx(stem, arch)
    target = _made(f"{stem}.{arch}.cubin", [code], ["ptxas", f"-arch=sm_{arch}", "-v", "--fmad=false"])
    return target, target.with_suffix(".log").read_text()


def in_parallel(function, *arguments):
    """Two compilers at a time."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(function, *arguments))


def _made(name: str, sources: list[Path], command: list[str]) -> Path:
    """What ``command`` makes of the first of ``sources``; the others only decide whether it must be made again."""
    digest = hashlib.sha256("\0".join([_version(), *command]).encode())
    for path in sources:
        digest.update(path.read_bytes())
    stem, _, suffix = name.partition(".")
    target = CACHE / f"{stem}-{digest.hexdigest()[:16]}.{suffix}"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f"{target.name}.{os.getpid()}")  # other processes may make the same
        program = toolkit() / "bin" / command[0]
        result = subprocess.run(
            [program, *command[1:], sources[0], "-o", unfinished], capture_output=True, text=True, check=False
        )
        if result.returncode:
            raise RuntimeError(f"{name} does not compile:\n{result.stdout}{result.stderr}")
        target.with_suffix(".log").write_text(result.stderr)
        unfinished.rename(target)
    return target


@cache
def toolkit() -> Path:
    home = cuda_toolkit.find_toolkit()
    assert home is not None
    return home


@cache
def _version() -> str:
    return str(cuda_toolkit.toolkit_version(toolkit()))
