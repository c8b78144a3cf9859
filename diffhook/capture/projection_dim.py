"""D, the length of projections, where no one has chosen it."""

from __future__ import annotations

from diffhook.capture.budget import LOG_BYTES
from diffhook.log import store as files
from diffhook.log.root import find_config
from diffhook.log.store import Location

MOST = 8192
"""Beyond it whitening takes longer than it gains, see examples/evidence/README.md."""
LEAST = 2048
ROWS = 40
"""Of a sample, in a training: twenty of its probe, and some twenty visits."""


def usual_dim(samples: int | None, rows: int = ROWS) -> int:
    """D for a dataset: 8192, halved down to 2048 while all rows do not fit into
    :data:`~diffhook.capture.budget.LOG_BYTES`. A larger D costs a captured step nothing, but room: at 8192 a
    sample's forty rows take 0.7 MB. So it is 8192 up to 16,384 samples, and 2048 from 32,769 on.

    Args:
        samples: of the dataset; None: a stream, which counts as a large one.
        rows: of each of them.
    """
    if samples is None:
        return LEAST
    dim = MOST
    while dim > LEAST and samples * rows * 2 * dim > LOG_BYTES:
        dim //= 2
    return dim


def known_dim(path: Location) -> int | None:
    """D of the sketches that a log has, which a run that goes on keeps; None: there is no such log.

    Raises:
        LogError: what is there is not a log, or damaged.
    """
    config = find_config(files.open_store(path, read_only=False))
    projection = {} if config is None else config["identity"]["projection"]
    return projection["dim"] if projection.get("kind") == "sketch" else None
