"""Small pictures that a page carries within itself."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

from diffhook.images import shrunk
from diffhook.report.likeness import Images, WrongPictureError

_QUALITY = 82  # WebP; enough for a picture of an inch
_TINY = 32  # pixels; so small, each one counts and is cheap


@dataclass(frozen=True)
class Thumbnail:
    """A picture as a data URI, or the reason why there is none.

    Attributes:
        problem: the reason, in a sentence.
        label: the same in two or three words.
    """

    uri: str = ""
    problem: str = ""
    label: str = "cannot be read"


class PictureCache:
    """Thumbnails by id, each made once.

    A picture that cannot be read is shown as such: it may be why its sample stands out.

    Args:
        images: id → image; None: there are none to show.
        size: longest side in pixels; smaller images keep theirs.
    """

    def __init__(self, images: Images | None, size: int = 96) -> None:
        self.images = images
        self.size = size
        self._made: dict[int, Thumbnail | None] = {}
        self._error: Exception | None = None

    def __call__(self, sample: int) -> Thumbnail | None:
        """The sample's thumbnail; None where there is no image of it."""
        if self.images is None:
            return None
        if sample not in self._made:
            self._made[sample] = self._make(self.images, sample)
        return self._made[sample]

    def check(self) -> None:
        """Raise the first image's error if not one of all the images asked for could be read."""
        if self._error is not None and not any(made and made.uri for made in self._made.values()):
            raise self._error

    def _make(self, images: Images, sample: int) -> Thumbnail | None:
        try:
            image = images(sample)
            return None if image is None else Thumbnail(data_uri(image, self.size))
        except WrongPictureError as error:
            return Thumbnail(problem=str(error), label="another picture")
        except (OSError, ValueError, LookupError, TypeError) as error:
            self._error = self._error or error
            return Thumbnail(problem=f"{type(error).__name__}: {error}")


def data_uri(value: Any, size: int = 96) -> str:
    """The image as an inline WebP, at most ``size`` pixels on its longer side."""
    image = shrunk(value, size)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=_QUALITY, lossless=max(image.size) <= _TINY)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
