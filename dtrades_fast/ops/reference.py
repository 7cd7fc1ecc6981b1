"""Every operator in plain PyTorch: the oracle of the tests, the fallback without a compiler, the benchmarks' baseline.

Written to be read: one function per operator, the formula as PyTorch says it. Each accepts any device and any floating
dtype, computes half precision in float32, and is differentiable by ordinary autograd where the formula is.
The arguments are not checked here; the public functions in :mod:`dtrades_fast.ops` do that.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "ce_loss",
    "entropy_kl",
    "lambda_x",
    "logit_grad_ce",
    "logit_grad_kl",
    "mart_loss",
    "pgd_step_",
    "philox",
    "random_start",
    "sample_stats",
    "trades_loss",
]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that results per sample have: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _wide(x: Tensor) -> Tensor:
    return x.to(compute_dtype(x.dtype))


def _expected(p: Tensor, value: Tensor) -> Tensor:
    """``sum_c p_c value_c`` with ``0 * (+-inf) = 0``, NaN in ``p`` kept, and a finite gradient where p is 0."""
    return (p * torch.where(p != 0, value, 0)).sum(-1)


def _pixels(x: Tensor) -> Tensor:
    """[N, ...] -> [N, pixels]; [N] has one pixel per sample."""
    return x.flatten(1) if x.dim() > 1 else x[:, None]


def _per_sample(value: Tensor, like: Tensor) -> Tensor:
    """[N] -> [N, 1, ..., 1], to broadcast over the samples of ``like``."""
    return value.view(-1, *[1] * (like.dim() - 1))


def l2_norm(x: Tensor) -> Tensor:
    """Per-sample L2 norm, squares summed in float64 so that tiny gradients (1e-25) do not vanish."""
    return torch.linalg.vector_norm(_pixels(x).double(), dim=1).to(compute_dtype(x.dtype))


def _entropy(log_p: Tensor) -> Tensor:
    return -_expected(log_p.exp(), log_p)


def _entropy_grad(log_p: Tensor, entropy: Tensor) -> Tensor:
    """``dH/dz = -p (log p + H)``."""
    p = log_p.exp()
    return -p * torch.where(p != 0, log_p + entropy[:, None], 0)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    kl = _expected(log_p.exp(), log_p - log_q)
    return torch.where(kl < 0, kl - kl.detach(), kl)  # rounding may not make it negative


def _kl_grad(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """``dKL/dz = p (log p - log p' - KL)`` and ``dKL/dz' = p' - p``."""
    p, difference = log_p.exp(), log_p - log_q
    d_clean = p * torch.where(p != 0, difference - _expected(p, difference)[:, None], 0)
    return d_clean, log_q.exp() - p


def _clip(x: Tensor, minimum: float, maximum: float) -> Tensor:
    """``x.clamp(minimum, maximum)`` whose gradient is 1 at the bounds too."""
    return torch.where((x >= minimum) & (x <= maximum), x, x.detach().clamp(minimum, maximum))


def entropy_kl(clean_logits: Tensor, adv_logits: Tensor) -> tuple[Tensor, Tensor]:
    log_p, log_q = _wide(clean_logits).log_softmax(-1), _wide(adv_logits).log_softmax(-1)
    return _entropy(log_p), _kl(log_p, log_q)


def entropy_kl_backward(
    grad_entropy: Tensor, grad_kl: Tensor, clean_logits: Tensor, adv_logits: Tensor
) -> tuple[Tensor, Tensor]:
    log_p, log_q = _wide(clean_logits).log_softmax(-1), _wide(adv_logits).log_softmax(-1)
    d_clean, d_adv = _kl_grad(log_p, log_q)
    grad_clean = grad_entropy[:, None] * _entropy_grad(log_p, _entropy(log_p)) + grad_kl[:, None] * d_clean
    return grad_clean.to(clean_logits.dtype), (grad_kl[:, None] * d_adv).to(adv_logits.dtype)


def softmax_backward(grad: Tensor, logits: Tensor) -> Tensor:
    """``p (g - sum_c p_c g_c)``, the gradient through ``p = softmax(logits)``."""
    p = _wide(logits).softmax(-1)
    return torch.ops.aten._softmax_backward_data(_wide(grad), p, -1, p.dtype).to(logits.dtype)


def exp_backward(grad: Tensor, x: Tensor) -> Tensor:
    return (_wide(grad) * _wide(x).exp()).to(x.dtype)


def logit_grad_kl(adv_logits: Tensor, clean_log_probs: Tensor) -> Tensor:
    return (_wide(adv_logits).softmax(-1) - _wide(clean_log_probs).exp()).to(adv_logits.dtype)


def logit_grad_ce(logits: Tensor, labels: Tensor) -> Tensor:
    target = labels[:, None] == torch.arange(logits.shape[-1], device=logits.device)
    grad = _wide(logits).softmax(-1) - target.to(compute_dtype(logits.dtype))
    return torch.where(target.any(-1, keepdim=True), grad, math.nan).to(logits.dtype)  # a wrong label shows


def _known(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits, wide; a row whose label is out of range becomes NaN, and with it all that comes of it."""
    known = (labels >= 0) & (labels < logits.shape[1])
    return _wide(logits) * torch.where(known, 1.0, math.nan)[:, None].to(compute_dtype(logits.dtype))


def _at(rows: Tensor, labels: Tensor) -> Tensor:
    """[N, C] -> [N], the label's entry of each row."""
    return rows.gather(1, labels.clamp(0, rows.shape[1] - 1)[:, None]).squeeze(1)


def _target(rows: Tensor, labels: Tensor) -> Tensor:
    return labels[:, None] == torch.arange(rows.shape[1], device=rows.device)


def _margin(log_p: Tensor, labels: Tensor) -> Tensor:
    """``max_{k != y} p_k - p_y``; -1 with a single class."""
    p = log_p.exp()
    return p.masked_fill(_target(p, labels), 0).amax(1) - _at(p, labels)


def ce_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    log_p = _known(logits, labels).log_softmax(-1)
    return -_at(log_p, labels), _margin(log_p, labels)


def _ce_grad(log_p: Tensor, labels: Tensor) -> Tensor:
    return log_p.exp() - _target(log_p, labels).to(log_p.dtype)


def ce_loss_backward(grad_loss: Tensor, logits: Tensor, labels: Tensor) -> tuple[Tensor]:
    log_p = _known(logits, labels).log_softmax(-1)
    return ((grad_loss[:, None] * _ce_grad(log_p, labels)).to(logits.dtype),)


def _unclipped(
    entropy: Tensor, sensitivity: Tensor | None, base: float, alpha: float, beta: float, entropy_gradient: bool
) -> Tensor:
    weight = base + alpha * (entropy if entropy_gradient else entropy.detach())
    return weight if sensitivity is None else weight + beta * sensitivity


def trades_loss(
    clean_logits: Tensor,
    adv_logits: Tensor,
    sensitivity: Tensor | None,
    labels: Tensor,
    base: float,
    alpha: float,
    beta: float,
    minimum: float,
    maximum: float,
    entropy_gradient: bool,
) -> tuple[Tensor, ...]:
    log_p, log_q = (_known(z, labels).log_softmax(-1) for z in (clean_logits, adv_logits))
    ce, entropy, kl = -_at(log_p, labels), _entropy(log_p), _kl(log_p, log_q)
    weight = _clip(_unclipped(entropy, sensitivity, base, alpha, beta, entropy_gradient), minimum, maximum)
    return ce + weight * kl, ce, kl, entropy, weight, _margin(log_q, labels)


def trades_loss_backward(
    grad_loss: Tensor,
    clean_logits: Tensor,
    adv_logits: Tensor,
    sensitivity: Tensor | None,
    labels: Tensor,
    base: float,
    alpha: float,
    beta: float,
    minimum: float,
    maximum: float,
    entropy_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    log_p, log_q = (_known(z, labels).log_softmax(-1) for z in (clean_logits, adv_logits))
    entropy, kl = _entropy(log_p), _kl(log_p, log_q)
    unclipped = _unclipped(entropy, sensitivity, base, alpha, beta, entropy_gradient)
    weight = (grad_loss * _clip(unclipped, minimum, maximum))[:, None]
    inside = torch.where((unclipped >= minimum) & (unclipped <= maximum), grad_loss * kl, 0)
    d_kl_clean, d_kl_adv = _kl_grad(log_p, log_q)
    d_clean = grad_loss[:, None] * _ce_grad(log_p, labels) + weight * d_kl_clean
    if entropy_gradient and alpha != 0:
        d_clean = d_clean + (alpha * inside)[:, None] * _entropy_grad(log_p, entropy)
    d_sensitivity = None if sensitivity is None else beta * inside
    return d_clean.to(clean_logits.dtype), (weight * d_kl_adv).to(adv_logits.dtype), d_sensitivity


def _boosted(log_p: Tensor, labels: Tensor) -> Tensor:
    """[N, C] mask of the most probable class other than the label's, the first of equals (no class if C = 1)."""
    target = _target(log_p, labels)
    strongest = log_p.masked_fill(target, -math.inf).argmax(-1, keepdim=True)
    return (strongest == torch.arange(log_p.shape[1], device=log_p.device)) & ~target


def _rest(log_p: Tensor, boosted: Tensor) -> tuple[Tensor, Tensor]:
    """Without the class k: ``log(1 - p_k)`` [N, 1] and ``p_j / (1 - p_k)`` [N, C]. If no other class is possible, a
    constant -inf and zeros."""
    others = log_p.masked_fill(boosted, -math.inf)
    impossible = (others == -math.inf).all(-1, keepdim=True)
    others = others.masked_fill(impossible, 0)
    top = others.detach().amax(-1, keepdim=True)  # the sum relative to it: log p may be too large for its own digits
    log_rest = top + (others - top).logsumexp(-1, keepdim=True)
    return log_rest.masked_fill(impossible, -math.inf), others.softmax(-1).masked_fill(impossible, 0)


def _boosted_ce(log_p: Tensor, labels: Tensor, slack: float) -> Tensor:
    log_rest = _rest(log_p, _boosted(log_p, labels))[0].squeeze(-1)
    return -_at(log_p, labels) - ((log_rest.exp() + slack).log() if slack > 0 else log_rest)


def _boosted_ce_grad(log_p: Tensor, labels: Tensor, slack: float) -> Tensor:
    boosted = _boosted(log_p, labels)
    log_rest, rest = _rest(log_p, boosted)
    one_minus = log_rest.exp()
    share = one_minus / (one_minus + slack) if slack > 0 else (log_rest > -math.inf).to(log_p.dtype)
    p_k = log_p.exp().masked_fill(~boosted, 0).sum(-1, keepdim=True)
    return _ce_grad(log_p, labels) + share * p_k * torch.where(boosted, 1, -rest)


def mart_loss(
    clean_logits: Tensor, adv_logits: Tensor, labels: Tensor, beta: float, slack: float, weight_slack: float
) -> tuple[Tensor, ...]:
    log_p, log_q = (_known(z, labels).log_softmax(-1) for z in (clean_logits, adv_logits))
    bce, kl = _boosted_ce(log_q, labels, slack), _kl(log_p, log_q)
    weight = log_p.exp().masked_fill(_target(log_p, labels), 0).sum(-1) + weight_slack
    return bce + beta * kl * weight, bce, kl, weight, _margin(log_q, labels)


def mart_loss_backward(
    grad_loss: Tensor,
    clean_logits: Tensor,
    adv_logits: Tensor,
    labels: Tensor,
    beta: float,
    slack: float,
    weight_slack: float,
) -> tuple[Tensor, Tensor]:
    log_p, log_q = (_known(z, labels).log_softmax(-1) for z in (clean_logits, adv_logits))
    p, target = log_p.exp(), _target(log_p, labels)
    wrong = p.masked_fill(target, 0).sum(-1, keepdim=True)  # 1 - p_y
    d_weight = _at(p, labels)[:, None] * torch.where(target, -wrong, p)
    weight, kl = wrong + weight_slack, _kl(log_p, log_q)[:, None]
    d_kl_clean, d_kl_adv = _kl_grad(log_p, log_q)
    d_clean = beta * (weight * d_kl_clean + kl * d_weight)
    d_adv = _boosted_ce_grad(log_q, labels, slack) + beta * weight * d_kl_adv
    grad = grad_loss[:, None]
    return (grad * d_clean).to(clean_logits.dtype), (grad * d_adv).to(adv_logits.dtype)


def sample_stats(
    grad: Tensor, adv: Tensor, clean: Tensor, epsilon: float, lower: float, upper: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g, a, x = _pixels(_wide(grad)), _pixels(_wide(adv)), _pixels(_wide(clean))
    rise = torch.maximum(g * ((x + epsilon).clamp(max=upper) - a), g * ((x - epsilon).clamp(min=lower) - a))
    linf = g.abs().amax(1) if g.shape[1] else g.new_zeros(g.shape[0])
    return l2_norm(grad), g.abs().sum(1), linf, rise.sum(1)


def lambda_x(
    clean_logits: Tensor, grad: Tensor, alpha: float, beta: float, base: float, minimum: float, maximum: float
) -> tuple[Tensor, Tensor, Tensor]:
    log_p = _wide(clean_logits).log_softmax(-1)
    entropy, sensitivity = _entropy(log_p), l2_norm(grad)
    return _clip(base + alpha * entropy + beta * sensitivity, minimum, maximum), entropy, sensitivity


def lambda_x_backward(
    grad_value: Tensor,
    clean_logits: Tensor,
    grad: Tensor,
    settings: tuple[float, float, float, float, float],
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    alpha, beta, base, minimum, maximum = settings
    log_p = _wide(clean_logits).log_softmax(-1)
    entropy, sensitivity = _entropy(log_p), l2_norm(grad)
    value = base + alpha * entropy + beta * sensitivity
    inside = torch.where((value >= minimum) & (value <= maximum), grad_value, 0)
    d_logits, d_grad = None, None
    if wanted[0]:
        d_logits = ((alpha * inside)[:, None] * _entropy_grad(log_p, entropy)).to(clean_logits.dtype)
    if wanted[1]:
        scale = torch.where(sensitivity == 0, 0, beta * inside / sensitivity)
        d_grad = (_per_sample(scale, grad) * _wide(grad)).to(grad.dtype)
    return d_logits, d_grad


def pgd_step_(
    adv: Tensor, grad: Tensor, clean: Tensor, step_size: float, epsilon: float, lower: float, upper: float, norm: str
) -> None:
    a, g, x = _wide(adv), _wide(grad), _wide(clean)
    if norm == "linf":
        sign = torch.where(g.isnan(), g, g.sign())  # torch.sign would turn NaN into 0 and hide it
        moved = torch.minimum(torch.maximum(a + step_size * sign, x - epsilon), x + epsilon)
    else:
        size = l2_norm(grad)
        # infinite for a gradient too small for the quotient; a number over a tensor would be 1 / size first
        scale = torch.full_like(size, step_size) / size
        move = g * _per_sample(torch.where((size == 0) | scale.isinf(), 0, scale), g)
        delta = a + move - x
        size = l2_norm(delta)
        delta = delta * _per_sample(torch.where(size > epsilon, epsilon / size, 1 + 0 * size), delta)
        moved = x + delta
    adv.copy_(moved.clamp(lower, upper))


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al. 2011): four 32-bit words from a 128-bit counter and a 64-bit key.

    The words are int64 tensors with values in [0, 2**32); products wrap modulo 2**64, which is what is wanted.
    """
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = key & mask, (key >> 32) & mask
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32 & mask) ^ c1 ^ k0, p1 & mask, (p0 >> 32 & mask) ^ c3 ^ k1, p0 & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3


def _words(index: Tensor, count: int, draw: int, key: int) -> Tensor:
    """[N, count] random words: word ``j`` of sample ``i`` is word j % 4 of counter (j // 4, draw, index_i)."""
    mask = 0xFFFFFFFF
    block = torch.arange((count + 3) // 4, device=index.device)[None].expand(len(index), -1)
    low, high = (index & mask)[:, None].expand_as(block), (index >> 32 & mask)[:, None].expand_as(block)
    return torch.stack(philox((block, torch.full_like(block, draw), low, high), key), -1).flatten(1)[:, :count]


def _normals(index: Tensor, count: int, key: int, dtype: torch.dtype) -> Tensor:
    """[N, count] standard normals by Box-Muller, words (0, 1) and (2, 3) of each block making a pair."""
    words = _words(index, (count + 1) // 2 * 2, 0, key).unflatten(1, (-1, 2))
    radius = (-2 * (((words[..., 0] >> 8) + 1).to(dtype) * 2.0**-24).log()).sqrt()
    angle = 2 * math.pi * ((words[..., 1] >> 8).to(dtype) * 2.0**-24)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), -1).flatten(1)[:, :count]


def random_start(
    clean: Tensor, index: Tensor, kind: str, radius: float, lower: float, upper: float, key: int
) -> Tensor:
    x = _pixels(_wide(clean))
    count = x.shape[1]
    if kind == "linf":
        u = (_words(index, count, 0, key) >> 8).to(x.dtype) * 2.0**-23 - 1
        start = (x + radius * u).clamp(lower, upper)
    elif kind == "l2":
        normal = _normals(index, count, key, x.dtype)
        u = ((_words(index, 1, 1, key) >> 8) + 1).to(x.dtype) * 2.0**-24
        length = radius * u ** (1 / max(count, 1))
        start = (x + normal * (length / l2_norm(normal)[:, None])).clamp(lower, upper)
    else:
        start = x + radius * _normals(index, count, key, x.dtype)
    return torch.empty_like(clean).copy_(start.view(clean.shape))
