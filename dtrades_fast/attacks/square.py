"""Square (Andriushchenko et al. 2020): random search over squares, which asks the model for logits and no gradients."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from dtrades_fast import rng
from dtrades_fast.attacks.apgd import TINY, length
from dtrades_fast.attacks.base import Attack, Model, claims_hold
from dtrades_fast.attacks.survivors import COMPACT_EVERY, Survivors
from dtrades_fast.ops import random_start
from dtrades_fast.profiling import span

#: Proposals after which the share of the pixels that a square covers is halved, for 10,000 of them as published.
HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
#: Proposals whose random numbers are drawn in one go.
DRAWN_AT_ONCE = 50
#: Smallest square for L2, whose pattern needs a middle, and tiles per side of the start.
SMALLEST_L2, TILES = 3, 5


@dataclass(frozen=True)
class Square(Attack):
    """Random search that keeps a change of one square if it raises ``max_{i != y} z'_i - z'_y``, or fools the model.

    Linf starts at vertical stripes of ``+-epsilon`` and sets one square of each channel to ``x +- epsilon``. L2 starts
    at a grid of bumps and moves the perturbation inside one square to another, where it adds a bump. All is clipped to
    [0, 1]. A square covers the share ``p`` of the pixels, ``p_init`` at first, halved after 10, 50, 200, 500, 1000,
    2000, 4000, 6000 and 8000 proposals whatever the budget is, as in AutoAttack: results of different budgets are
    points of one curve, but those of schedules that are stretched to the budget are not comparable.

    Each sample has its own squares and signs, a function of its index, the key and the proposal's number, where
    AutoAttack's code draws one square for the whole batch. As there, a square that is smaller than the image never
    covers the last row and column: on digits, whose margins are black, that finds more.

    Args:
        epsilon: radius of the ball in pixel units.
        queries: forward passes per sample and restart, the first of which is for the start; AutoAttack's code does not
            count that one.
        p_init: share of the pixels that the first squares cover, in (0, 1].
        norm: ``"linf"`` or ``"l2"``.
        restarts: independent starts, of which later ones see what still stands.
        start: number of the first of them, which selects its random numbers.

    Raises:
        ValueError: a value that is out of its range, or values that exclude each other.

    Source: Andriushchenko et al. 2020, Square Attack: a query-efficient black-box adversarial attack via random search.
    """

    epsilon: float
    queries: int = 5000
    p_init: float = 0.8
    norm: Literal["linf", "l2"] = "linf"
    restarts: int = 1
    start: int = 0

    def __post_init__(self) -> None:
        if not self.epsilon >= 0:
            raise ValueError(f"epsilon must be >= 0 in pixel units, got {self.epsilon}")
        for name, count in (("queries", self.queries), ("restarts", self.restarts)):
            if count < 1:
                raise ValueError(f"{name} must be >= 1, got {count}")
        if not 0 < self.p_init <= 1:
            raise ValueError(f"p_init must be a share of the pixels in (0, 1], got {self.p_init}")
        if self.norm not in ("linf", "l2"):
            raise ValueError(f"norm must be 'linf' or 'l2', got {self.norm!r}")

    def parts(self) -> Sequence[Square]:
        starts = range(self.start, self.start + self.restarts)
        return [replace(self, restarts=1, start=start) for start in starts]

    def perturb(self, model: Model, images: Tensor, labels: Tensor, index: Tensor, key: int) -> Tensor:
        return self.search(model, images, labels, index, key)[0]

    def search(self, model: Model, images: Tensor, labels: Tensor, index: Tensor, key: int) -> tuple[Tensor, Tensor]:
        """The attack on a frozen model, with what it has cost.

        Args:
            model: as in :meth:`__call__`, like ``images``, ``labels``, ``index`` and ``key``.

        Returns:
            Images that fool the model, where none does those closest to it; and [N], int64, the number of queries at
            which that happened, where it did not all there were.
        """
        adv, queries = images.detach().clone(), torch.zeros_like(labels)
        standing = torch.arange(len(images), device=images.device)
        for part in self.parts():
            if len(standing) == 0:
                break
            found, fell = part._run(model, images[standing], labels[standing], index[standing], key)
            adv[standing] = found
            queries[standing] += torch.where(fell > 0, fell, self.queries)
            standing = standing[fell == 0]
        return adv, queries

    @torch.no_grad()
    def _run(self, model: Model, images: Tensor, labels: Tensor, index: Tensor, key: int) -> tuple[Tensor, Tensor]:
        """One restart: images, and the query at which each fooled the model, 0 if none did, [N], int64."""
        survivors = Survivors(images, claims_hold(model, labels))
        all_fell = torch.zeros_like(labels)
        with span("start"):
            search = (_Linf if self.norm == "linf" else _L2)(images, self.epsilon)
            adv = search.begin(self._numbers(index, search.start_numbers, key, 0))
            best, fooled = judge(model(adv), labels)
            fell = fooled.long()
        for query in range(2, self.queries + 1):
            block, place = divmod(query - 2, DRAWN_AT_ONCE)
            if place == 0:
                sides = [self.side(query - 2 + i, images.shape) for i in range(DRAWN_AT_ONCE)]
                search.plan(sides, self._numbers(index, DRAWN_AT_ONCE * search.numbers, key, 1 + block))
            with span("query", query):
                adv = search.propose(place)
                margin, fooled = judge(model(adv), labels)
                better = ((margin > best) | (fooled & (best <= 0))) & (fell == 0)
                search.keep(better)
                best = torch.where(better, margin, best)
                fell = fell.masked_fill(better & fooled, query)
            if query % COMPACT_EVERY == 0 and (fell > 0).any():
                rows = survivors.rows
                survivors.record(search.adv, fell > 0)
                keep = survivors.drop()
                all_fell[rows] = fell
                if keep is not None:
                    search.select(keep)
                    labels, index, best, fell = labels[keep], index[keep], best[keep], fell[keep]
                    if len(keep) == 0:
                        break
                fell = torch.zeros_like(fell)  # a claim that does not hold: a larger margin may
        survivors.record(search.adv, fell > 0)
        all_fell[survivors.rows] = fell
        return survivors.result(search.adv), all_fell

    def _numbers(self, index: Tensor, count: int, key: int, block: int) -> Tensor:
        """Uniform numbers in [0, 1) of 24 bits, [n, count], float32 whatever the images are."""
        zeros = torch.zeros(len(index), count, device=index.device)
        stream = rng.key(key, "square", self.start, block)
        return random_start(zeros, index, "linf", 0.5, stream, -0.5, 0.5).add_(0.5)

    def side(self, proposal: int, shape: Sequence[int]) -> int:
        """Side of the square in pixels.

        Args:
            proposal: its number, from 0.
            shape: of the images, [..., H, W].
        """
        height, width = shape[-2:]
        share = self.p_init / 2 ** bisect_left(HALVED_AFTER, proposal)
        side = round(math.sqrt(share * height * width))
        if self.norm == "l2":
            side = max(side, SMALLEST_L2)
            side += side % 2 == 0
        return min(max(side, 1), height, width)


def judge(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Largest wrong logit minus the label's, and whether the prediction is wrong, [N] each."""
    own = labels[:, None]
    margin = logits.scatter(1, own, -torch.inf).amax(1) - logits.gather(1, own).squeeze(1)
    return margin, logits.argmax(1) != labels


