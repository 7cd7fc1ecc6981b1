"""Counter-based randomness: every random number is a pure function of what it is for.

A ``key`` names a stream, for example ``key(seed, "attack", step, restart)``. Within a stream a number depends only on
the sample's index and the element's position, so results depend on neither the batch split, the number of processes or
threads, nor on anything that ran before. That is what makes exact resume possible without saving generator states.
"""

from __future__ import annotations

import hashlib
import struct

import numpy as np

__all__ = ["generator", "key"]


def key(seed: int, purpose: str, *counters: int) -> int:
    """63-bit key of the stream ``(seed, purpose, counters)``.

    BLAKE2b of the unambiguous encoding of its arguments, so that neighbouring seeds and steps share nothing.

    Args:
        seed: the run's seed, any Python integer of at most 64 bits.
        purpose: what the numbers are for, e.g. ``"attack"``, ``"order"``, ``"augment"``.
        counters: e.g. epoch, step, restart.

    Returns:
        An integer in ``[0, 2**63)``, usable as ``key`` of :func:`dtrades_fast.ops.random_start` and as a torch seed.
    """
    name = purpose.encode()
    message = struct.pack(f"<I{len(name)}s", len(name), name)
    message += struct.pack(f"<{1 + len(counters)}q", seed, *counters)
    return int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little") >> 1


def generator(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """NumPy generator of the stream, for draws made on the host (data order, augmentation)."""
    return np.random.Generator(np.random.Philox(key=key(seed, purpose, *counters)))
