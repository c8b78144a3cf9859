"""Names for the samples of a run's second and further datasets, whose indices begin at 0 again."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffhook.log.samples import ROLE_STRIDE, name_id

_FOLDERS = ("root", "folder", "instance_data_root", "data_root", "data_dir", "image_dir", "train_data_dir")


class DatasetNames:
    """Samples of the first dataset are called by their index, those of others "label/index".

    Datasets count in the order in which they were prepared, so that a resumed run comes to the same names;
    of those prepared before the first batch, shuffled ones come first: validation data seldom are.
    """

    def __init__(self) -> None:
        self._labels: dict[int, str] = {}  # id() → label, "" of the first
        self._datasets: list[Any] = []  # kept alive, so that no other gets the id() of one that is gone
        self._shuffled = 0  # of them, at the head

    def add(self, dataset: Any, *, shuffled: bool = False) -> bool:
        """A loader over ``dataset`` was prepared. Returns whether it is the first dataset from now on."""
        if self.knows(dataset):
            return False
        place = self._shuffled if shuffled and not self._labels else len(self._datasets)
        self._shuffled += shuffled
        self._datasets.insert(place, dataset)
        return place == 0

    def knows(self, dataset: Any) -> bool:
        """Whether a loader over ``dataset`` was prepared."""
        return any(dataset is known for known in self._datasets)

    def _label(self, dataset: Any) -> str:
        """What a dataset's samples are called by besides their index; "" for the first dataset."""
        self.add(dataset)
        for known in self._datasets:
            if id(known) not in self._labels:
                self._labels[id(known)] = self._new_label(known) if self._labels else ""
        return self._labels[id(dataset)]

    @property
    def is_one(self) -> bool:
        """Whether there is one dataset, and so as many samples as it has."""
        return len(self._datasets) == 1

    def _new_label(self, dataset: Any) -> str:
        number = len(self._labels) + 1
        label = _folder(dataset) or f"dataset-{number}"
        return f"{label}-{number}" if label in self._labels.values() else label

    def ids(self, dataset: Any, rows: Tensor) -> tuple[Tensor, dict[int, str]]:
        """(R,) int64 ids of rows whose indices (+ role · ROLE_STRIDE) are known, and the names of these."""
        label = self._label(dataset)
        if not label:
            return rows, {}
        named = {index: f"{label}/{index}" for index in (rows % ROLE_STRIDE).unique().tolist()}
        ids = {index: name_id(name) for index, name in named.items()}
        found = [ids[row % ROLE_STRIDE] + row // ROLE_STRIDE * ROLE_STRIDE for row in rows.tolist()]
        return torch.tensor(found, dtype=torch.int64), {ids[index]: name for index, name in named.items()}

    def indices(self, dataset: Any, samples: frozenset[int], names: Mapping[int, str]) -> frozenset[int]:
        """Where samples that are called by their index lie in the dataset."""
        label = self._label(dataset)
        if not label:
            return samples - names.keys()
        pattern = re.compile(re.escape(label) + r"/(\d+)")
        found = (pattern.fullmatch(names.get(sample, "")) for sample in samples)
        return frozenset(int(match[1]) for match in found if match)


def _folder(dataset: Any) -> str:
    """The last part of the dataset's folder, or its name, where it has one."""
    for name in _FOLDERS:
        value = getattr(dataset, name, None)
        if isinstance(value, str | os.PathLike) and (base := os.path.basename(os.path.normpath(value))):
            return base
    called = getattr(getattr(dataset, "info", None), "dataset_name", None)
    return called if isinstance(called, str) else ""
