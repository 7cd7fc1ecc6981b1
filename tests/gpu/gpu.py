"""Where these tests run, and why they do not."""

from __future__ import annotations

import os

import pytest
import torch

from dtrades_fast.ops import BACKEND

#: ``GPU_TESTS_DEVICE=cpu`` rehearses what can be rehearsed there, so that the tests themselves stay in working order.
DEVICE = os.environ.get("GPU_TESTS_DEVICE", "cuda")


def require() -> None:
    """Skip the calling module where there is no GPU, or where its kernels are missing."""
    if DEVICE == "cpu":
        return
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device", allow_module_level=True)
    if "cuda" not in BACKEND.devices:
        why = BACKEND.problems.get("_C_cuda", BACKEND.name)
        pytest.skip(f"needs the CUDA kernels: {why}", allow_module_level=True)


#: on a test that cannot be rehearsed
cuda_only = pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device, this is a rehearsal")
