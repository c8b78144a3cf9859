"""Small images of the samples that come by, where the user asked for them."""

from __future__ import annotations

import logging

from torch import Tensor

from diffhook.errors import ConfigurationError
from diffhook.images import png
from diffhook.log import LogWriter
from diffhook.log.samples import ROLE_STRIDE

logger = logging.getLogger("diffhook")


class ThumbnailTaker:
    """Keeps each sample's image, as it is at the first visit, in the log.

    Args:
        size: longest side in pixels; 0: none are kept.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._taken: set[int] = set()

    def take(self, writer: LogWriter, sample_ids: Tensor, images: Tensor) -> None:
        """Keep those that are new.

        Args:
            sample_ids: (B,) int64.
            images: (B, C, H, W), see :func:`~diffhook.images.to_image`.
        """
        if not self._size:
            return
        for position, sample in enumerate(sample_ids.tolist()):
            if sample in self._taken or sample >= ROLE_STRIDE:  # prior preservation's other half
                continue
            try:
                if writer.thumbnail(sample, png(images[position].float().cpu(), self._size)):
                    self._taken.add(sample)  # else at its next visit
            except ConfigurationError as error:
                logger.warning("the log keeps no thumbnails, because the batches hold %s", error)
                self._size = 0
                return
