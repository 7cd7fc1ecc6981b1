"""Finds a CUDA toolkit that can compile the kernels. Whether there is a GPU plays no part.

``USE_CUDA=0`` leaves the CUDA kernels out; ``FORCE_CUDA=1`` compiles them for a torch without CUDA, or of another one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

#: T4; A100; RTX 30 and A10; H100, and PTX that later GPUs translate themselves.
ARCHITECTURES = "7.5;8.0;8.6;9.0+PTX"
#: Without contraction of a * b + c, so that elementwise kernels give the bits of the CPU's.
NVCC_FLAGS = ["-std=c++20", "-O3", "--fmad=false"]
USUAL_HOMES = ("/usr/local/cuda", "/opt/cuda")


def find_toolkit() -> Path | None:
    """The home of the toolkit, or None.

    A home has bin/nvcc and include/cuda_runtime.h: the nvcc on PATH may be a wrapper that lies outside of it.
    """
    on_path = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates += [str(Path(on_path).resolve().parents[1])] if on_path else []
    for home in map(Path, filter(None, [*candidates, *USUAL_HOMES])):
        if (home / "bin" / "nvcc").is_file() and (home / "include" / "cuda_runtime.h").is_file():
            return home
    return None


def toolkit_version(home: Path) -> tuple[int, int]:
    """(13, 0) for CUDA 13.0."""
    text = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", text)
    if release is None:
        raise RuntimeError(f"{home / 'bin' / 'nvcc'} --version does not name its release: {text[-200:]!r}")
    return int(release[1]), int(release[2])


def why_not(home: Path | None, torch_cuda: str | None) -> str | None:
    """Why the CUDA kernels are not compiled for a torch built with CUDA ``torch_cuda``; None if they are."""
    if os.environ.get("USE_CUDA") == "0":
        return "USE_CUDA=0"
    if home is None:
        return "no CUDA toolkit (bin/nvcc and include/cuda_runtime.h) in CUDA_HOME, beside nvcc or in /usr/local/cuda"
    forced = os.environ.get("FORCE_CUDA", "0") not in ("", "0")
    if torch_cuda is None:
        return None if forced else "the installed torch has no CUDA (FORCE_CUDA=1 compiles the kernels all the same)"
    version = toolkit_version(home)
    if version[0] != int(torch_cuda.split(".")[0]) and not forced:
        return f"{home} is CUDA {version[0]}.{version[1]}, but the installed torch was built with CUDA {torch_cuda}"
    return None
