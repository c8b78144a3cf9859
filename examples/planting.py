"""Emoji to train on, among which faults are planted; what is true of each is kept beside them."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import openmoji
from openmoji import CATEGORIES, Emoji, Pixels
from PIL import Image

FAULTS = ("broken", "inverted", "noisy", "exact copy", "near copy", "wrong label")
CLEAN = ""


@dataclass(frozen=True)
class Collection:
    """Pictures as a folder of categories would hold them.

    Attributes:
        pixels: (N, size, size, 3) uint8.
        names: N file names, "faces/grinning-face.png"; the folder is the label.
        labels: (N,) positions in ``CATEGORIES``.
        families: (N,) a number that siblings share; −1 for those without any.
        faults: (N,) one of ``FAULTS``, or "" for a sound picture.
        copied: of a copy the name of the picture that it is of; "" of any other.
    """

    pixels: Pixels
    names: list[str]
    labels: npt.NDArray[np.int64]
    families: npt.NDArray[np.int64]
    faults: npt.NDArray[np.str_]
    copied: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def take(self, index: npt.ArrayLike) -> Collection:
        """Those at the given positions."""
        chosen = np.asarray(index, np.int64)
        names, copied = ([column[i] for i in chosen] for column in (self.names, self.copied))
        labels, families, faults = (column[chosen] for column in (self.labels, self.families, self.faults))
        return Collection(self.pixels[chosen], names, labels, families, faults, copied)

    def save(self, folder: Path) -> None:
        """As PNG files."""
        for name, pixels in zip(self.names, self.pixels, strict=True):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / name)


def emoji(
    families: int, singles: int, held_out: int, size: int, seed: int = 0
) -> tuple[Collection, Collection]:
    """Whole families of six and single emoji to train on, and one member of each of ``held_out`` families
    that is not among them; without faults."""
    rng = np.random.default_rng(seed)
    chosen = [openmoji.families()[i] for i in rng.permutation(len(openmoji.families()))[:families]]
    alone = [openmoji.singles()[i] for i in rng.permutation(len(openmoji.singles()))[:singles]]
    every = [member for family in chosen for member in family] + alone
    numbers = np.repeat(np.append(np.arange(families), -1), [6] * families + [len(alone)])
    whole = _collection(every, numbers, size)
    asked = 6 * np.arange(held_out) + rng.integers(6, size=held_out)
    return whole.take(np.setdiff1d(np.arange(len(whole)), asked)), whole.take(asked)


def _collection(every: list[Emoji], families: npt.NDArray[np.int64], size: int) -> Collection:
    names = [f"{each.category}/{each.name}.png" for each in every]
    labels = np.array([CATEGORIES.index(each.category) for each in every])
    sound = np.full(len(every), CLEAN, "U16")
    return Collection(openmoji.raster(every, size), names, labels, families, sound, [""] * len(every))


def plant(sound: Collection, of_each: int, seed: int = 0) -> Collection:
    """With ``of_each`` faults of each kind, and all in a new order.

    Damage and copies are of pictures without siblings, so that those of a family stay as alike as they are; a
    wrong label may be any picture's.
    """
    rng = np.random.default_rng(seed)
    pixels, names, labels, faults = (
        sound.pixels.copy(), list(sound.names), sound.labels.copy(), sound.faults.copy(),
    )  # fmt: skip
    alone = rng.permutation(np.flatnonzero(sound.families < 0))[: of_each * (len(FAULTS) - 1)]
    others = rng.permutation(np.setdiff1d(np.arange(len(sound)), alone))[:of_each]
    chosen = iter([*alone, *others])  # wrong labels are planted last
    copies: list[tuple[int, str, Pixels]] = []
    for fault in FAULTS:
        for _, i in zip(range(of_each), chosen, strict=False):
            if fault.endswith("copy"):
                copies.append((i, fault, pixels[i] if fault == "exact copy" else _nearly(pixels[i])))
                continue
            faults[i] = fault
            if fault == "wrong label":
                labels[i] = rng.choice(np.setdiff1d(np.arange(len(CATEGORIES)), labels[i]))
                names[i] = f"{CATEGORIES[labels[i]]}/{names[i].partition('/')[2]}"
            else:
                pixels[i] = _damaged(pixels[i], fault, rng)
    of = [i for i, *_ in copies]
    copied = [""] * len(names) + [names[i] for i in of]
    names += _unused(names, labels[of].tolist(), rng)
    planted = Collection(
        np.concatenate([pixels, *(copy[None] for *_, copy in copies)]),
        names,
        np.append(labels, labels[of]),
        np.append(sound.families, np.full(len(of), -1)),
        np.append(faults, [fault for _, fault, _ in copies]),
        copied,
    )
    return planted.take(rng.permutation(len(planted)))


def _unused(names: list[str], labels: list[int], rng: np.random.Generator) -> list[str]:
    """For a copy of each label a name like the others', which does not give the copy away."""
    taken, found = set(names), []
    for label in labels:
        of_label = [f"{each.category}/{each.name}.png" for each in openmoji.singles()]
        free = [name for name in of_label if name not in taken and name.startswith(f"{CATEGORIES[label]}/")]
        found.append(str(rng.choice(free)))
        taken.add(found[-1])
    return found


def _damaged(picture: Pixels, fault: str, rng: np.random.Generator) -> Pixels:
    """Cut off and grey below, as a truncated file is decoded; as a negative; or speckled."""
    if fault == "broken":
        cut = picture.copy()
        cut[int(rng.integers(0, len(picture) // 3)) :] = 128
        return cut
    if fault == "inverted":
        return 255 - picture
    noise = rng.normal(0, 70, picture.shape)
    return (picture + noise).round().clip(0, 255).astype(np.uint8)


def _nearly(picture: Pixels) -> Pixels:
    """The same saved as a JPEG, as another export of a picture is."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=60)
    return np.asarray(Image.open(buffer))
