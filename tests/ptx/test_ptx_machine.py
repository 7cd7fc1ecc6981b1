"""The machine itself: what it computes, and that it reports what it is there to report. Needs no nvcc."""

from __future__ import annotations

import ctypes
import ctypes.util

import numpy as np
import pytest
from arithmetic import SEMANTICS
from counters import Counters
from emulator import Launch
from instructions import Program
from machine import run_launch
from memory import Memory
from parser import Module, PTXError

TEMPLATE = """
.version 9.0
.target sm_80
.address_size 64
.visible .entry kernel(
	.param .u64 kernel_param_0
)
.maxntid 64, 1, 1
{
	.reg .pred 	%p<9>;
	.reg .f32 	%f<9>;
	.reg .b32 	%r<9>;
	.reg .b64 	%rd<9>;
	.shared .align 4 .b8 shared[256];
	ld.param.u64 	%rd1, [kernel_param_0];
	cvta.to.global.u64 	%rd2, %rd1;
	mov.u32 	%r1, %tid.x;
	mul.wide.u32 	%rd3, %r1, 4;
	add.s64 	%rd4, %rd2, %rd3;
	mov.u32 	%r2, shared;
	shl.b32 	%r3, %r1, 2;
	add.s32 	%r4, %r2, %r3;
	mov.u32 	%r5, %ctaid.x;
	BODY
	ret;

}

"""


def execute(body: str, content: np.ndarray | None, blocks: int = 1, size: int = 256, **options: object) -> np.ndarray:
    """64 threads a block with %rd2: the buffer, %rd4: each thread's word of it, %r4: its word of shared memory."""
    text = TEMPLATE.replace("BODY", body.strip().replace("; ", ";\n\t").replace(": ", ":\n\t"))
    memory = Memory(32, [size])
    if content is not None:
        memory.fill(0, content)
    pointer = memory.address(0).to_bytes(8, "little")
    launch = Launch("kernel", (blocks, 1), 64, 0, (pointer,))
    run_launch(Program(Module(text).kernel("kernel")), launch, memory, **options)
    return memory.data[memory.content(0)].view(np.uint32)


WORDS = np.arange(64, dtype=np.uint32)


def test_threads_exchange_through_shared_memory() -> None:
    body = "st.shared.u32 [%r4], %r1; bar.sync 0; xor.b32 %r6, %r3, 128; add.s32 %r7, %r2, %r6; "
    body += "ld.shared.u32 %r8, [%r7]; st.global.u32 [%rd4], %r8;"
    assert (execute(body, None) == WORDS ^ 32).all()


def test_lanes_exchange_through_shuffles_after_they_parted() -> None:
    body = "setp.lt.u32 %p1, %r1, 7; mov.u32 %r6, %r1; @%p1 bra $L; add.s32 %r6, %r6, 100; $L: "
    body += "shfl.sync.bfly.b32 %r7|%p2, %r6, 1, 31, -1; st.global.u32 [%rd4], %r7;"
    mine = np.where(WORDS < 7, WORDS, WORDS + 100)
    assert (execute(body, None) == mine[WORDS ^ 1]).all()


def test_parameters_are_found_by_an_address_in_a_register() -> None:
    body = "mov.b64 %rd5, kernel_param_0; add.s64 %rd6, %rd5, 8; ld.param.u64 %rd7, [%rd6+-8]; "
    body += "cvta.to.global.u64 %rd8, %rd7; add.s64 %rd8, %rd8, %rd3; st.global.u32 [%rd8], %r1;"
    assert (execute(body, None) == WORDS).all()
    with pytest.raises(PTXError, match="an address of a parameter is replaced"):
        execute(body.replace("ld.param", "add.s64 %rd6, %rd6, %rd3; ld.param"), None)


REPORTS = {
    "out of bounds": "ld.global.u32 %r6, [%rd4+4];",
    "4 bytes at 0 of 0": "ld.global.u32 %r6, [%rd3];",  # a null pointer
    "no array has this address": "add.s64 %rd5, %rd4, 68719476736; ld.global.u32 %r6, [%rd5];",
    "misaligned access to 16 bytes": "ld.global.v4.u32 {%r6, %r7, %r8, %r3}, [%rd2+8];",
    "uninitialised memory is read": "ld.shared.u32 %r6, [%r4];",
    "a register that was never written is used": "st.global.u32 [%rd4], %r6;",
    "a shuffle beyond the warp": "shfl.sync.bfly.b32 %r6|%p1, %r1, 32, 31, -1;",
    "a shuffle of less than a warp": "shfl.sync.bfly.b32 %r6|%p1, %r1, 1, 7, -1;",
    "two writes at once": "st.global.u32 [%rd2], %r1;",
    "a write after a read": "ld.global.u32 %r6, [%rd2]; st.global.u32 [%rd4], %r6;",
    "an access after a write": "st.shared.u32 [%r4], %r1; ld.shared.u32 %r6, [%r2];",
    "wait for others": "setp.lt.u32 %p1, %r1, 32; @%p1 bra $L; bar.sync 0; $L:",
    "unknown instruction": "vote.sync.ballot.b32 %r6, %p1, -1;",
}


@pytest.mark.parametrize("report", REPORTS)
def test_reports(report: str) -> None:
    with pytest.raises(PTXError, match=report):
        execute(REPORTS[report], WORDS)


