"""Whether queries are on the scale of what was trained on, as far as the log's figures tell."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from diffhook.appearance import COLUMNS
from diffhook.capture.samples.appearance import appearance, images_of
from diffhook.log import RunLog

logger = logging.getLogger("diffhook")

_TIMES = 8.0  # the largest contrast of the training: more than pictures of another kind have, on one scale


def tell_other_scale(log: RunLog, batch: Any) -> None:
    """Warn of queries with far more contrast than all samples of the log: pixels of 0 … 255, mostly.

    Args:
        batch: the queries, collated.
    """
    clean = images_of(batch)
    column = COLUMNS[1]
    block = next(log.train.blocks(), None)  # thousands of rows, as far as they go
    if clean is None or block is None or column not in log.train.columns:
        return
    known = log.train.read(block, column)
    known = known[np.isfinite(known)]
    asked = float(appearance(clean)[:, 1].median())
    if known.size and asked > _TIMES * float(known.max()) > 0:
        logger.warning(
            "the queries have a contrast (standard deviation) of %.3g, and no sample of the log has one "
            "above %.3g: scale them as the training's samples were, to [−1, 1] mostly",
            asked,
            float(known.max()),
        )
