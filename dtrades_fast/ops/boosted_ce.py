"""MART's boosted cross-entropy, its value and gradient in one pass over the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dtrades_fast.ops import _check, _vmap, reference
from dtrades_fast.ops._library import has_kernel, needs_grad, register_fake, register_vmap

#: Between 0 and this a slack could not be told from 0 in float32.
_SMALLEST_SLACK = 1e-30


def boosted_ce(logits: Tensor, labels: Tensor, slack: float = 0.0) -> Tensor:
    r"""Boosted cross-entropy of each row, with ``p = softmax(logits)`` and k the most probable class other than y.

    .. math::
        BCE = -\log p_y - \log(1 - p_k + slack), \qquad k = \arg\max_{c \ne y} p_c

    :math:`1 - p_k = \sum_{c \ne k} p_c` is summed over the classes other than k, so nothing cancels however close
    :math:`p_k` is to 1: without slack the loss is exact at any gap between the logits. Of equal classes k is the first;
    with a single class there is none and the second term is ``-log(1 + slack)``. ``p_y = 0`` gives +inf, NaN stays NaN.
    Differentiable in ``logits``, twice:

    .. math::
        \frac{dBCE}{dz_c} = p_c - [c = y] + s\, p_k \left([c = k] - [c \ne k] \frac{p_c}{1 - p_k}\right),
        \qquad s = \frac{1 - p_k}{1 - p_k + slack}

    Args:
        logits: [N, C], float32, float64, float16 or bfloat16, any strides.
        labels: [N], int64 in 0..C-1, same device. A label out of range raises on the CPU in eager mode; where a check
            would synchronise or break a graph (CUDA, compiled code, vmap) its loss and gradient become NaN.
        slack: 0, or at least 1e-30. The published implementation has ``1e-4 + 1e-12``, for which the second term cannot
            exceed 9.2.

    Returns:
        [N] in nats, computed in float32 (float64 for float64). A row's loss depends on that row alone, bit for bit.

    Raises:
        TypeError: ``logits`` not floating-point, ``labels`` not int64 or ``slack`` not a Python number.
        ValueError: wrong shape, device, label or slack.

    Source: Wang et al. 2020, Improving Adversarial Robustness Requires Revisiting Misclassified Examples, eq. 9.
    """
    _check.logits("logits", logits)
    _check.labels("labels", labels, "logits", logits)
    _check.number("slack", slack, 0)
    if 0 < slack < _SMALLEST_SLACK:
        raise ValueError(f"slack must be 0 or at least {_SMALLEST_SLACK:g}, got {slack}")
    if not has_kernel(logits):
        return reference.boosted_ce(logits, labels, slack)
    call = _BoostedCE.apply if needs_grad(logits) else torch.ops.dtrades_fast.boosted_ce
    loss: Tensor = call(logits, labels, slack)[0]
    return loss


class _BoostedCE(torch.autograd.Function):
    @staticmethod
    def forward(logits: Tensor, labels: Tensor, slack: float) -> tuple[Tensor, Tensor]:
        return torch.ops.dtrades_fast.boosted_ce(logits, labels, slack)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        logits, labels, ctx.slack = inputs
        ctx.save_for_backward(logits, labels, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        logits, labels, grad = ctx.saved_tensors
        if grads[0] is None:
            return None, None, None
        if torch.is_grad_enabled():  # create_graph: the twin's formula can be differentiated again
            return reference.boosted_ce_backward(grads[0], logits, labels, ctx.slack), None, None
        return (grads[0][:, None] * grad).to(grad.dtype), None, None

    vmap = staticmethod(_vmap.rule(lambda *arguments: _BoostedCE.apply(*arguments)))


@register_fake("boosted_ce")
def _(logits: Tensor, labels: Tensor, slack: float) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape[0], dtype=reference.compute_dtype(logits.dtype)), logits.new_empty(
        logits.shape
    )


register_vmap("boosted_ce")(_vmap.rule(lambda *arguments: torch.ops.dtrades_fast.boosted_ce(*arguments)))
