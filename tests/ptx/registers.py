"""The registers of some threads, each an array with a value for every thread.

Which values were never written is known: nvcc computes with such values where the result does not matter, so they
spread through arithmetic as unknown, and only a branch, an address or a result must not depend on them.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from arithmetic import DTYPES
from parser import Kernel

Lanes = np.ndarray | None  # the threads that take part; None: all of them


class Registers:
    def __init__(self, kernel: Kernel, threads: int) -> None:
        self.kernel, self.threads = kernel, threads
        self._values: dict[str, np.ndarray] = {}
        self._unknown: dict[str, np.ndarray] = {}  # only registers with unknown values are in here

    def get(self, name: str, lanes: Lanes) -> np.ndarray:
        if name not in self._values:
            self._values[name] = np.zeros(self.threads, DTYPES[self.kernel.register_type(name)])
            self._unknown[name] = np.ones(self.threads, bool)
        values = self._values[name]
        return values if lanes is None else values[lanes]

    def put(self, name: str, values: np.ndarray, lanes: Lanes, unknown: np.ndarray | None = None) -> None:
        if lanes is None:
            self._values[name] = values if values.ndim else np.full(self.threads, values)
            if unknown is None:
                self._unknown.pop(name, None)
            else:
                self._unknown[name] = unknown
            return
        if name not in self._values:
            self.get(name, lanes)
        self._values[name][lanes] = values
        if unknown is not None:
            self._unknown.setdefault(name, np.zeros(self.threads, bool))[lanes] = unknown
        elif name in self._unknown:
            self._unknown[name][lanes] = False
            if not self._unknown[name].any():
                del self._unknown[name]

    def unknown(self, names: Collection[str], lanes: Lanes) -> np.ndarray | None:
        """The threads for which one of these registers was never written, if there are any."""
        for name in names:
            if name not in self._values:
                self.get(name, None)
        masks = [self._unknown[name] for name in names if name in self._unknown]
        if not masks:
            return None
        mask = np.logical_or.reduce(masks)
        mask = mask if lanes is None else mask[lanes]
        return mask if mask.any() else None
