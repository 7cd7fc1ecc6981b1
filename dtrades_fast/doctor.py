"""``dtrades-fast doctor``: what is installed, what is in use and why, and whether what was asked for can work."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console

from dtrades_fast import data, environment
from dtrades_fast.config import option
from dtrades_fast.ops import _library

__all__ = ["Options", "main"]


@dataclass
class Options:
    """What is installed, what is in use and why. Exit status 1 if something that you ask for cannot work."""

    dataset: Annotated[str | None, option("STR", "Data set whose files must be there.", "none")] = None
    data_root: Annotated[str | None, option("STR", "Folder of the data sets.", "data")] = None
    device: str = "auto"
    """Device that must work: auto (cuda if there is one), cpu, cuda or cuda:N."""


def main(argv: Sequence[str], prog: str) -> int:
    """The sub-command ``doctor``."""
    options = tyro.cli(Options, args=list(argv), prog=prog)
    console = Console()
    for section in (versions(), operators(), cuda(), extras(), data_sets(options.data_root or "data"), machine()):
        for name, text in section:
            console.print(f"{name:14} {text}", highlight=False, markup=False, soft_wrap=True)
    found = list(problems(options))
    for problem in found:
        console.print(f"problem: {problem}", style="red", highlight=False, markup=False, soft_wrap=True)
    if not found:
        console.print("no problems found", highlight=False)
    return 1 if found else 0


def versions() -> Iterator[tuple[str, str]]:
    for name, version in environment.versions().items():
        yield name, version or "not installed"
    yield "commit", environment.git_commit() or "not run from a checkout"


def operators() -> Iterator[tuple[str, str]]:
    backend = _library.BACKEND
    served = f"C++ kernels for {', '.join(sorted(backend.devices))}" if backend.devices else "PyTorch reference"
    yield "operators", f"{served} ({_library.VARIABLE}={backend.requested})"
    for module, kind in _library.MODULES.items():
        unused = f"not used ({_library.VARIABLE}={backend.requested})"
        served = f"loaded, serves {kind} tensors" if kind in backend.devices else unused
        yield f"  {module}", backend.problems.get(module, served)
    yield "SIMD", _library.simd_level() if backend.devices else f"not used; the processor: {cpu_capability()}"


def cpu_capability() -> str:
    return torch.backends.cpu.get_cpu_capability()


def cuda() -> Iterator[tuple[str, str]]:
    yield "CUDA in torch", torch.version.cuda or "none, torch is built for the CPU"
    yield "CUDA toolkit", toolkit()
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        yield (
            f"cuda:{i}",
            f"{p.name}, compute capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB, "
            f"--precision auto is {environment.precision('auto', f'cuda:{i}')}",
        )
    if not torch.cuda.device_count():
        yield "CUDA devices", "none"


def toolkit() -> str:
    """The nvcc that a build would use, and whether it suits torch."""
    on_path = shutil.which("nvcc")  # in the order of a build, see _build/cuda_toolkit.py
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    homes += [str(Path(on_path).resolve().parents[1])] if on_path else []
    for home in (Path(home) for home in (*homes, "/usr/local/cuda", "/opt/cuda") if home):
        if (home / "bin" / "nvcc").is_file() and (home / "include" / "cuda_runtime.h").is_file():
            return f"{home}, {nvcc_version(home / 'bin' / 'nvcc')}"
    return "none (no nvcc with include/cuda_runtime.h in CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda or /opt/cuda)"


def nvcc_version(nvcc: Path) -> str:
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not run: {error}"
    found = re.search(r"release (\d+)\.(\d+)", text)
    if found is None:
        return "of unknown version"
    major, minor = found.groups()
    if torch.version.cuda is None:
        return f"{major}.{minor}"
    same = torch.version.cuda.split(".")[0] == major
    return f"{major}.{minor}, {'matches' if same else 'does NOT match'} torch's CUDA {torch.version.cuda}"


def extras() -> Iterator[tuple[str, str]]:
    """The optional dependencies that the package declares, by extra."""
    try:
        package = metadata.metadata("dtrades_fast")
    except metadata.PackageNotFoundError:
        yield "extras", "unknown, the package is not installed (it runs from the current folder)"
        return
    for extra in package.get_all("Provides-Extra") or []:
        needed = [
            line for line in metadata.requires("dtrades_fast") or [] if re.search(f"extra == ['\"]{extra}['\"]", line)
        ]
        names = [re.split(r"[^\w.-]", line)[0] for line in needed]
        missing = [name for name in names if not installed(name)]
        yield f"extra {extra}", f"missing {', '.join(missing)}" if missing else "installed"


def installed(distribution: str) -> bool:
    try:
        return bool(metadata.version(distribution))
    except metadata.PackageNotFoundError:
        return False


def data_sets(root: str) -> Iterator[tuple[str, str]]:
    yield (
        "data root",
        f"{Path(root).expanduser().resolve()}{'' if Path(root).expanduser().is_dir() else ' (does not exist)'}",
    )
    for name in data.names():
        problem = data_problem(name, root)
        yield f"  {name}", "there" if problem is None else "not there"


def data_problem(name: str, root: str) -> str | None:
    """Why a data set cannot be read without a download, or None."""
    try:
        data.load(name, root, "cpu", download=False)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        return str(error)
    return None


def machine() -> Iterator[tuple[str, str]]:
    yield "machine", f"{platform.platform()}, {environment.cpu_model()}"
    yield "cores", f"{environment.physical_cores()} physical cores usable, torch uses {torch.get_num_threads()} threads"
    if (memory := environment.memory_gib()) is not None:
        yield "memory", f"{memory:.1f} GiB"


def problems(options: Options) -> Iterator[str]:
    """What was asked for and cannot work, with what to do."""
    if _library.BACKEND.error is not None:
        yield _library.BACKEND.error
    if options.data_root is not None and not Path(options.data_root).expanduser().is_dir():
        yield f"--data-root {options.data_root} does not exist: create it or give the folder that holds the data sets"
    if options.dataset is not None and (problem := data_problem(options.dataset, options.data_root or "data")):
        yield f"--dataset {options.dataset}: {problem}"
    try:
        environment.device(options.device)
    except ValueError as error:
        yield str(error)
