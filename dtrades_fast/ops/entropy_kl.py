"""Entropy of the clean prediction and its KL divergence to the adversarial one, in one pass over both logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dtrades_fast.ops import _check, _vmap, reference
from dtrades_fast.ops._library import has_kernel, needs_grad, register_fake, register_vmap


class EntropyKL(NamedTuple):
    """Per-sample results in nats, each [N]; float64 for float64 logits, else float32."""

    entropy: Tensor
    kl: Tensor


def entropy_kl(clean_logits: Tensor, adv_logits: Tensor) -> EntropyKL:
    r"""Entropy :math:`H(p)` and divergence :math:`KL(p \| p')` of each row, with ``p = softmax(clean_logits)`` and
    ``p' = softmax(adv_logits)``.

    .. math::
        H(p) = -\sum_c p_c \log p_c, \qquad KL(p \| p') = \sum_c p_c (\log p_c - \log p'_c)

    computed without the logarithm of a probability: with row maxima m, m' and ``s = sum exp(z - m)``,
    ``KL = sum_c p_c ((z_c - m) - (z'_c - m')) - log s + log s'``. Terms with ``p_c = 0`` count 0, ``p_c > 0`` against
    ``p'_c = 0`` gives +inf, NaN stays NaN. Differentiable in both arguments, twice; the clean side is not detached:
    ``dKL/dz' = p' - p``, ``dKL/dz = p (log p - log p' - KL)``, ``dH/dz = -p (log p + H)``.

    Args:
        clean_logits: [N, C], float32, float64, float16 or bfloat16, any strides.
        adv_logits: same shape, dtype and device.

    Returns:
        :class:`EntropyKL` of two [N] tensors in nats, accumulated and returned in float32 (float64 for float64).
        A row's result depends on that row alone, bit for bit.

    Raises:
        TypeError: not a floating-point tensor, or the dtypes differ.
        ValueError: not [N, C] with C >= 1, or shapes or devices differ.

    Source: TRADES (Zhang et al. 2019) eq. 3 for the KL term; D-TRADES takes the entropy into lambda(x).
    """
    _check.logits("clean_logits", clean_logits)
    _check.same("adv_logits", adv_logits, "clean_logits", clean_logits)
    if not has_kernel(clean_logits):
        return EntropyKL(*reference.entropy_kl(clean_logits, adv_logits))
    call = _EntropyKL.apply if needs_grad(clean_logits, adv_logits) else torch.ops.dtrades_fast.entropy_kl
    entropy, kl, _ = call(clean_logits, adv_logits)
    return EntropyKL(entropy, kl)


class _EntropyKL(torch.autograd.Function):
    @staticmethod
    def forward(clean: Tensor, adv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.dtrades_fast.entropy_kl(clean, adv)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs, *output)
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        clean, adv, entropy, kl, normalisers = ctx.saved_tensors
        grad_entropy, grad_kl, _ = grads
        if grad_entropy is None and grad_kl is None:
            return None, None
        if torch.is_grad_enabled():  # create_graph: the twin's formula can be differentiated again
            zeros = torch.zeros_like(entropy)
            return reference.entropy_kl_backward(
                zeros if grad_entropy is None else grad_entropy, zeros if grad_kl is None else grad_kl, clean, adv
            )
        return torch.ops.dtrades_fast.entropy_kl_backward(grad_entropy, grad_kl, clean, adv, entropy, kl, normalisers)

    vmap = staticmethod(_vmap.rule(lambda *arguments: _EntropyKL.apply(*arguments)))


@register_fake("entropy_kl")
def _(clean: Tensor, adv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    row = clean.new_empty(clean.shape[0], dtype=reference.compute_dtype(clean.dtype))
    return row, torch.empty_like(row), row.new_empty((clean.shape[0], 4))


@register_fake("entropy_kl_backward")
def _(
    grad_entropy: Tensor | None, grad_kl: Tensor | None, clean: Tensor, adv: Tensor, *saved: Tensor
) -> tuple[Tensor, Tensor]:
    return clean.new_empty(clean.shape), adv.new_empty(adv.shape)


register_vmap("entropy_kl")(_vmap.rule(lambda *arguments: torch.ops.dtrades_fast.entropy_kl(*arguments)))