@pytest.mark.parametrize("blocks", [1, 2])
def test_blocks_race_with_each_other_alone(blocks: int) -> None:
    body = "add.s32 %r6, %r1, %r5; st.global.u32 [%rd4], %r6;"
    if blocks == 1:
        assert (execute(body, None) == WORDS).all()
    else:
        with pytest.raises(PTXError, match="data race"):
            execute(body, None, blocks)


def test_unknown_values_may_be_computed_with_where_they_do_not_matter() -> None:
    body = "setp.lt.u32 %p1, %r1, 64; add.s32 %r6, %r7, 1; selp.b32 %r8, %r1, %r6, %p1; st.global.u32 [%rd4], %r8;"
    assert (execute(body, None) == WORDS).all()
    with pytest.raises(PTXError, match="never written"):
        execute(body.replace("64", "63"), None)


def test_counters() -> None:
    counters = Counters()
    body = "ld.global.u32 %r6, [%rd4]; shl.b32 %r7, %r3, 1; and.b32 %r7, %r7, 255; add.s32 %r8, %r2, %r7; "
    body += "setp.lt.u32 %p1, %r1, 32; @!%p1 bra $L; st.shared.u32 [%r8], %r6; $L:"
    execute(body, WORDS, counters=counters)
    assert counters.requests == {"global load": 2, "shared store": 1}
    assert counters.sectors == {"global load": 8}
    assert counters.bytes == {"global load": 256, "shared store": 128}
    assert counters.bank_conflicts == 1  # two words of every second bank
    assert counters.by_mnemonic["st.shared.u32"] == 1
    assert counters.by_mnemonic["ld.global.u32"] == 2


# ---- arithmetic ----------------------------------------------------------------------------------------------------


def patterns(dtype: type, count: int, seed: int) -> list[np.ndarray]:
    """Three operands: any bits; ordinary numbers; and ones whose product and sum almost cancel or almost vanish."""
    rng = np.random.default_rng(seed)
    bits = [rng.integers(0, 256, count * dtype().itemsize, dtype=np.uint8).view(dtype) for _ in range(3)]
    a, b, c = (rng.standard_normal(count).astype(dtype) for _ in range(3))
    eps = np.finfo(dtype).eps
    near = -(a * b) * (1 + rng.integers(-2, 3, count).astype(dtype) * eps / 2).astype(dtype)
    tiny = dtype(np.sqrt(np.finfo(dtype).tiny))
    sets = [bits, [a, b, c], [a, b, near], [a * tiny, b * tiny, c * np.finfo(dtype).tiny]]
    return [np.concatenate(columns) for columns in zip(*sets, strict=True)]


@pytest.mark.parametrize(
    ("mnemonic", "dtype", "name"), [("fma.rn.f32", np.float32, "fmaf"), ("fma.rn.f64", np.float64, "fma")]
)
def test_fma_is_rounded_once(mnemonic: str, dtype: type, name: str) -> None:
    with np.errstate(all="ignore"):
        operands = patterns(dtype, 2000, 0)
        actual = SEMANTICS[mnemonic].function(*operands)
    function = getattr(ctypes.CDLL(ctypes.util.find_library("m")), name)
    function.restype = {4: ctypes.c_float, 8: ctypes.c_double}[dtype().itemsize]
    function.argtypes = [function.restype] * 3
    expected = np.array([function(*x) for x in zip(*operands, strict=True)], dtype)
    np.testing.assert_array_equal(actual, expected)
    assert (np.signbit(actual) == np.signbit(expected))[~np.isnan(expected)].all()


@pytest.mark.parametrize(
    ("mnemonic", "operands", "result"),
    [
        ("fma.rm.f32", (np.float32(1), np.float32(1), np.float32(-1e-20)), np.nextafter(np.float32(1), np.float32(0))),
        ("fma.rm.f32", (np.float32(1), np.float32(1), np.float32(1e-20)), np.float32(1)),
        ("max.f32", (np.float32(np.nan), np.float32(1)), np.float32(1)),
        ("setp.gt.f32", (np.float32(np.nan), np.float32(1)), False),
        ("setp.leu.f32", (np.float32(np.nan), np.float32(1)), True),
        ("cvt.sat.f32.f32", (np.float32(np.nan),), np.float32(0)),
        ("ex2.approx.ftz.f32", (np.float32(-127),), np.float32(0)),
        ("shr.s32", (np.int32(-8), np.uint32(40)), np.int32(-1)),
        ("shl.b32", (np.uint32(1), np.uint32(32)), np.uint32(0)),
        ("mul.wide.u32", (np.uint32(2**31), np.uint32(6)), np.uint64(3 * 2**32)),
        ("cvt.s64.s32", (np.int32(-1),), np.int64(-1)),
        ("cvt.rn.f16.f32", (np.float32(1 + 2**-11),), np.uint16(0x3C00)),
        ("cvt.rn.bf16.f32", (np.float32(1 + 3 * 2**-8),), np.uint16(0x3F82)),
    ],
)
def test_arithmetic(mnemonic: str, operands: tuple, result: object) -> None:
    with np.errstate(all="ignore"):
        actual = SEMANTICS[mnemonic].function(*map(np.atleast_1d, operands))
    np.testing.assert_array_equal(actual, [result])
