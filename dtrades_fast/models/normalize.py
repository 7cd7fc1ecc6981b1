"""Images in, logits out: the normalisation is a layer of the network, so that attacks work on pixels in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["Classifier", "Normalize"]


class Normalize(nn.Module):
    """``(x - mean) / std`` per channel, for images ``[N, C, H, W]``; mean 0 and std 1 leave every bit as it is.

    Raises:
        ValueError: ``mean`` and ``std`` differ in length, or a std is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(s > 0 for s in std):
            raise ValueError(
                "mean and std need one number per channel each and every std > 0, "
                f"got mean={tuple(mean)} and std={tuple(std)}"
            )
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class Classifier(nn.Module):
    """``network(normalize(images))``: pixels in [0, 1], ``[N, C, H, W]``, to logits ``[N, classes]``.

    Attributes:
        normalize: the :class:`Normalize` layer.
        network: the bare architecture, with its usual state-dict keys.
        backbone_frozen: set by :func:`dtrades_fast.models.weights.freeze_backbone`. :meth:`train` then leaves all but
            the head in eval mode: ``requires_grad=False`` alone would let BatchNorm go on moving its statistics.
    """

    def __init__(self, normalize: Normalize, network: nn.Module) -> None:
        super().__init__()
        self.normalize = normalize
        self.network = network
        self.backbone_frozen = False

    @property
    def head(self) -> nn.Linear:
        """The layer that turns features into logits: the network's last linear one."""
        return [layer for layer in self.network.modules() if isinstance(layer, nn.Linear)][-1]

    def train(self, mode: bool = True) -> Classifier:
        super().train(mode)
        if self.backbone_frozen:
            self.network.eval()
            self.head.train(mode)
        return self

    def forward(self, images: Tensor) -> Tensor:
        return self.network(self.normalize(images))
