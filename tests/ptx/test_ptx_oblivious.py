"""No kernel's memory accesses, barriers or shuffles depend on its data, on any architecture; what does so is found."""

from __future__ import annotations

import compiler
import pytest
from engine import library
from oblivious import findings
from parser import Module

pytestmark = pytest.mark.nvcc


@pytest.mark.parametrize("arch", compiler.ARCHITECTURES)
def test_kernels_are_oblivious(arch: int) -> None:
    kernels = [library(arch).kernel(name) for name in library(arch).names()]
    if arch != 80:
        known = {library(80).kernel(name).code for name in library(80).names()}
        kernels = [kernel for kernel in kernels if kernel.code not in known]
    for kernel in kernels:
        assert not findings(kernel), f"{kernel.name}: {', '.join(map(str, findings(kernel)))}"


NEGATIVE = """
__global__ void gather(const float* x, const long long* labels, float* y) {
  y[threadIdx.x] = x[labels[threadIdx.x]];
}
__global__ void barrier(const float* x, float* y) {
  if (x[threadIdx.x] > 0) __syncthreads();
  y[threadIdx.x] = x[0];
}
__global__ void guarded_store(const float* x, float* y) {
  if (x[threadIdx.x] > 0) y[threadIdx.x] = 1;
}
__global__ void loop(const float* x, float* y) {
  float sum = 0;
  for (float i = 0; i < x[0]; ++i) sum += sqrtf(i);
  y[threadIdx.x] = sum;
}
__global__ void lane(const int* x, int* y) {
  y[threadIdx.x] = __shfl_xor_sync(0xFFFFFFFFu, 1, x[0]);
}
__global__ void address_by_branch(const float* x, float* y) {
  int i = 0;
  if (x[threadIdx.x] > 0) i = static_cast<int>(logf(static_cast<float>(clock())));
  y[i] = 1;
}
"""


@pytest.fixture(scope="module")
def negative(tmp_path_factory: pytest.TempPathFactory) -> Module:
    source = tmp_path_factory.mktemp("oblivious")
    (source / "cuda").mkdir()
    (source / "cuda" / "negative.cu").write_text(NEGATIVE)
    return Module(compiler.ptx("negative", 80, source).read_text())


@pytest.mark.parametrize(
    ("kernel", "what"),
    [
        ("gather", "an address"),
        ("barrier", "a branch"),
        ("guarded_store", "a branch"),
        ("loop", "a branch"),
        ("lane", "a shuffled lane"),
        ("address_by_branch", "an address"),
    ],
)
def test_dependence_on_data_is_found(kernel: str, what: str, negative: Module) -> None:
    (name,) = [name for name in negative.names() if kernel in name]
    assert what in {finding.what for finding in findings(negative.kernel(name))}
