"""One step of projected gradient ascent, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from dtrades_fast.ops import _check, reference
from dtrades_fast.ops._library import has_kernel, register_fake

NORMS = ("linf", "l2")


def pgd_step_(
    adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    step_size: float,
    epsilon: float,
    lower: float = 0.0,
    upper: float = 1.0,
    norm: str = "linf",
) -> Tensor:
    r"""Step along the gradient, project onto the ball around the clean image, clip to the box. In place.

    .. math::
        \text{Linf:}\quad & x' \leftarrow clip(clip(x' + s\,sign(g),\ x - \epsilon,\ x + \epsilon),\ lower,\ upper)\\
        \text{L2:}\quad & \delta = x' + s\,g / \|g\|_2 - x,\quad
        x' \leftarrow clip(x + \delta \min(1, \epsilon / \|\delta\|_2),\ lower,\ upper)

    A sample whose gradient is zero, or so small that ``s / ‖g‖_2`` overflows, does not move in L2;
    ``sign(0) = 0``; NaN in the gradient gives NaN pixels, so that it shows. No host synchronisation.

    Args:
        adv: [N, ...] images ``x'``, overwritten; float32, float64, float16 or bfloat16, any dense strides.
        grad: [N, ...] ascent direction ``g``; same shape, dtype, device.
        clean: [N, ...] images ``x``; same shape, dtype, device.
        step_size: ``s`` in pixel units, >= 0.
        epsilon: radius of the ball in pixel units, >= 0.
        lower, upper: the box of valid pixels.
        norm: ``"linf"`` or ``"l2"``.

    Returns:
        ``adv``.

    Raises:
        TypeError: wrong dtype or type.
        ValueError: shapes or devices differ, a number out of range, unknown norm, or ``adv`` needs a gradient.

    Source: Madry et al. 2018.
    """
    _check.images("adv", adv)
    _check.same("grad", grad, "adv", adv)
    _check.same("clean", clean, "adv", adv)
    _check.number("step_size", step_size, 0)
    _check.number("epsilon", epsilon, 0)
    _check.interval("lower", lower, "upper", upper)
    _check.one_of("norm", norm, NORMS)
    if adv.requires_grad and torch.is_grad_enabled():
        raise ValueError("adv must not require a gradient here: it is changed in place (use torch.no_grad())")
    with torch.no_grad():
        implementation = torch.ops.dtrades_fast.pgd_step_ if has_kernel(adv) else reference.pgd_step_
        implementation(adv, grad, clean, step_size, epsilon, lower, upper, norm)
    torch.autograd.graph.increment_version(adv)  # autograd does not see what a kernel writes
    return adv


@register_fake("pgd_step_")
def _(
    adv: Tensor, grad: Tensor, clean: Tensor, step_size: float, epsilon: float, lower: float, upper: float, norm: str
) -> None:
    return None
