"""Named ranges of a training step for a profiler to show: ``with span("forward"): ...``.

In an ordinary run nobody listens, and a span is one shared object that does nothing. Under a tool that injects itself
into NVTX (Nsight Systems, Nsight Compute) the spans are NVTX ranges of the domain ``dtrades_fast``; :func:`enable`
sends them elsewhere, for example to torch.profiler. Code that is being compiled or exported never sees a span.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["DOMAIN", "disable", "enable", "listening", "nvtx_range", "span"]

DOMAIN = "dtrades_fast"
#: Set in a process that is run by a profiler: by ``nsys profile``, and for any library that wants NVTX ranges.
LISTENERS = ("NSYS_PROFILING_SESSION_ID", "NVTX_INJECTION64_PATH")

#: Makes the range of a name; entering and leaving it are its begin and end.
Range = Callable[[str], AbstractContextManager[object]]

_SILENCE = nullcontext()
_range: Range | None = None


def span(name: str, number: int | None = None) -> AbstractContextManager[object]:
    """The range ``"name"`` or ``"name number"``; the text is put together only if somebody listens."""
    if _range is None or torch.compiler.is_compiling():
        return _SILENCE
    return _range(name if number is None else f"{name} {number}")


def listening() -> bool:
    """Whether a tool that takes NVTX ranges runs this process."""
    return any(os.environ.get(name) for name in LISTENERS)


def nvtx_range(name: str) -> AbstractContextManager[object]:
    """An NVTX range of this package's domain."""
    import nvtx

    return nvtx.annotate(name, domain=DOMAIN)


def enable(kind: Range = nvtx_range) -> None:
    """Send spans to a profiler from now on, for example ``enable(torch.profiler.record_function)``."""
    global _range
    _range = kind


def disable() -> None:
    global _range
    _range = None


if listening():
    enable()