class _Windows:
    """Squares of one side in images [n, C, H, W], one per sample and the same in its channels, [n, C, side, side].

    They are read and written where they lie, which for all but the first squares is a small part of the images.

    Args:
        offsets: [C, side, side], int64, of the square's elements in memory.
        corners: [n], int64, of its first ones.
    """

    def __init__(self, offsets: Tensor, corners: Tensor):
        at = corners[:, None, None, None] + offsets
        self.shape, self.at = at.shape, at.flatten()

    def read(self, images: Tensor) -> Tensor:
        return in_memory(images).index_select(0, self.at).view(self.shape)

    def write_(self, images: Tensor, values: Tensor) -> None:
        in_memory(images).index_copy_(0, self.at, values.flatten())


def in_memory(images: Tensor) -> Tensor:
    """The elements of a dense tensor in the order in which they lie, as one row."""
    return images.as_strided((images.numel(),), (1,))


class _Search:
    """The best images so far, which a proposal is written over, and what it replaced.

    Attributes:
        images: [n, C, H, W], the clean ones.
        adv: [n, C, H, W], the best ones, in the memory format of the clean ones.
        start_numbers: random numbers in [0, 1) that the start takes per sample.
        squares: of a proposal.
        numbers: random numbers that a proposal takes per sample: tops and lefts, a sign per channel, and others.
    """

    squares: int
    others = 0

    def __init__(self, images: Tensor, epsilon: float):
        last = images.is_contiguous(memory_format=torch.channels_last)
        self.format = torch.channels_last if last else torch.contiguous_format
        self.images, self.epsilon = images.detach().contiguous(memory_format=self.format), epsilon
        self.adv = self.images  # until a start is made
        self.channels, self.height, self.width = channels, height, width = images.shape[1:]
        self.strides = (1, width * channels, channels) if last else (height * width, width, 1)
        self.numbers = 2 * self.squares + channels + self.others
        self.offsets: dict[int, Tensor] = {}  # by the side of the squares, which stays for thousands of queries

    def begin_at(self, adv: Tensor) -> Tensor:
        self.adv = adv.contiguous(memory_format=self.format)
        return self.adv

    def plan(self, sides: Sequence[int], numbers: Tensor) -> None:
        """Work out the next proposals.

        Args:
            sides: of their squares.
            numbers: [n, proposals * self.numbers], random ones in [0, 1).
        """
        numbers = numbers.unflatten(1, (len(sides), self.numbers)).permute(2, 1, 0).contiguous()
        places, signs, others = numbers.split((2 * self.squares, self.channels, self.others))
        side = torch.tensor(sides, device=numbers.device)[:, None]
        top = (places[0::2] * (self.height - side)).long()
        left = (places[1::2] * (self.width - side)).long()
        self.sides = sides
        self.corners = top * self.strides[1] + left * self.strides[2]  # [squares, proposals, n]
        self.signs = self.sign(signs).permute(1, 2, 0)[..., None, None]  # [proposals, n, C, 1, 1]
        self.others_drawn = others  # [others, proposals, n]

    def select(self, rows: Tensor) -> None:
        """Go on with these samples."""
        self.images, self.adv = (x[rows].contiguous(memory_format=self.format) for x in (self.images, self.adv))
        self.corners, self.signs, self.others_drawn = (
            self.corners[:, :, rows],
            self.signs[:, rows],
            self.others_drawn[:, :, rows],
        )

    def windows(self, square: int, place: int) -> _Windows:
        """A square of the planned proposal at that place."""
        side, device = self.sides[place], self.adv.device
        if side not in self.offsets:
            pixels, channels = torch.arange(side, device=device), torch.arange(self.channels, device=device)
            by_channel, by_row, by_column = self.strides
            self.offsets[side] = channels[:, None, None] * by_channel + pixels[:, None] * by_row + pixels * by_column
        first = torch.arange(len(self.adv), device=device) * (self.channels * self.height * self.width)
        return _Windows(self.offsets[side], first + self.corners[square, place])

    def show(self, *changes: tuple[_Windows, Tensor, Tensor]) -> Tensor:
        """Write a proposal over the best images: squares with what is in them and what is to be, in this order."""
        self.changes = changes
        for windows, _, values in changes:
            windows.write_(self.adv, values)
        return self.adv

    def keep(self, better: Tensor) -> None:
        """Take it back but for these samples, [n], bool."""
        rows = better[:, None, None, None]
        for windows, before, values in self.changes:
            windows.write_(self.adv, torch.where(rows, values, before))

    def sign(self, numbers: Tensor) -> Tensor:
        """-1 or 1 by random numbers in [0, 1)."""
        return (numbers < 0.5).to(self.images.dtype).mul_(-2).add_(1)


