"""What a run or a report says about the machine and the software under it."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import dtrades_fast

__all__ = [
    "Precision",
    "backend",
    "cpu_model",
    "describe",
    "device",
    "git_commit",
    "memory_gib",
    "physical_cores",
    "precision",
    "versions",
]

Precision = Literal["auto", "fp32", "fp16", "bf16"]
ROOT = Path(dtrades_fast.__file__).parent.parent
SOURCES = ("dtrades_fast", "csrc", "setup.py", "pyproject.toml")  #: that decide what is computed


def device(name: str) -> str:
    """The device that ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` stands for here.

    Raises:
        ValueError: not a device of this machine.
    """
    import torch

    count = torch.cuda.device_count()
    if name == "auto":
        return "cuda" if count else "cpu"
    if name == "cpu" or (name == "cuda" and count) or name in {f"cuda:{i}" for i in range(count)}:
        return name
    there = ["auto", "cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]
    why = "" if count else f"; torch {torch.__version__} finds no CUDA device"
    raise ValueError(f"--device {name} is not available here: use one of {', '.join(there)}{why}")


def precision(name: Precision, device: str) -> Precision:
    """What ``auto``, ``fp32``, ``fp16`` or ``bf16`` stands for on a device that there is.

    ``auto`` is bf16 where the GPU's matrix units know it (compute capability 8.0 and above), fp16 on older GPUs, and
    fp32 on the CPU.
    """
    if name != "auto":
        return name
    if device == "cpu":
        return "fp32"
    import torch

    return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"


def physical_cores() -> int:
    """Cores that this process may use, hyper-threads of one core counted once, within the container's quota."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    allowed = os.sched_getaffinity(0)
    cores = set()
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text() if siblings.is_file() else str(cpu))
    return max(1, min(len(cores), _cpu_quota() or len(cores)))


def _cpu_quota() -> int | None:
    """Whole cores that the control group grants, None without a limit."""
    limit = Path("/sys/fs/cgroup/cpu.max")
    quota, period = limit.read_text().split() if limit.is_file() else ("max", "1")
    return None if quota == "max" else int(quota) // int(period)


def cpu_model() -> str:
    """The processor's name, as well as the system knows it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _processor() -> str:
    """The processor and the instructions that torch uses on it, which decide the last bits of results."""
    import torch

    return f"{cpu_model()}, {torch.backends.cpu.get_cpu_capability()}"


def memory_gib() -> float | None:
    """Main memory that this process may use, None where the system does not tell."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return None
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (granted := limit.read_text().strip()).isdigit():
        memory = min(memory, int(granted))
    return memory / 2**30


def git_commit() -> str | None:
    """Commit of the checkout that the package is run from; None elsewhere.

    ``-dirty`` follows where what is run differs from it: the package, its kernels or what builds them.
    """
    if not (ROOT / ".git").exists():
        return None
    try:
        commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--", *SOURCES)
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}-dirty" if changes else commit


def _git(*words: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(ROOT), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()


def versions() -> dict[str, str | None]:
    """Installed version by distribution, None where it is missing."""
    found: dict[str, str | None] = {"python": platform.python_version(), "dtrades_fast": dtrades_fast.__version__}
    for name in ("torch", "torchvision", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def backend(device: str) -> str:
    """Which operators serve tensors on ``device``, and why not the kernels."""
    from dtrades_fast.ops import BACKEND

    kind = device.split(":")[0]
    if kind in BACKEND.devices:
        return f"C++ kernels ({kind})"
    if BACKEND.requested == "reference":
        return "PyTorch reference (DTRADES_FAST_BACKEND=reference)"
    module = "_C_cuda" if kind == "cuda" and "cpu" in BACKEND.devices else "_C"
    return f"PyTorch reference ({module}: {BACKEND.problems.get(module, 'no kernels for this device')})"


def describe(device: str, threads: int) -> dict[str, Any]:
    """What ``env.json`` says beside seed and data."""
    import torch

    return {
        "versions": versions(),
        "commit": git_commit(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor(),
        "backend": backend(device),
        "threads": threads,
    }
