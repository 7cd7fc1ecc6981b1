"""What an input gradient says about each sample: its norms and how far the attack is from its optimum."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dtrades_fast.ops import _check, reference
from dtrades_fast.ops._library import has_kernel, register_fake


class SampleStats(NamedTuple):
    """Per-sample figures, each [N]; float64 for float64 images, else float32."""

    l2: Tensor
    l1: Tensor
    linf: Tensor
    fosc: Tensor


def sample_stats(
    grad: Tensor, adv: Tensor, clean: Tensor, epsilon: float, lower: float = 0.0, upper: float = 1.0
) -> SampleStats:
    r"""Norms of the input gradient and the first-order stationary condition (FOSC), one read of each input.

    .. math::
        \|g\|_2,\ \|g\|_1,\ \|g\|_\infty,\qquad
        FOSC = \sum_i \max\bigl(g_i (hi_i - x'_i),\ g_i (lo_i - x'_i)\bigr)

    with ``hi = min(x + epsilon, upper)`` and ``lo = max(x - epsilon, lower)``: how far the linearised objective could
    still rise within the Linf ball and the box. 0 means that the attack has converged.

    Args:
        grad: [N, ...] gradient ``g`` of the objective at ``adv``; float32, float64, float16 or bfloat16, any strides
            (contiguous and channels_last without a copy).
        adv: [N, ...] adversarial images ``x'``; same shape, dtype, device.
        clean: [N, ...] images ``x``; same shape, dtype, device.
        epsilon: radius of the Linf ball in pixel units, >= 0.
        lower, upper: the box of valid pixels.

    Returns:
        :class:`SampleStats`, accumulated in float32 (squares in float64, so that norms neither vanish nor overflow).

    Raises:
        TypeError: wrong dtype or type.
        ValueError: shapes or devices differ, ``epsilon < 0``, ``lower > upper``.

    Source: FOSC of Wang et al. 2019 (Dynamic adversarial training), with the box taken into account.
    """
    _check.images("grad", grad)
    _check.same("adv", adv, "grad", grad)
    _check.same("clean", clean, "grad", grad)
    _check.number("epsilon", epsilon, 0)
    _check.interval("lower", lower, "upper", upper)
    implementation = torch.ops.dtrades_fast.sample_stats if has_kernel(grad) else reference.sample_stats
    return SampleStats(*implementation(grad, adv, clean, epsilon, lower, upper))


@register_fake("sample_stats")
def _(
    grad: Tensor, adv: Tensor, clean: Tensor, epsilon: float, lower: float, upper: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    row = grad.new_empty(grad.shape[0], dtype=reference.compute_dtype(grad.dtype))
    return row, torch.empty_like(row), torch.empty_like(row), torch.empty_like(row)
