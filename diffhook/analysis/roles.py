"""What samples are for: the training's own, or regularisation images (class images, prior preservation)."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import numpy as np
import numpy.typing as npt

from diffhook.errors import ConfigurationError
from diffhook.log import RunLog
from diffhook.log.samples import ROLE_STRIDE

ROLES = ("training", "regularisation")


def regularisation_images(log: RunLog) -> frozenset[int]:
    """Ids of the samples that the training rows say are regularisation images."""
    found: set[int] = set()
    for block in log.train.blocks():
        marked = log.train.read(block, "role") > 0
        if marked.any():
            found.update(np.unique(log.train.read(block, "sample")[marked]).tolist())
    return frozenset(found)


def role_of(sample: int, regularisation: Set[int]) -> str:
    """Of :data:`ROLES`. Class images of prior preservation are told by their ids."""
    return ROLES[sample in regularisation or sample >= ROLE_STRIDE]


def of_role(sample_ids: npt.NDArray[Any], regularisation: Set[int], role: str) -> npt.NDArray[np.bool_]:
    """(N,) which samples have a role.

    Raises:
        ConfigurationError: ``role`` is none of :data:`ROLES`.
    """
    if role not in ROLES:
        raise ConfigurationError(f"role is {role!r}; expected one of {', '.join(ROLES)}")
    return np.array([role_of(sample, regularisation) == role for sample in sample_ids.tolist()], bool)
