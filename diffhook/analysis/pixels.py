"""How alike two pictures of samples are."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

ALIKE = 0.9
"""Correlation from which two pictures show the same."""


def correlation(thumbnails: Mapping[int, bytes], first: int, second: int) -> float | None:
    """Pearson correlation of two samples' thumbnails, of the smaller one's size, in grey.

    None where one has none, or is of a single colour. Two of the same single colour have 1.
    """
    from diffhook.images import to_image  # Pillow, which scores alone do not need

    if first not in thumbnails or second not in thumbnails:
        return None
    images = [to_image(thumbnails[sample]).convert("L") for sample in (first, second)]
    size = min((image.size for image in images), key=lambda size: size[0] * size[1])
    left, right = (np.asarray(image.resize(size), np.float64).ravel() for image in images)
    if not np.ptp(left) or not np.ptp(right):
        return 1.0 if np.array_equal(left, right) else None
    return float(np.corrcoef(left, right)[0, 1])
