"""The pixels of samples' thumbnails, brought to one size."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

SIDE = 16


def pixels_of(
    thumbnails: Mapping[int, bytes], samples: Sequence[int]
) -> tuple[npt.NDArray[np.uint8], list[bytes | None]]:
    """(N, SIDE, SIDE, 3) thumbnails in small, zero where there is none; and a digest of all the pixels of
    each, None where there is none."""
    from diffhook.images import to_image  # Pillow, which scores alone do not need

    small = np.zeros((len(samples), SIDE, SIDE, 3), np.uint8)
    digests: list[bytes | None] = []
    for i, sample in enumerate(samples):
        if sample not in thumbnails:
            digests.append(None)
            continue
        image = to_image(thumbnails[sample]).convert("RGB")
        small[i] = np.asarray(image.resize((SIDE, SIDE)))
        digests.append(hashlib.blake2b(image.tobytes(), digest_size=16, person=b"%d" % image.width).digest())
    return small, digests
