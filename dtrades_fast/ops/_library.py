"""Finds the compiled kernels and decides which implementation serves a tensor.

``DTRADES_FAST_BACKEND`` selects: ``auto`` (default: the kernels where they are compiled for the tensor's device, else
the pure-PyTorch twins), ``cpp`` (the kernels, an error without those for the CPU) or ``reference`` (the twins).
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch._C._functorch import is_functorch_wrapped_tensor

VARIABLE = "DTRADES_FAST_BACKEND"
CHOICES = ("auto", "cpp", "reference")
#: Forces a lower instruction set than the processor's best, to test and compare; read by the kernels themselves.
SIMD_VARIABLE = "DTRADES_FAST_SIMD"
SIMD_CHOICES = ("x86-64-v4", "x86-64-v3", "baseline")
#: extension module -> the device type that its kernels serve
MODULES = {"_C": "cpu", "_C_cuda": "cuda"}

F = TypeVar("F", bound=Callable[..., object])


class BackendError(RuntimeError):
    """The backend that was asked for cannot be used."""


@dataclass(frozen=True)
class Backend:
    """What serves the operators in this process.

    Attributes:
        name: ``"cpp"`` or ``"reference"``.
        requested: the value of ``DTRADES_FAST_BACKEND``.
        devices: device types that compiled kernels serve; the twins serve every other one.
        problems: module name -> why it is not loaded.
        error: what makes the request impossible, or None.
    """

    name: str
    requested: str
    devices: frozenset[str]
    problems: dict[str, str]
    error: str | None = None


def _build_problem(module: str) -> str:
    """Why the last build left ``module`` out, as the build wrote it down."""
    try:
        info = importlib.import_module("dtrades_fast._build_info")
    except ImportError:
        return "not compiled (run 'pip install .' or 'pip install -e .' in the repository)"
    return str(info.PROBLEMS.get(module, "not compiled by the last build"))


def _load() -> Backend:
    requested = os.environ.get(VARIABLE, "auto").strip().lower() or "auto"
    devices, problems = set(), {}
    if requested != "reference":
        for module, device in MODULES.items():
            try:
                importlib.import_module(f"dtrades_fast.{module}")
                devices.add(device)
            except ModuleNotFoundError:
                problems[module] = _build_problem(module)
            except (ImportError, OSError) as failure:
                problems[module] = f"compiled, but does not load with torch {torch.__version__}: {failure}"
                if module != "_C":  # without _C there is a warning below
                    warnings.warn(
                        f"dtrades_fast.{module} does not load, so pure-PyTorch operators serve {device} tensors (same "
                        f"results, slower): {failure}",
                        RuntimeWarning,
                        stacklevel=2,
                    )
            if module == "_C" and device not in devices:  # the schemas live there
                break
    error = None
    if requested not in CHOICES:
        error = f"{VARIABLE}={requested!r} is not a backend; allowed are {', '.join(CHOICES)}"
    elif requested == "cpp" and "cpu" not in devices:
        error = f"{VARIABLE}=cpp, but the kernels are not available: {problems['_C']}"
    if (level := os.environ.get(SIMD_VARIABLE)) and level not in SIMD_CHOICES:
        error = f"{SIMD_VARIABLE}={level!r} is not a level; allowed are {', '.join(SIMD_CHOICES)}"
    name = "cpp" if devices else "reference"
    if name == "reference" and error is None:
        why = f"{VARIABLE}=reference" if requested == "reference" else problems["_C"]
        warnings.warn(
            f"dtrades_fast runs on its pure-PyTorch reference operators (same results, slower): {why}",
            RuntimeWarning,
            stacklevel=2,
        )
    return Backend(name, requested, frozenset(devices), problems, error)


BACKEND = _load()


def has_kernel(tensor: torch.Tensor) -> bool:
    """Whether a compiled kernel serves this tensor (else its twin does)."""
    if BACKEND.error is not None:
        raise BackendError(f"{BACKEND.error}. 'dtrades-fast doctor' shows what is available.")
    return tensor.device.type in BACKEND.devices


def needs_grad(*tensors: torch.Tensor) -> bool:
    """Whether autograd must record the call; without it the operator is called directly, which is 10 us faster.

    Under torch.func.vmap and grad a tensor hides whether the one it wraps needs a gradient, so there (and in compiled
    code, which cannot ask and where it is free) the answer is yes.
    """
    if not torch.is_grad_enabled():
        return False
    return torch.compiler.is_compiling() or any(x.requires_grad or is_functorch_wrapped_tensor(x) for x in tensors)


def simd_level() -> str:
    """The instruction set that the CPU kernels use, or why there is none."""
    if "cpu" not in BACKEND.devices:
        return "none (kernels not loaded)"
    return str(torch.ops.dtrades_fast.simd_level())


def register_vmap(name: str) -> Callable[[F], F]:
    """Register the vmap rule of ``dtrades_fast::name``, where the operator is compiled."""
    if BACKEND.name == "reference":
        return lambda function: function
    return torch.library.register_vmap(f"dtrades_fast::{name}")


def register_fake(name: str) -> Callable[[F], F]:
    """Register the shape function of ``dtrades_fast::name``, where the operator is compiled."""
    if BACKEND.name == "reference":
        return lambda function: function
    return torch.library.register_fake(f"dtrades_fast::{name}")
