"""Random signs that depend on a seed and a name, and on nothing else."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
import numpy.typing as npt


def _key(seed: int, name: str) -> npt.NDArray[np.uint64]:
    digest = hashlib.blake2b(f"diffhook:{seed}:{name}".encode(), digest_size=16).digest()
    return np.frombuffer(digest, dtype="<u8")


def signs(seed: int, name: str, count: int) -> npt.NDArray[np.int8]:
    """The first ``count`` random signs of the stream ``(seed, name)``.

    Philox is counter-based: sign *i* is the same whatever ``count`` is, in whatever order streams
    are asked for, and on every machine.

    Returns:
        int8 array of shape (count,), values −1 and +1.
    """
    words = np.random.Philox(key=_key(seed, name)).random_raw((count + 63) // 64)
    bits = np.unpackbits(np.asarray(words, dtype="<u8").view(np.uint8), count=count)
    return (bits.astype(np.int8) << 1) - 1


@lru_cache(maxsize=65536)
def offset(seed: int, name: str, modulus: int) -> int:
    """A bucket in [0, modulus) for the first element of the parameter ``name``."""
    return int(_key(seed, f"offset:{name}")[0] % np.uint64(modulus))
