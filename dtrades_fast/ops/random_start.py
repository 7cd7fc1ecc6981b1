"""Where an attack starts, as a pure function of the key and each sample's index."""

from __future__ import annotations

import torch
from torch import Tensor

from dtrades_fast.ops import _check, reference
from dtrades_fast.ops._library import has_kernel, register_fake

KINDS = ("linf", "l2", "gaussian")


def random_start(
    clean: Tensor,
    index: Tensor,
    kind: str,
    radius: float,
    key: int,
    lower: float = 0.0,
    upper: float = 1.0,
) -> Tensor:
    r"""Random starting point of an attack.

    .. math::
        \text{linf:}\quad & clip(x + r u),\ u_i \sim U[-1, 1) \\
        \text{l2:}\quad & clip(x + r\,v^{1/d} n / \|n\|_2),\ n_i \sim N(0, 1),\ v \sim U(0, 1] \\
        \text{gaussian:}\quad & x + r n \quad\text{(not projected and not clipped, as TRADES publishes it)}

    The numbers come from Philox4x32-10 with counter ``(block, draw, index)`` and the given key: element ``j`` of a
    sample (in [C, H, W] order, whatever the memory format) uses word ``j % 4`` of block ``j // 4``. They depend on
    neither batch split, threads, device nor what ran before.

    Args:
        clean: [N, ...] images ``x``; float32, float64, float16 or bfloat16, any strides.
        index: [N] int64, each sample's index in its data set, same device.
        kind: ``"linf"``, ``"l2"`` or ``"gaussian"``.
        radius: ``r`` in pixel units, >= 0: the ball's radius, or the standard deviation for ``"gaussian"``.
        key: the stream, an int in [0, 2**63), see :func:`dtrades_fast.rng.key`.
        lower, upper: the box of valid pixels.

    Returns:
        [N, ...] a new tensor with the dtype and memory format of ``clean``.

    Raises:
        TypeError: wrong dtype or type.
        ValueError: wrong shape, device, range or kind.

    Source: Madry et al. 2018 (uniform), Zhang et al. 2019 (0.001 Gaussian); Salmon et al. 2011 (Philox).
    """
    _check.images("clean", clean)
    _check.indices("index", index, "clean", clean)
    _check.one_of("kind", kind, KINDS)
    _check.number("radius", radius, 0)
    if not isinstance(key, int):
        raise TypeError(f"key must be an int, got {type(key).__name__}")
    if not 0 <= key < 2**63:
        raise ValueError(f"key must lie in [0, 2**63), got {key}")
    _check.interval("lower", lower, "upper", upper)
    implementation = torch.ops.dtrades_fast.random_start if has_kernel(clean) else reference.random_start
    with torch.no_grad():
        return implementation(clean, index, kind, radius, lower, upper, key)


@register_fake("random_start")
def _(clean: Tensor, index: Tensor, kind: str, radius: float, lower: float, upper: float, key: int) -> Tensor:
    return torch.empty_like(clean)
