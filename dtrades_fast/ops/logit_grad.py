"""d(objective)/d(logits) in closed form: what an attack feeds back into the network instead of building a loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dtrades_fast.ops import _check, _vmap, reference
from dtrades_fast.ops._library import has_kernel, needs_grad, register_fake, register_vmap


def logit_grad_kl(adv_logits: Tensor, clean_log_probs: Tensor) -> Tensor:
    r"""Gradient of :math:`\sum_i KL(p_i \| p'_i)` with respect to the adversarial logits: ``p' - p``.

    Args:
        adv_logits: [N, C], ``p' = softmax(adv_logits)``; float32, float64, float16 or bfloat16, any strides.
        clean_log_probs: [N, C], ``log p``, e.g. ``clean_logits.log_softmax(-1)``; same dtype and device.

    Returns:
        [N, C] in the dtype of ``adv_logits``, computed in float32 (float64 for float64). Differentiable in both.

    Raises:
        TypeError: not a floating-point tensor, or the dtypes differ.
        ValueError: not [N, C] with C >= 1, or shapes or devices differ.

    Source: the inner maximisation of TRADES (Zhang et al. 2019), differentiated by hand.
    """
    _check.logits("adv_logits", adv_logits)
    _check.same("clean_log_probs", clean_log_probs, "adv_logits", adv_logits)
    if not has_kernel(adv_logits):
        return reference.logit_grad_kl(adv_logits, clean_log_probs)
    call = _LogitGradKL.apply if needs_grad(adv_logits, clean_log_probs) else torch.ops.dtrades_fast.logit_grad_kl
    return call(adv_logits, clean_log_probs)


def logit_grad_ce(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Gradient of :math:`\sum_i CE(z_i, y_i)` with respect to the logits: ``softmax(z) - onehot(y)``.

    Args:
        logits: [N, C], float32, float64, float16 or bfloat16, any strides.
        labels: [N], int64 in 0..C-1, same device. A label out of range raises on the CPU in eager mode; where a check
            would synchronise or break a graph (CUDA, compiled code, vmap) its row becomes NaN.

    Returns:
        [N, C] in the dtype of ``logits``, computed in float32 (float64 for float64). Differentiable in ``logits``.

    Raises:
        TypeError: ``logits`` not floating-point or ``labels`` not int64.
        ValueError: wrong shape, device or label.

    Source: the inner maximisation of PGD adversarial training (Madry et al. 2018), differentiated by hand.
    """
    _check.logits("logits", logits)
    _check.labels("labels", labels, "logits", logits)
    if not has_kernel(logits):
        return reference.logit_grad_ce(logits, labels)
    call = _LogitGradCE.apply if needs_grad(logits) else torch.ops.dtrades_fast.logit_grad_ce
    return call(logits, labels)


class _LogitGradKL(torch.autograd.Function):
    @staticmethod
    def forward(adv: Tensor, log_p: Tensor) -> Tensor:
        return torch.ops.dtrades_fast.logit_grad_kl(adv, log_p)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        adv, log_p = ctx.saved_tensors
        return reference.softmax_backward(grads[0], adv), reference.exp_backward(-grads[0], log_p)

    vmap = staticmethod(_vmap.rule(lambda *arguments: _LogitGradKL.apply(*arguments)))


class _LogitGradCE(torch.autograd.Function):
    @staticmethod
    def forward(logits: Tensor, labels: Tensor) -> Tensor:
        return torch.ops.dtrades_fast.logit_grad_ce(logits, labels)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return reference.softmax_backward(grads[0], ctx.saved_tensors[0]), None

    vmap = staticmethod(_vmap.rule(lambda *arguments: _LogitGradCE.apply(*arguments)))


@register_fake("logit_grad_kl")
@register_fake("logit_grad_ce")
def _(logits: Tensor, other: Tensor) -> Tensor:
    return logits.new_empty(logits.shape)


register_vmap("logit_grad_kl")(_vmap.rule(lambda *arguments: torch.ops.dtrades_fast.logit_grad_kl(*arguments)))
register_vmap("logit_grad_ce")(_vmap.rule(lambda *arguments: torch.ops.dtrades_fast.logit_grad_ce(*arguments)))
