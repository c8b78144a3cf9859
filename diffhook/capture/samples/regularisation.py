"""Which rows of a batch its trainer calls regularisation images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt
from torch import Tensor

from diffhook.log.samples import ROLE_STRIDE

_MARKS = ("is_reg", "is_regularisation_data")  # of ai-toolkit's items; of SimpleTuner's batches
_CONCEPTS = "concept_type"  # of OneTrainer's
_PRIOR = "PRIOR_PREDICTION"


def regularisation_ids(batch: Any, ids: Tensor) -> set[int]:
    """Ids of the rows that are regularisation images, as far as the batch tells.

    Args:
        batch: as the loop has it; of an object, its attributes by name.
        ids: (R,) int64, of its rows.
    """
    marks = _marks(batch) if isinstance(batch, Mapping) else None
    if isinstance(marks, bool):
        return set(ids.tolist()) if marks else set()
    if marks is None or len(marks) != len(ids):
        return set()
    return {sample for sample, mark in zip(ids.tolist(), marks, strict=True) if mark}


def roles(ids: Tensor, regularisation: Set[int]) -> npt.NDArray[np.int64]:
    """(R,) of rows: of a class image, or 1 of a regularisation image; 0 otherwise.

    Args:
        ids: (R,) int64.
        regularisation: ids of samples that are regularisation images.
    """
    return np.array([sample // ROLE_STRIDE or int(sample in regularisation) for sample in ids.tolist()])


def _marks(batch: Mapping[str, Any]) -> bool | list[bool] | None:
    """Of the whole batch, or of each row; None where it tells of none."""
    for name in _MARKS:
        found = batch.get(name)
        if isinstance(found, Tensor):
            found = found.tolist()
        if isinstance(found, bool):
            return found
        if _are_marks(found):
            return list(found)
    concepts = batch.get(_CONCEPTS)
    if isinstance(concepts, list | tuple) and all(isinstance(concept, str) for concept in concepts):
        return [concept == _PRIOR for concept in concepts]
    held = ([getattr(item, _MARKS[0], None) for item in v] for v in batch.values() if isinstance(v, list))
    return next((list(marks) for marks in held if _are_marks(marks)), None)


def _are_marks(values: Any) -> TypeGuard[Sequence[bool]]:
    return isinstance(values, list | tuple) and bool(values) and all(isinstance(v, bool) for v in values)
