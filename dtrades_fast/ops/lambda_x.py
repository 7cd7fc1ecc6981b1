"""The input-dependent weight of D-TRADES."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dtrades_fast.ops import _check, _vmap, reference
from dtrades_fast.ops._library import has_kernel, needs_grad, register_fake, register_vmap


class LambdaX(NamedTuple):
    """Per-sample weight and its two ingredients, each [N]; float64 for float64 inputs, else float32."""

    value: Tensor
    entropy: Tensor
    sensitivity: Tensor


def lambda_x(
    clean_logits: Tensor,
    grad: Tensor,
    alpha: float,
    beta: float,
    base: float = 0.0,
    minimum: float = -math.inf,
    maximum: float = math.inf,
) -> LambdaX:
    r"""The weight of each sample's robust term in D-TRADES.

    .. math::
        \lambda(x) = \mathrm{clip}\bigl(base + \alpha H(p) + \beta \|g\|_2,\ minimum,\ maximum\bigr),
        \qquad g = \nabla_{x'} KL(p \| p')

    Args:
        clean_logits: [N, C], ``p = softmax(clean_logits)``, entropy in nats; float32, float64, float16 or bfloat16.
        grad: [N, ...] input gradient of the per-sample KL in pixel space; same dtype and device as ``clean_logits``.
        alpha: weight of the entropy, at most ``ln C`` nats.
        beta: weight of the sensitivity ``‖g‖_2``.
        base: constant part; with ``alpha = beta = 0`` the result is exactly ``base``, which is TRADES.
        minimum, maximum: clipping, off by default.

    Returns:
        :class:`LambdaX`; ``value`` is differentiable in both tensors (once; the twin's formula again under
        ``create_graph``), ``entropy`` and ``sensitivity`` are figures for logging and carry no gradient.

    Raises:
        TypeError: wrong dtype or type, or dtypes differ.
        ValueError: wrong shape, number of samples, device or range.

    Source: the thesis that proposes D-TRADES, sections 6.2 to 6.4; ``base`` and clipping are additions.
    """
    _check.logits("clean_logits", clean_logits)
    _check.images("grad", grad)
    if grad.dtype != clean_logits.dtype:
        raise TypeError(f"grad must have the dtype of clean_logits, {clean_logits.dtype}, got {grad.dtype}")
    if grad.shape[0] != clean_logits.shape[0]:
        raise ValueError(
            f"grad must have one entry per row of clean_logits, {clean_logits.shape[0]}, got {list(grad.shape)}"
        )
    _check.on_device("grad", grad, "clean_logits", clean_logits)
    for name, value in (("alpha", alpha), ("beta", beta), ("base", base)):
        _check.number(name, value)
    _check.interval("minimum", minimum, "maximum", maximum)
    if has_kernel(clean_logits):
        call = _LambdaX.apply if needs_grad(clean_logits, grad) else torch.ops.dtrades_fast.lambda_x
        return LambdaX(*call(clean_logits, grad, alpha, beta, base, minimum, maximum))
    weight, entropy, sensitivity = reference.lambda_x(clean_logits, grad, alpha, beta, base, minimum, maximum)
    return LambdaX(weight, entropy.detach(), sensitivity.detach())


class _LambdaX(torch.autograd.Function):
    @staticmethod
    def forward(
        logits: Tensor, grad: Tensor, alpha: float, beta: float, base: float, minimum: float, maximum: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.dtrades_fast.lambda_x(logits, grad, alpha, beta, base, minimum, maximum)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        logits, grad, *settings = inputs
        ctx.settings = tuple(settings)
        ctx.save_for_backward(logits, grad)
        ctx.mark_non_differentiable(output[1], output[2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        logits, grad = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        return *reference.lambda_x_backward(grads[0], logits, grad, ctx.settings, wanted), *[None] * 5

    vmap = staticmethod(_vmap.rule(lambda *arguments: _LambdaX.apply(*arguments)))


@register_fake("lambda_x")
def _(logits: Tensor, grad: Tensor, *settings: float) -> tuple[Tensor, Tensor, Tensor]:
    row = logits.new_empty(logits.shape[0], dtype=reference.compute_dtype(logits.dtype))
    return row, torch.empty_like(row), torch.empty_like(row)


register_vmap("lambda_x")(_vmap.rule(lambda *arguments: torch.ops.dtrades_fast.lambda_x(*arguments)))
