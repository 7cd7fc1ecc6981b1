"""What only a GPU shows of the kernels: the bits of another device, streams, and sizes beyond 32 bits."""

from __future__ import annotations

import gpu
import pytest
import torch
from helpers import BATCH, F16, assert_same_bits, each_dtype, normal, uniform

from dtrades_fast import ops

gpu.require()
pytestmark = gpu.cuda_only


@each_dtype
def test_elementwise_kernels_have_the_bits_of_the_cpu(dtype):
    clean, noise = uniform((BATCH, 3, 5, 7), dtype, 1), normal((BATCH, 3, 5, 7), dtype, 2)
    index = torch.arange(BATCH) * 3 + 5
    start = ops.random_start(clean, index, "linf", 0.03, 77)
    assert_same_bits(ops.random_start(clean.cuda(), index.cuda(), "linf", 0.03, 77).cpu(), start)
    moved = ops.pgd_step_(start.clone(), noise, clean, 0.01, 0.03)
    assert_same_bits(ops.pgd_step_(start.cuda(), noise.cuda(), clean.cuda(), 0.01, 0.03).cpu(), moved)


@pytest.mark.parametrize("classes", [10, 70])
@each_dtype
def test_wrong_labels_give_nan_in_their_rows_alone(dtype, classes):
    logits, labels = normal((BATCH, classes), dtype, 1).cuda(), torch.arange(BATCH).cuda() % classes
    wrong = labels.clone()
    wrong[3], wrong[8] = classes, -1
    rest = [i for i in range(BATCH) if i not in (3, 8)]
    for function in (
        lambda y: (ops.logit_grad_ce(logits, y),),
        lambda y: ops.ce_loss(logits, y),
        lambda y: ops.trades_loss(logits, logits, y, base=6.0),
        lambda y: ops.mart_loss(logits, logits, y, 5.0),
    ):
        for good, bad in zip(function(labels), function(wrong), strict=True):
            assert bad[[3, 8]].isnan().all()
            assert_same_bits(bad[rest], good[rest])


def test_work_is_done_on_the_current_stream():
    """The step waits for a gradient that is still being computed on its stream, and only there."""
    clean = torch.zeros(1 << 20, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        grad = torch.zeros_like(clean)
        torch.cuda._sleep(100_000_000)
        grad += 1
        adv = ops.pgd_step_(clean.clone(), grad, clean, 0.25, 0.5)
    stream.synchronize()
    assert (adv == 0.25).all()


LARGE = 2**31 + 5


def needs_memory(gib):
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of free GPU memory, there are {free:.1f}")


def test_large_pgd_step():
    needs_memory(14)
    clean = torch.zeros(LARGE, dtype=F16, device="cuda")
    adv, grad = clean.clone(), torch.ones_like(clean)
    grad[-3:] = -1  # beyond what 32 bits count
    ops.pgd_step_(adv, grad, clean, 0.25, 0.5)
    assert (adv[-3:] == 0).all()
    assert adv[:-3].amin() == adv.amax() == 0.25


def test_large_rows():
    needs_memory(14)
    rows = LARGE // 8 + 1
    clean, adv = (torch.zeros(rows, 8, dtype=F16, device="cuda") for _ in range(2))
    clean[-1, 0] = 4
    entropy, kl = ops.entropy_kl(clean, adv)
    few = ops.entropy_kl(clean[-2:].clone(), adv[-2:].clone())
    assert_same_bits((entropy[-2:].cpu(), kl[-2:].cpu()), tuple(x.cpu() for x in few))
    assert entropy[:-1].amin() == entropy[:-1].amax()
    assert kl[-1] > 0


@each_dtype
def test_more_samples_than_blocks(dtype):
    """A block per sample, and more samples than a grid has blocks in its second dimension."""
    clean, grad = (torch.rand(70_000, 3, device="cuda").to(dtype) for _ in range(2))
    stats, few = ops.sample_stats(grad, clean, clean, 0.1), slice(69_990, None)
    assert_same_bits(tuple(x[few] for x in stats), tuple(ops.sample_stats(grad[few], clean[few], clean[few], 0.1)))
