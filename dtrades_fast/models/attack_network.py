"""The form of a model that attacks run on: the same function, faster."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from dtrades_fast.attacks.base import eval_mode
from dtrades_fast.attacks.graph import Graph
from dtrades_fast.models.folding import FoldedNetwork, fold, logits_and_gradients
from dtrades_fast.models.layout import lay_out
from dtrades_fast.models.precision import HALF, Autocast, cast_once

__all__ = ["AttackNetwork", "Compiled", "Precision"]

Precision = Literal["fp32", "fp16", "bf16"]


class Compiled(nn.Module):
    """A network under :func:`torch.compile`, compiled once for all batch sizes from 2 on, with the same dropout."""

    def __init__(self, network: nn.Module, backend: str = "inductor"):
        super().__init__()
        # The network is laid out already, see layout.py; inductor would make all of it channels last.
        ours: dict[str, Any] = {"fallback_random": True, "layout_optimization": False}
        options = ours if backend == "inductor" else None
        # Not isolated, all networks of a class share one limit of compilations, and those beyond it run uncompiled.
        self.network = torch.compile(network, backend=backend, options=options, isolate_recompiles=True)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        torch._dynamo.maybe_mark_dynamic(images, 0)
        return self.network(images)


class AttackNetwork(nn.Module):
    """A model in eval mode as an attack needs it: BatchNorm folded, channels last, in mixed precision, compiled.

    It gives the model's logits and input gradients within the rounding of its precision, which is checked on a few
    images; where folding does not, the model is used as it is. After a change of the model's weights or statistics,
    :meth:`refresh` brings it up to date.

    Args:
        model: maps images in [0, 1], [N, C, H, W], to logits.
        images: [N, C, H, W], a few real ones.
        folded: fold BatchNorm into convolutions where that computes the same.
        channels_last: keep activations in that memory format, if the network is folded.
        precision: ``"fp32"`` for the model's own; ``"fp16"`` or ``"bf16"`` with logits in float32, unless the sample
            overflows.
        compiled: compile it with :func:`torch.compile`, once for all batch sizes.
        graph: by which attacks that support it record what they do to this network; none by default.

    Attributes:
        how: what it is, in words.
        layout: memory format in which it wants its images.
        plain: whether it is the model itself.
        computes_in_half: see :class:`~dtrades_fast.models.precision.Autocast`.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        *,
        folded: bool = True,
        channels_last: bool = True,
        precision: Precision = "fp32",
        compiled: bool = False,
        graph: Graph | None = None,
    ):
        super().__init__()
        self.graph = graph
        self.layout = torch.contiguous_format
        with eval_mode(model):
            self.folded = fold(model, images) if folded else None
            network: nn.Module = model if self.folded is None else self.folded
            self.how = "the network itself"
            if self.folded is not None:
                self.how = f"BatchNorm folded ({self.folded.folded} of {self.folded.folded + self.folded.kept})"
                if channels_last:
                    self.layout = torch.channels_last
                    lay_out(self.folded, images, self.folded.own_layers)
                    self.how += ", channels last"
            if precision != "fp32":
                network = self._in_half(model, images, precision)
        self.plain = network is model
        self.computes_in_half = getattr(network, "computes_in_half", False)
        self.how += (", compiled" if compiled else "") + (", in a CUDA graph" if graph is not None else "")
        self.network = Compiled(network) if compiled else network

    def _in_half(self, model: nn.Module, images: Tensor, precision: str) -> nn.Module:
        """The network in mixed precision; without that, if the sample overflows."""
        folded = None if self.folded is None else FoldedNetwork(model)
        if folded is not None and self.layout == torch.channels_last:
            lay_out(folded, images, folded.own_layers, half=True)
        folded = None if folded is None else cast_once(folded, HALF[precision])
        half = Autocast(folded or model, images.device.type, HALF[precision]).eval()
        logits, gradients = logits_and_gradients(half, images.contiguous(memory_format=self.layout))
        if not (logits.isfinite().all() and gradients.isfinite().all()):
            self.how += f", fp32 since {precision} overflows"
            return self.folded or model
        self.how += f", {precision}"
        self.folded = folded
        return half

    def refresh(self) -> None:
        """Take over the model's weights and statistics, in place."""
        if self.folded is not None:
            self.folded.refresh()

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)
