"""All samples' pictures in one sheet of small cells, which a page can draw by the thousand."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from PIL import Image

from diffhook.images import shrunk
from diffhook.report.likeness import Images

_PIXELS = 23_100_000  # of a sheet: 10,000 pictures of 48 × 48
_SMALLEST, _LARGEST, _STEP = 16, 64, 16  # a cell's side; whole blocks of the encoder do not mix neighbours
_QUALITIES = 70, 45, 20  # the first whose file is small enough
_BYTES = 9_000_000  # 12 MB as a data URI; a page is to stay under 20
_EXACT = 600_000  # pixels of a sheet up to which it is kept without loss


@dataclass(frozen=True)
class Atlas:
    """A sheet of pictures.

    Attributes:
        uri: the sheet as a data URI.
        cell: side of a cell in pixels; a picture lies in the middle of its own.
        columns: cells in a row.
        places: sample id → number of its cell, of the samples that have a picture.
    """

    uri: str
    cell: int
    columns: int
    places: dict[int, int]


def small_pictures(images: Images | None, samples: Iterable[int]) -> dict[int, Image.Image]:
    """Sample id → its picture in RGBA, so small that all fit into a sheet; of those that can be read."""
    if images is None:
        return {}
    ids = list(samples)
    room = min(max(math.isqrt(_PIXELS // max(len(ids), 1)) // _STEP * _STEP, _SMALLEST), _LARGEST)
    return {sample: small for sample in ids if (small := _small(images, sample, room)) is not None}


def make_atlas(found: Mapping[int, Image.Image]) -> Atlas | None:
    """Of :func:`small_pictures`; None where there is none."""
    if not found:
        return None
    longest = max(max(picture.size) for picture in found.values())
    cell = -(-max(longest, _SMALLEST) // _STEP) * _STEP
    columns = math.ceil(math.sqrt(len(found)))
    sheet = Image.new("RGBA", (columns * cell, -(-len(found) // columns) * cell))
    for number, picture in enumerate(found.values()):
        corner = [at * cell for at in (number % columns, number // columns)]
        middle = tuple(start + (cell - side) // 2 for start, side in zip(corner, picture.size, strict=True))
        sheet.paste(picture, middle)
    places = {sample: number for number, sample in enumerate(found)}
    return Atlas(_uri(sheet), cell, columns, places)


def _small(images: Images, sample: int, size: int) -> Image.Image | None:
    try:
        image = images(sample)
        return None if image is None else shrunk(image, size).convert("RGBA")
    except (OSError, ValueError, LookupError, TypeError):
        return None  # the gallery tells why


def _uri(sheet: Image.Image) -> str:
    if sheet.getchannel("A").getextrema()[0] == 255:
        sheet = sheet.convert("RGB")
    exact = sheet.width * sheet.height <= _EXACT
    buffer = io.BytesIO()
    for quality in _QUALITIES:
        buffer = io.BytesIO()
        sheet.save(buffer, "WEBP", quality=quality, lossless=exact)
        if buffer.tell() <= _BYTES:
            break
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
