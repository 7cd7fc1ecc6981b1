"""Bugs that the emulator must catch, as substitutions in a copy of ``csrc``.

Each names the launch that shows it and, for every build that has to catch it, a pattern of the report; WRONG stands for
results that the oracle refuses.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import cases
from builds import build, changed_sources
from emulator import EmulatorError
from helpers import F32
from kernels import Kernels

WRONG = "wrong result"


@dataclass(frozen=True)
class Bug:
    name: str
    file: str
    old: str
    new: str
    operator: str
    size: tuple[int, int]  # samples and their size, or rows and classes
    caught_by: dict[str, str]  # build -> what its report must match
    options: dict[str, object] = field(default_factory=dict)  # of the launch

    def program(self, kind: str, folder: Path) -> Path:
        source = changed_sources(folder, self.file, self.old, self.new)
        return build(kind, operators=[self.operator], dtypes=["float32"], source=source)

    def outcome(self, program: Path) -> str | None:
        """What shows that something is wrong; None if nothing does."""
        check: Callable[..., object] = cases.CHECKS[self.operator]
        try:
            check(Kernels(build=program, **self.options), *self.size, F32)
        except EmulatorError as error:
            return str(error)
        except AssertionError:
            return WRONG
        return None


def headline(report: str) -> str:
    """What happened, without where: a phrase of the first line that says so."""
    found = re.search(r"(?:ERROR: \w+: |WARNING: ThreadSanitizer: |runtime error: |, thread \d+: )(.*)", report)
    return re.sub(r" (?:on address|address 0x|\(pid|for type).*", "", found[1]) if found else report.strip()


REDUCE, ROWS, ELEMENTS = "cuda/reduce.cuh", "cuda/rows.cuh", "cuda/elements.cuh"
READ_PARTIAL = "    DTF_UNROLL for (int i = 0; i < n; ++i) x[i] = partial[i * warps + lane % warps];\n"

BUGS = (
    Bug(
        "no barrier before shared memory is used again",
        REDUCE,
        "    __syncthreads();  // what an earlier call left here has been read\n",
        "",
        "pgd_step",
        (2, 3072),
        {"plain": WRONG, "tsan": "data race"},
        {"schedule": "greedy"},
    ),
    Bug(
        "no barrier where the next sample is shared out differently",
        "cuda/pgd_step.cuh",
        "for_elements<T>(k.size, all_aligned, threadIdx.x, Block::threads, f);",
        "for_elements<T>(k.size, all_aligned, (threadIdx.x + 32 * sample) % Block::threads, Block::threads, f);",
        "pgd_step",
        (2, 2049),
        {"plain": WRONG, "tsan": "data race"},
        {"schedule": "greedy", "max_blocks": 1},
    ),
    Bug(
        "no barrier between write and read",
        REDUCE,
        "    __syncthreads();\n" + READ_PARTIAL,
        READ_PARTIAL,
        "sample_stats",
        (2, 3072),
        {"plain": WRONG, "tsan": "data race"},
    ),
    Bug(
        "a barrier that one warp does not reach",
        REDUCE,
        "    __syncthreads();\n" + READ_PARTIAL,
        "    if (warp != 0) __syncthreads();\n" + READ_PARTIAL,
        "lambda_x",
        (2, 100),
        {"plain": "divergent barrier"},
    ),
    Bug(
        "warps that wait at different barriers",
        REDUCE,
        "    __syncthreads();\n" + READ_PARTIAL,
        "    if (warp != 0)\n      __syncthreads();\n    else\n      __syncthreads();\n" + READ_PARTIAL,
        "lambda_x",
        (2, 100),
        {"plain": "divergent barrier"},
    ),
    Bug(
        "return before a reduction",
        ROWS,
        "    body(first + group, first + group < rows);",
        "    if (first + group < rows) body(first + group, true);",
        "entropy_kl",
        (17, 10),
        {"plain": "not all lanes take part in a shuffle"},
    ),
    Bug(
        "a shuffle beyond the warp",
        REDUCE,
        "constexpr int width = lanes < kWarp ? lanes : kWarp;",
        "constexpr int width = lanes;",
        "sample_stats",
        (1, 64),
        {"plain": "a shuffle beyond the warp"},
    ),
    Bug(
        "a step through shared memory within a warp, without __syncwarp",
        REDUCE,
        READ_PARTIAL
        + "    DTF_UNROLL for (int offset = warps / 2; offset > 0; offset /= 2) "
        + "DTF_UNROLL for (int i = 0; i < n; ++i) x[i] =\n        combine(x[i], shuffle_xor(x[i], offset));\n",
        "    for (int offset = warps / 2; offset > 0; offset /= 2)\n"
        "      for (V* p = partial; p < partial + n * warps; p += warps)\n"
        "        if (warp == 0 && lane < offset) p[lane] = combine(p[lane], p[lane + offset]);\n"
        "    __syncthreads();\n"
        "    for (int i = 0; i < n; ++i) x[i] = partial[i * warps];\n",
        "sample_stats",
        (2, 3072),
        {"plain": WRONG, "tsan": "data race"},
    ),
    Bug(
        "one element too many in global memory",
        ELEMENTS,
        "if (last < size) f(last, Single<T>{});",
        "if (last <= size) f(last, Single<T>{});",
        "sample_stats",
        (1, 257),
        {"asan": "heap-buffer-overflow"},
    ),
    Bug(
        "one element too few of dynamic shared memory",
        "cuda/pgd_step.cuh",
        "k.size * static_cast<int64_t>(sizeof(Compute<T>)) : 0;",
        "(k.size - 1) * static_cast<int64_t>(sizeof(Compute<T>)) : 0;",
        "pgd_step",
        (2, 100),
        {"asan": "use-after-poison"},
    ),
    Bug(
        "more shared memory than a block may have",
        "cuda/launch.cuh",
        "kMaxSharedBytes = 47 * 1024;",
        "kMaxSharedBytes = 48 * 1024;",  # but the reductions need some too
        "pgd_step",
        (1, 12288),
        {"plain": "more than 48 KiB"},
    ),
    Bug(
        "more threads than a block may have",
        ELEMENTS,
        "f(SampleBlock<1024>{});",
        "f(SampleBlock<2048>{});",
        "sample_stats",
        (1, 16385),
        {"plain": "a block of 2048 threads"},
    ),
    Bug(
        "vector access to any address",
        ELEMENTS,
        "  return ((reinterpret_cast<uintptr_t>(pointers) | ...) & 15) == 0;\n",
        "  return sizeof...(pointers) > 0;\n",
        "sample_stats",
        (2, 64),
        {"asan": "misaligned address"},
        {"shift": 1},
    ),
    Bug(
        "a sum that several blocks add to",
        "cuda/sample_stats.cuh",
        "      k.l1[sample] = sum[0];\n",
        "      k.l1[sample] = sum[0];\n      k.l1[0] = k.l1[0] + 0 * sum[0];\n",
        "sample_stats",
        (3, 64),
        {"tsan": "data race"},
    ),
)
