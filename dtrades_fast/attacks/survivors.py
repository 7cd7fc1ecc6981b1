"""The samples that a search goes on with: those fooled leave its batch, so that no pass is spent on them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["COMPACT_EVERY", "Survivors"]

#: Steps between two looks at how many samples still stand: a look makes the host wait for the device.
COMPACT_EVERY = 5


class Survivors:
    """Which samples of a batch still stand, and what fooled the model on the others.

    A search keeps its per-sample tensors, in the order of :attr:`rows`, and after each pass says what the model was
    fooled by (:meth:`record`). Every few steps it asks who is left (:meth:`drop`) and selects these from its tensors.
    Where a search runs on another form of a network, its claims are checked then, and those that do not hold forgotten.

    Args:
        images: [N, C, H, W], the clean ones.
        holds: of images and the positions in the batch that they belong to, says which claims hold, [m], bool.

    Attributes:
        rows: [n], int64, the batch's samples that the search still has.
        found: [n], bool, those that the model was fooled on.
    """

    def __init__(self, images: Tensor, holds: Callable[[Tensor, Tensor], Tensor] | None = None):
        self._holds = holds
        self.rows = torch.arange(len(images), device=images.device)
        self.found = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        self._adv = images.detach().clone()
        self._result = images.detach().clone()

    def record(self, adv: Tensor, fooled: Tensor) -> None:
        """Keep the images [n, C, H, W] that fool the model, the first ones of each sample. The host waits for nothing.

        Args:
            adv: what the model was shown.
            fooled: [n], bool.
        """
        first = fooled & ~self.found
        self._adv = torch.where(first[:, None, None, None], adv, self._adv)
        self.found |= fooled

    def drop(self) -> Tensor | None:
        """Positions in the search's tensors that it goes on with, [m], int64; None if these are all. The host waits."""
        self._forget()
        keep = (~self.found).nonzero().squeeze(1)
        if len(keep) == len(self.rows):
            return None
        self._result[self.rows] = self._adv
        self.rows, self.found, self._adv = self.rows[keep], self.found[keep], self._adv[keep]
        return keep

    def _forget(self) -> None:
        """Take back the claims that do not hold."""
        if self._holds is None or not len(claims := self.found.nonzero().squeeze(1)):
            return
        wrong = claims[~self._holds(self._adv[claims], self.rows[claims])]
        self.found[wrong] = False
        self._adv[wrong] = self._result[self.rows[wrong]]  # the clean ones, as long as nothing is found

    def result(self, otherwise: Tensor | None = None) -> Tensor:
        """[N, C, H, W]: the images that fooled the model; where none did, ``otherwise`` [n, ...] or the clean ones."""
        if otherwise is not None:
            self._adv = torch.where(self.found[:, None, None, None], self._adv, otherwise)
        self._result[self.rows] = self._adv
        return self._result
