"""Memory that watches over its accesses: bounds, alignment, uninitialised reads, data races."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from parser import PTXError

NOBODY, MANY = -1, -2


@dataclass(frozen=True)
class Who:
    """The threads of one access, by their numbers in the launch, and how many barriers each of them has passed."""

    thread: np.ndarray
    block: np.ndarray
    interval: np.ndarray


class Memory:
    """Arrays of bytes, each with 2**shift addresses for itself, so that no access strays from one into another.

    ``copies`` of all arrays lie at the same addresses: shared memory of several blocks. ``misalignments`` say how many
    bytes after a multiple of 2**shift each array begins.
    """

    def __init__(
        self, shift: int, sizes: Sequence[int], copies: int = 1, misalignments: Sequence[int] | None = None
    ) -> None:
        self.shift = shift
        self.sizes = np.array([0, *sizes], np.int64)
        self.misalignments = np.array([0, *(misalignments or [0] * len(sizes))], np.int64)
        # Array k lies here in `data`; the first one, without a byte, takes the addresses around null.
        self.starts = np.concatenate([[0], np.cumsum((self.sizes + 255) // 256 * 256)])[:-1]
        self.stride = int(self.starts[-1] + self.sizes[-1])
        self.data = np.zeros(self.stride * copies, np.uint8)
        self.initialised = np.zeros(self.data.size, bool)
        self.races = Races(self.data.size // 2 + 1)

    def address(self, array: int) -> int:
        return ((array + 1) << self.shift) + int(self.misalignments[array + 1])

    def content(self, array: int) -> slice:
        start = int(self.starts[array + 1])
        return slice(start, start + int(self.sizes[array + 1]))

    def fill(self, array: int, content: np.ndarray) -> None:
        self.data[self.content(array)] = content.reshape(-1).view(np.uint8)
        self.initialised[self.content(array)] = True

    def read(self, address: np.ndarray, width: int, who: Who, copy: np.ndarray | int = 0) -> np.ndarray:
        """[threads, width] bytes."""
        at = self.locate(address, width, copy)
        if not self.initialised[at].all():
            raise PTXError("uninitialised memory is read")
        self.races.read(at, who)
        return self.data[at]

    def write(self, address: np.ndarray, values: np.ndarray, who: Who, copy: np.ndarray | int = 0) -> None:
        at = self.locate(address, values.shape[1], copy)
        self.races.write(at, who)
        self.data[at] = values
        self.initialised[at] = True

    def locate(self, address: np.ndarray, width: int, copy: np.ndarray | int = 0) -> np.ndarray:
        """[threads, width] indices into ``data``."""
        address = address.astype(np.int64)
        array = address >> self.shift
        if np.any(array < 0) or np.any(array >= len(self.sizes)):
            raise PTXError("access out of bounds: no array has this address")
        offset = (address & (1 << self.shift) - 1) - self.misalignments[array]
        outside = (offset < 0) | (offset + width > self.sizes[array])
        if outside.any():
            i = int(np.argmax(outside))
            raise PTXError(f"access out of bounds: {width} bytes at {offset[i]} of {self.sizes[array[i]]}")
        if np.any(address % width):
            raise PTXError(f"misaligned access to {width} bytes")
        return (self.starts[array] + offset + copy * self.stride)[:, None] + np.arange(width)


class Races:
    """Who has read and written every cell of two bytes: no access of these kernels is narrower.

    Two accesses to a cell, one of them a write, race if they come from two blocks, or from two threads of a block
    without a barrier between them.
    """

    def __init__(self, size: int) -> None:
        self.writer, self.reader, self.reader_block = (np.full(size, NOBODY, np.int32) for _ in range(3))
        self.writer_block, self.writer_interval, self.reader_interval = (np.zeros(size, np.int32) for _ in range(3))

    def read(self, at: np.ndarray, who: Who) -> None:
        at, thread, block, interval = _cells(at, who)
        self._check_writer(at, thread, block, interval)
        # What the block itself read before its last barrier is ordered before all that may follow.
        forgotten = (self.reader_block[at] == NOBODY) | (
            (self.reader_block[at] == block) & (self.reader_interval[at] < interval)
        )
        other_thread = ~forgotten & (self.reader[at] != thread)
        other_block = ~forgotten & (self.reader_block[at] != block)
        for seen, me, other in ((self.reader, thread, other_thread), (self.reader_block, block, other_block)):
            seen[at] = me
            seen[at[other | (seen[at] != me)]] = MANY  # others before, or in this very access
        self.reader_interval[at] = interval

    def write(self, at: np.ndarray, who: Who) -> None:
        at, thread, block, interval = _cells(at, who)
        self._check_writer(at, thread, block, interval)
        unordered = (self.reader_block[at] != block) | (self.reader_interval[at] == interval)
        if np.any((self.reader[at] != NOBODY) & (self.reader[at] != thread) & unordered):
            raise PTXError("data race: a write after a read")
        self.writer[at], self.writer_block[at], self.writer_interval[at] = thread, block, interval
        if np.any(self.writer[at] != thread):
            raise PTXError("data race: two writes at once")

    def _check_writer(self, at: np.ndarray, thread: np.ndarray, block: np.ndarray, interval: np.ndarray) -> None:
        unordered = (self.writer_block[at] != block) | (self.writer_interval[at] == interval)
        if np.any((self.writer[at] != NOBODY) & (self.writer[at] != thread) & unordered):
            raise PTXError("data race: an access after a write")


def _cells(at: np.ndarray, who: Who) -> tuple[np.ndarray, ...]:
    """The cells of these bytes, and who accesses each of them."""
    cells, each = at[:, ::2] // 2, (who.thread, who.block, who.interval)
    return cells, *(np.broadcast_to(x.astype(np.int32)[:, None], cells.shape) for x in each)
