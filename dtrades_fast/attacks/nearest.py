"""What a search for the smallest perturbation has found so far."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["Nearest", "size"]


def size(delta: Tensor, norm: Literal["linf", "l2"]) -> Tensor:
    """Linf or L2 norm of each sample's perturbation [N, C, H, W], in pixel units, [N]."""
    return torch.linalg.vector_norm(delta, torch.inf if norm == "linf" else 2, dim=(1, 2, 3))


class Nearest:
    """The images nearest to the clean ones that have fooled the model.

    Attributes:
        adv: [N, C, H, W], the clean images where none has.
        size: [N], the norms of their perturbations in pixel units, infinite where none has.
    """

    def __init__(self, images: Tensor, norm: Literal["linf", "l2"]):
        self.images, self.norm = images, norm
        self.adv = images.detach().clone()
        self.size = torch.full(images.shape[:1], torch.inf, dtype=images.dtype, device=images.device)

    def record(self, adv: Tensor, fooled: Tensor) -> None:
        """Keep the images [N, C, H, W] that fool the model (``fooled`` [N], bool) and are nearer than those before."""
        distance = size(adv - self.images, self.norm)
        nearer = fooled & (distance < self.size)
        self.adv = torch.where(nearer[:, None, None, None], adv, self.adv)
        self.size = torch.where(nearer, distance, self.size)

    def select(self, rows: Tensor) -> Nearest:
        """The same for a part of the samples."""
        part = Nearest(self.images[rows], self.norm)
        part.adv, part.size = self.adv[rows], self.size[rows]
        return part