class _Linf(_Search):
    """Perturbations of ``+-epsilon``."""

    squares = 1

    @property
    def start_numbers(self) -> int:
        return self.channels * self.width

    def begin(self, numbers: Tensor) -> Tensor:
        stripes = self.sign(numbers).view(-1, self.channels, 1, self.width)
        return self.begin_at(self.images.add(stripes, alpha=self.epsilon).clamp_(0, 1))

    def propose(self, place: int) -> Tensor:
        square = self.windows(0, place)
        values = square.read(self.images).add_(self.signs[place], alpha=self.epsilon).clamp_(0, 1)
        return self.show((square, square.read(self.adv), values))


class _L2(_Search):
    """Perturbations of length epsilon, but for what the box cuts off, which the next proposal may use."""

    squares = 2  # one that the perturbation is moved to and one that it is taken from
    others = 1  # which way the bump lies

    def __init__(self, images: Tensor, epsilon: float):
        super().__init__(images, epsilon)
        self.tile = max(min(self.height, self.width) // TILES, 1)
        self.tiles = (self.height // self.tile, self.width // self.tile)
        self.bumps: dict[int, Tensor] = {}  # by side

    @property
    def start_numbers(self) -> int:
        return self.tiles[0] * self.tiles[1] * (1 + self.channels)

    def begin(self, numbers: Tensor) -> Tensor:
        (down, across), side = self.tiles, self.tile
        lies, signs = numbers.unflatten(1, (1 + self.channels, down, across)).split((1, self.channels), 1)
        grid = self.bump(side, lies) * self.sign(signs)[..., None, None]  # [n, C, down, across, side, side]
        top, left = (self.height - down * side) // 2, (self.width - across * side) // 2
        delta = torch.zeros_like(self.images)
        delta[:, :, top : top + down * side, left : left + across * side] = (
            grid.transpose(3, 4).flatten(4).flatten(2, 3)
        )
        return self.begin_at(torch.addcmul(self.images, delta, self.epsilon / (length(delta) + TINY)).clamp_(0, 1))

    def plan(self, sides: Sequence[int], numbers: Tensor) -> None:
        super().plan(sides, numbers)
        self.energy = length(self.adv - self.images).square()  # per sample; afresh, since its rounding adds up

    def propose(self, place: int) -> Tensor:
        to, source = self.windows(0, place), self.windows(1, place)
        before_to, before_source = to.read(self.adv), source.read(self.adv)
        clean_to, clean_source = to.read(self.images), source.read(self.images)
        there = before_to - clean_to
        to.write_(self.adv, clean_to)
        moved = square_sum(source.read(self.adv) - clean_source) + square_sum(there)  # an overlap counts once
        budget = moved + (self.epsilon**2 - self.energy) / self.channels
        values = self.bump(self.sides[place], self.others_drawn[0, place, :, None]) * self.signs[place]
        values += there / (square_sum(there).sqrt() + TINY)
        values *= budget.clamp_(min=0).sqrt() / (square_sum(values).sqrt() + TINY)
        values = values.add_(clean_to).clamp_(0, 1)
        self.new_energy = self.energy + (square_sum(values - clean_to) - moved).sum(1, keepdim=True)
        return self.show((source, before_source, clean_source), (to, before_to, values))

    def keep(self, better: Tensor) -> None:
        super().keep(better)
        self.energy = torch.where(better[:, None, None, None], self.new_energy, self.energy)

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        self.energy = self.energy[rows]

    def bump(self, side: int, lies: Tensor) -> Tensor:
        """The pattern, upright or on its side by random numbers [...] in [0, 1), as [..., side, side]."""
        if side not in self.bumps:
            self.bumps[side] = bump(side).to(self.images)
        return self.bumps[side][(lies < 0.5).long()]


def square_sum(values: Tensor) -> Tensor:
    """[n, C, side, side] -> [n, C, 1, 1]."""
    return values.square().sum((2, 3), keepdim=True)


def bump(side: int) -> Tensor:
    """A hill above a valley, and the same turned by 90 degrees, of L2 norm 1 each: [2, side, side], float64."""
    upper, lower = hill(side // 2, side), hill(side - side // 2, side)
    upright = torch.cat((upper, -lower))
    upright /= upright.norm()
    return torch.stack((upright, upright.T))


def hill(height: int, width: int) -> Tensor:
    """``sum_{d < j <= K} 1 / j^2`` at a distance d (the larger of rows and columns) from the middle, of L2 norm 1.

    K is the least that d stays below everywhere, as published.
    """
    rows = (torch.arange(height) - height // 2).abs()
    columns = (torch.arange(width) - width // 2).abs()
    steps = torch.arange(1, max(height, width) // 2 + 2, dtype=torch.float64).pow(-2)
    values = steps.flip(0).cumsum(0).flip(0)[torch.maximum(rows[:, None], columns)]
    return values / values.norm()
