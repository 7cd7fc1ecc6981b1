"""The CUDA kernels with the signatures of ``torch.ops.dtrades_fast``, on whatever can run them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from emulator import run
from helpers import assert_same_bits, bits, row_dtype
from torch import Tensor

START_KINDS = ("linf", "l2", "gaussian")


class Kernels:
    """``Kernels(schedule="greedy", build="tsan")``: options are those of :func:`emulator.run`, or of another engine.

    Every buffer begins ``shift`` elements after a multiple of 16 bytes. Results are NaN until they are written, and
    inputs must come back unchanged.
    """

    def __init__(self, engine: Callable[..., dict[str, np.ndarray]] = run, shift: int = 0, **options: object) -> None:
        self.engine, self.shift, self.options = engine, shift, options

    def entropy_kl(self, clean: Tensor, adv: Tensor) -> tuple[Tensor, ...]:
        rows, row = len(clean), row_dtype(clean.dtype)
        results = {"entropy": _nan((rows,), row), "kl": _nan((rows,), row), "normalisers": _nan((rows, 4), row)}
        return self._launch(
            "EntropyKLForward", clean, {"clean": clean, "adv": adv}, results, {"classes": clean.shape[1]}
        )

    def entropy_kl_backward(
        self,
        grad_entropy: Tensor | None,
        grad_kl: Tensor | None,
        clean: Tensor,
        adv: Tensor,
        entropy: Tensor,
        kl: Tensor,
        normalisers: Tensor,
    ) -> tuple[Tensor, ...]:
        inputs = {"grad_entropy": grad_entropy, "grad_kl": grad_kl, "clean": clean, "adv": adv}
        inputs |= {"entropy": entropy, "kl": kl, "normalisers": normalisers}
        results = {"grad_clean": _nan(clean.shape, clean.dtype), "grad_adv": _nan(clean.shape, clean.dtype)}
        return self._launch("EntropyKLBackward", clean, inputs, results, {"classes": clean.shape[1]})

    def logit_grad_kl(self, adv: Tensor, clean_log_probs: Tensor) -> Tensor:
        inputs = {"adv": adv, "clean_log_probs": clean_log_probs}
        results = {"grad": _nan(adv.shape, adv.dtype)}
        return self._launch("LogitGradKL", adv, inputs, results, {"classes": adv.shape[1]})[0]

    def logit_grad_ce(self, logits: Tensor, labels: Tensor) -> Tensor:
        inputs = {"logits": logits, "labels": labels}
        results = {"grad": _nan(logits.shape, logits.dtype)}
        return self._launch("LogitGradCE", logits, inputs, results, {"classes": logits.shape[1]})[0]

    def ce_loss(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        results = _rows(logits, "loss", "margin") | {"grad": _nan(logits.shape, logits.dtype)}
        settings = {"classes": logits.shape[1]}
        return self._launch("CELoss", logits, {"logits": logits, "labels": labels}, results, settings)

    def trades_loss(
        self,
        clean: Tensor,
        adv: Tensor,
        sensitivity: Tensor | None,
        labels: Tensor,
        base: float,
        alpha: float,
        beta: float,
        minimum: float,
        maximum: float,
        entropy_gradient: bool,
    ) -> tuple[Tensor, ...]:
        inputs = {"clean": clean, "adv": adv, "sensitivity": sensitivity, "labels": labels}
        results = _rows(clean, "loss", "ce", "kl", "entropy", "weight", "margin")
        results |= {"grad_clean": _nan(clean.shape, clean.dtype), "grad_adv": _nan(clean.shape, clean.dtype)}
        results |= _rows(clean, "grad_sensitivity")
        settings = {"classes": clean.shape[1], "base": base, "alpha": alpha, "beta": beta}
        settings |= {"minimum": minimum, "maximum": maximum, "entropy_gradient": entropy_gradient and alpha != 0}
        return self._launch("TradesLoss", clean, inputs, results, settings)

    def mart_loss(
        self, clean: Tensor, adv: Tensor, labels: Tensor, beta: float, slack: float = 0.0, weight_slack: float = 0.0
    ) -> tuple[Tensor, ...]:
        results = _rows(clean, "loss", "bce", "kl", "weight", "margin")
        results |= {"grad_clean": _nan(clean.shape, clean.dtype), "grad_adv": _nan(clean.shape, clean.dtype)}
        settings = {"classes": clean.shape[1], "beta": beta, "slack": slack, "weight_slack": weight_slack}
        return self._launch("MartLoss", clean, {"clean": clean, "adv": adv, "labels": labels}, results, settings)

    def pgd_step(
        self,
        adv: Tensor,
        grad: Tensor,
        clean: Tensor,
        step_size: float,
        epsilon: float,
        lower: float,
        upper: float,
        norm: str,
    ) -> Tensor:
        """The step's result; ``adv`` itself stays as it is."""
        settings = {"size": _size(adv), "step_size": step_size, "epsilon": epsilon, "lower": lower, "upper": upper}
        name, count = ("PGDStepLinf", adv.numel()) if norm == "linf" else ("PGDStepL2", len(adv))
        return self._launch(name, adv, {"grad": grad, "clean": clean}, {"adv": adv}, settings, count)[0]

    def sample_stats(
        self, grad: Tensor, adv: Tensor, clean: Tensor, epsilon: float, lower: float = 0.0, upper: float = 1.0
    ) -> tuple[Tensor, ...]:
        results = {name: _nan((len(grad),), row_dtype(grad.dtype)) for name in ("l2", "l1", "linf", "fosc")}
        settings = {"size": _size(grad), "epsilon": epsilon, "lower": lower, "upper": upper}
        return self._launch("SampleStats", grad, {"grad": grad, "adv": adv, "clean": clean}, results, settings)

    def lambda_x(
        self, logits: Tensor, grad: Tensor, alpha: float, beta: float, base: float, minimum: float, maximum: float
    ) -> tuple[Tensor, ...]:
        results = {name: _nan((len(grad),), row_dtype(grad.dtype)) for name in ("value", "entropy", "sensitivity")}
        settings = {"alpha": alpha, "beta": beta, "base": base, "minimum": minimum, "maximum": maximum}
        settings |= {"classes": logits.shape[1], "size": _size(grad)}
        return self._launch("LambdaX", logits, {"logits": logits, "grad": grad}, results, settings)

    def random_start(
        self,
        clean: Tensor,
        index: Tensor,
        kind: str,
        radius: float,
        key: int,
        lower: float = 0.0,
        upper: float = 1.0,
    ) -> Tensor:
        settings = {"size": _size(clean), "kind": START_KINDS.index(kind), "key": key}
        settings |= {"radius": radius, "lower": lower, "upper": upper}
        results = {"start": _nan(clean.shape, clean.dtype)}
        return self._launch("RandomStart", clean, {"clean": clean, "index": index}, results, settings)[0]

    def _launch(
        self,
        op: str,
        like: Tensor,
        inputs: dict[str, Tensor | None],
        results: dict[str, Tensor],
        settings: dict[str, float | int],
        count: int | None = None,
    ) -> tuple[Tensor, ...]:
        """The operator for the dtype of ``like``, over its first dimension if no ``count`` is given."""
        tensors = inputs | results
        after = self.engine(
            op,
            str(like.dtype).removeprefix("torch."),
            {name: None if x is None else bits(x).numpy() for name, x in tensors.items()},
            settings,
            len(like) if count is None else count,
            misalignment={name: self.shift * x.element_size() for name, x in tensors.items() if x is not None},
            **self.options,
        )
        outputs = {name: torch.from_numpy(x.copy()).view(tensors[name].dtype) for name, x in after.items()}
        for name, x in inputs.items():
            if x is not None:
                assert_same_bits(outputs[name], x, f"input {name} of {op}")
        return tuple(outputs[name] for name in results)


def _nan(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


def _rows(like: Tensor, *names: str) -> dict[str, Tensor]:
    return {name: _nan((len(like),), row_dtype(like.dtype)) for name in names}


def _size(x: Tensor) -> int:
    return x[0].numel() if len(x) else 0
