"""What a profiler would count: exact for the launch that was run, without caches and without time."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from parser import Instruction

SECTOR = 32  # bytes that global memory is read and written by
BANKS = 32  # of 4 bytes: what shared memory serves at once


@dataclass
class Counters:
    thread_instructions: int = 0
    by_mnemonic: Counter[str] = field(default_factory=Counter)  # instructions of warps
    requests: Counter[str] = field(default_factory=Counter)  # of warps, by "global load", "shared store", ...
    bytes: Counter[str] = field(default_factory=Counter)
    sectors: Counter[str] = field(default_factory=Counter)
    bank_conflicts: int = 0  # turns that requests to shared memory take beyond what their size needs

    def step(self, instruction: Instruction, threads: int, warps: np.ndarray) -> None:
        self.thread_instructions += threads
        self.by_mnemonic[instruction.mnemonic] += _distinct(warps)

    def access(self, space: str, load: bool, at: np.ndarray, warps: np.ndarray) -> None:
        """``at``: [threads, bytes of each], places in the memory."""
        kind = f"{space} {'load' if load else 'store'}"
        self.requests[kind] += _distinct(warps)
        self.bytes[kind] += at.size
        if space == "global":
            self.sectors[kind] += _distinct_pairs(warps[:, None], at[:, :: min(SECTOR, at.shape[1])] // SECTOR)
        else:
            self.bank_conflicts += _bank_conflicts(at[:, ::4] // 4, warps)

    def of_warps(self, pattern: str) -> int:
        """Instructions of warps whose mnemonic begins like that."""
        return sum(count for mnemonic, count in self.by_mnemonic.items() if re.match(pattern, mnemonic))


def _distinct(sorted_values: np.ndarray) -> int:
    return int(np.count_nonzero(np.diff(sorted_values))) + 1


def _distinct_pairs(a: np.ndarray, b: np.ndarray) -> int:
    return len(np.unique(np.broadcast_to(a, b.shape) * (int(b.max()) + 1) + b))


def _bank_conflicts(words: np.ndarray, warps: np.ndarray) -> int:
    """Different words of one bank take turns; a request that is larger than all banks takes several in any case."""
    words, warps = words.reshape(-1), np.repeat(warps - warps[0], words.shape[1])
    warp, bank = np.unique(np.stack([warps, words % BANKS, words]), axis=1)[:2]
    turns = np.zeros((int(warp[-1]) + 1, BANKS), np.int64)
    np.add.at(turns, (warp, bank), 1)
    return int((turns.max(1) - -(-turns.sum(1) // BANKS)).sum())
