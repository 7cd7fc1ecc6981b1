"""docs/gpu-evidence.md is what a new run would write."""

import evidence
import pytest
from compiler import cuda_toolkit, toolkit

pytestmark = pytest.mark.nvcc


def test_document_is_current() -> None:
    text = evidence.DOCUMENT.read_text()
    made_with = ".".join(map(str, cuda_toolkit.toolkit_version(toolkit())))
    if f"compiler of CUDA {made_with}." not in text:
        pytest.skip(f"the document was made by another compiler than that of CUDA {made_with}")
    assert evidence.document() == text, "run 'make gpu-evidence'"
