"""The training losses, each with its gradients in one pass over the logits."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dtrades_fast.ops import _check, _vmap, reference
from dtrades_fast.ops._library import has_kernel, needs_grad, register_fake, register_vmap

#: Between 0 and this a slack could not be told from 0 in float32.
_SMALLEST_SLACK = 1e-30


class CELoss(NamedTuple):
    """Per-sample results, each [N]; float64 for float64 logits, else float32. Only ``loss`` has a gradient."""

    loss: Tensor
    margin: Tensor


class TradesLoss(NamedTuple):
    """Per-sample results, each [N]; float64 for float64 logits, else float32. Only ``loss`` has a gradient."""

    loss: Tensor
    ce: Tensor
    kl: Tensor
    entropy: Tensor
    weight: Tensor
    margin: Tensor


class MartLoss(NamedTuple):
    """Per-sample results, each [N]; float64 for float64 logits, else float32. Only ``loss`` has a gradient."""

    loss: Tensor
    bce: Tensor
    kl: Tensor
    weight: Tensor
    margin: Tensor


def ce_loss(logits: Tensor, labels: Tensor) -> CELoss:
    r"""Cross-entropy of each row, with ``p = softmax(logits)``, and its margin.

    .. math::
        CE = -\log p_y, \qquad margin = \max_{k \ne y} p_k - p_y

    ``p_y = 0`` gives +inf, NaN stays NaN; the margin is -1 with a single class. Differentiable in ``logits``, twice:
    ``dCE/dz = p - onehot(y)``.

    Args:
        logits: [N, C], float32, float64, float16 or bfloat16, any strides.
        labels: [N], int64 in 0..C-1, same device. A label out of range raises on the CPU in eager mode; where a check
            would synchronise or break a graph (CUDA, compiled code, vmap) its results and gradients become NaN.

    Returns:
        :class:`CELoss`: loss in nats, margin in -1..1 (positive where the row is misclassified), computed in float32
        (float64 for float64). A row's results depend on that row alone, bit for bit.

    Raises:
        TypeError: ``logits`` not floating-point or ``labels`` not int64.
        ValueError: wrong shape, device or label.

    Source: the margin is that of FAAL (Zhang et al. 2024) and, negated, of many others.
    """
    _check.logits("logits", logits)
    _check.labels("labels", labels, "logits", logits)
    return CELoss(*_call("ce_loss", (logits,), labels))


def trades_loss(
    clean_logits: Tensor,
    adv_logits: Tensor,
    labels: Tensor,
    *,
    base: float,
    alpha: float = 0.0,
    beta: float = 0.0,
    sensitivity: Tensor | None = None,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    entropy_gradient: bool = False,
) -> TradesLoss:
    r"""The loss of TRADES and D-TRADES for each row, with ``p = softmax(clean_logits)``, ``p' = softmax(adv_logits)``.

    .. math::
        loss = -\log p_y + w\, KL(p \| p'), \qquad
        w = \mathrm{clip}\bigl(base + \alpha H(p) + \beta s,\ minimum,\ maximum\bigr)

    TRADES is ``alpha = beta = 0``, where ``w`` is exactly ``base`` clipped. H and KL as in
    :func:`~dtrades_fast.ops.entropy_kl`. Differentiable, twice; the clean side of KL is not detached, and ``w`` is a
    constant with respect to the logits unless ``entropy_gradient``:

    .. math::
        \frac{dloss}{dz} &= p - onehot(y) + w\, p (\log p - \log p' - KL) - [\text{w not clipped}]\,
            \alpha\, KL\, p (\log p + H) \\
        \frac{dloss}{dz'} &= w\, (p' - p), \qquad \frac{dloss}{ds} = [\text{w not clipped}]\, \beta\, KL

    with the term of :math:`\alpha` only with ``entropy_gradient``. At a bound ``w`` counts as not clipped.

    Args:
        clean_logits: [N, C], float32, float64, float16 or bfloat16, any strides.
        adv_logits: same shape, dtype and device.
        labels: as in :func:`ce_loss`.
        base: constant part of the weight.
        alpha: weight of the entropy, at most ``ln C`` nats.
        beta: weight of the sensitivity.
        sensitivity: [N], ``s``, e.g. ‖grad_{x'} KL‖_2; float32, float64 for float64 logits; None is 0.
        minimum, maximum: clipping, off by default.
        entropy_gradient: whether gradients flow through H.

    Returns:
        :class:`TradesLoss`, computed in float32 (float64 for float64); ``margin`` is that of the adversarial logits,
        ``max_{k != y} p'_k - p'_y``. A row's results depend on that row alone, bit for bit.

    Raises:
        TypeError: wrong type or dtype, or dtypes differ.
        ValueError: wrong shape, device, label or range.

    Source: TRADES (Zhang et al. 2019) eq. 5; the weight is that of the thesis that proposes D-TRADES, sections 6.2 to
    6.4, ``base`` and clipping are additions.
    """
    _check_pair(clean_logits, adv_logits, labels)
    if sensitivity is not None:
        dtype = reference.compute_dtype(clean_logits.dtype)
        _check.per_row("sensitivity", sensitivity, dtype, "clean_logits", clean_logits)
    for name, value in (("base", base), ("alpha", alpha), ("beta", beta)):
        _check.number(name, value)
    _check.interval("minimum", minimum, "maximum", maximum)
    _check.flag("entropy_gradient", entropy_gradient)
    settings = base, alpha, beta, minimum, maximum, entropy_gradient
    return TradesLoss(*_call("trades_loss", (clean_logits, adv_logits, sensitivity), labels, *settings))


def mart_loss(
    clean_logits: Tensor,
    adv_logits: Tensor,
    labels: Tensor,
    beta: float,
    slack: float = 0.0,
    weight_slack: float = 0.0,
) -> MartLoss:
    r"""The loss of MART for each row, with ``p = softmax(clean_logits)``, ``p' = softmax(adv_logits)`` and k the most
    probable class of ``p'`` other than y.

    .. math::
        loss &= BCE + \beta\, w\, KL(p \| p'), \qquad w = 1 - p_y + weight\_slack \\
        BCE &= -\log p'_y - \log(1 - p'_k + slack), \qquad k = \arg\max_{c \ne y} p'_c

    :math:`1 - p'_k` and :math:`1 - p_y` are summed over the other classes, so nothing cancels however close the
    probability is to 1: without slack BCE is exact at any gap between the logits. Of equal classes k is the first;
    with a single class there is none and the second term is ``-log(1 + slack)``. ``p'_y = 0`` gives +inf, NaN stays
    NaN. Differentiable in both logits, twice; nothing is detached:

    .. math::
        \frac{dloss}{dz_c} &= \beta \left( w\, p_c (\log p_c - \log p'_c - KL) + KL\, p_y (p_c - [c = y]) \right) \\
        \frac{dloss}{dz'_c} &= p'_c - [c = y] + r\, p'_k \left([c = k] - [c \ne k] \frac{p'_c}{1 - p'_k}\right)
            + \beta\, w\, (p'_c - p_c), \qquad r = \frac{1 - p'_k}{1 - p'_k + slack}

    Args:
        clean_logits: [N, C], float32, float64, float16 or bfloat16, any strides.
        adv_logits: same shape, dtype and device.
        labels: as in :func:`ce_loss`.
        beta: weight of the second term; with 0 the loss is BCE.
        slack: 0, or at least 1e-30. The published implementation has ``1e-4 + 1e-12``, for which the second term of BCE
            cannot exceed 9.2.
        weight_slack: at least 0; 1e-7 in the published implementation.

    Returns:
        :class:`MartLoss`, computed in float32 (float64 for float64); ``margin`` is that of the adversarial logits,
        ``p'_k - p'_y``. A row's results depend on that row alone, bit for bit.

    Raises:
        TypeError: wrong type or dtype, or dtypes differ.
        ValueError: wrong shape, device, label or number.

    Source: Wang et al. 2020, Improving Adversarial Robustness Requires Revisiting Misclassified Examples, eq. 9 and 11.
    """
    _check_pair(clean_logits, adv_logits, labels)
    _check.number("beta", beta)
    _check.number("slack", slack, 0)
    if 0 < slack < _SMALLEST_SLACK:
        raise ValueError(f"slack must be 0 or at least {_SMALLEST_SLACK:g}, got {slack}")
    _check.number("weight_slack", weight_slack, 0)
    return MartLoss(*_call("mart_loss", (clean_logits, adv_logits), labels, beta, slack, weight_slack))


def _check_pair(clean_logits: Tensor, adv_logits: Tensor, labels: Tensor) -> None:
    _check.logits("clean_logits", clean_logits)
    _check.same("adv_logits", adv_logits, "clean_logits", clean_logits)
    _check.labels("labels", labels, "clean_logits", clean_logits)


def _call(name: str, inputs: tuple[Tensor | None, ...], labels: Tensor, *settings: float) -> tuple[Tensor, ...]:
    """Loss and figures of ``dtrades_fast::name``, whose results end with the gradient to each of the inputs."""
    if not has_kernel(labels):
        loss, *figures = getattr(reference, name)(*inputs, labels, *settings)
        return loss, *(figure.detach() for figure in figures)
    differentiable = needs_grad(*(x for x in inputs if x is not None))
    call = _FUNCTIONS[name].apply if differentiable else getattr(torch.ops.dtrades_fast, name)
    return call(*inputs, labels, *settings)[: -len(inputs)]


def _scale(row: Tensor, grad: Tensor) -> Tensor:
    """The gradient of each row times its number, in the dtype of the gradient."""
    return (row.view(-1, *[1] * (grad.dim() - 1)) * grad).to(grad.dtype)


def _autograd(name: str, inputs: int) -> type[torch.autograd.Function]:
    """``dtrades_fast::name`` with the gradients that it computes itself."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*arguments: Any) -> tuple[Tensor, ...]:
            return getattr(torch.ops.dtrades_fast, name)(*arguments)

        @staticmethod
        def setup_context(ctx: Any, arguments: tuple[Any, ...], results: tuple[Tensor, ...]) -> None:
            ctx.settings = arguments[inputs + 1 :]
            ctx.save_for_backward(*arguments[: inputs + 1], *results[-inputs:])
            ctx.mark_non_differentiable(*results[1:])
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
            nothing = (None,) * (inputs + 1 + len(ctx.settings))
            if grad_loss is None:
                return nothing
            saved = ctx.saved_tensors
            if torch.is_grad_enabled():  # create_graph: the twin's formula can be differentiated again
                backward = getattr(reference, f"{name}_backward")
                grads = backward(grad_loss, *saved[: inputs + 1], *ctx.settings)
            else:
                wanted = zip(saved[inputs + 1 :], ctx.needs_input_grad, strict=False)
                grads = tuple(_scale(grad_loss, grad) if needed else None for grad, needed in wanted)
            return *grads, *nothing[inputs:]

        vmap = staticmethod(_vmap.rule(lambda *arguments: Function.apply(*arguments)))

    return Function


def _register(name: str, inputs: int, figures: int) -> type[torch.autograd.Function]:
    """Everything that PyTorch wants to know of ``dtrades_fast::name``: shapes, vmap, gradients."""

    @register_fake(name)
    def fake(logits: Tensor, *_: Any) -> tuple[Tensor, ...]:
        rows, dtype = logits.shape[0], reference.compute_dtype(logits.dtype)
        per_row = [logits.new_empty(rows, dtype=dtype) for _ in range(figures)]
        grads = [logits.new_empty(logits.shape) for _ in range(min(inputs, 2))]
        return *per_row, *grads, *(logits.new_empty(rows, dtype=dtype) for _ in range(inputs - 2))

    register_vmap(name)(_vmap.rule(lambda *arguments: getattr(torch.ops.dtrades_fast, name)(*arguments)))
    return _autograd(name, inputs)


_FUNCTIONS = {
    "ce_loss": _register("ce_loss", inputs=1, figures=len(CELoss._fields)),
    "trades_loss": _register("trades_loss", inputs=3, figures=len(TradesLoss._fields)),
    "mart_loss": _register("mart_loss", inputs=2, figures=len(MartLoss._fields)),
}
