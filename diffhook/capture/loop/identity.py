"""Which samples a batch holds, read off the batch itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffhook.errors import ConfigurationError
from diffhook.log.samples import ROLE, name_id

logger = logging.getLogger("diffhook")

KEYS = (
    "sample_ids", "sample_id", "indices", "index", "idx", "ids", "id", "image_ids", "image_id",
    "filenames", "filename", "file_names", "file_name", "paths", "path", "image_paths", "image_path",
    "__key__",
)  # fmt: skip
"""Keys under which batches are looked through for ids, the first that fits."""

_INDEX = "dataset index"


@dataclass(frozen=True)
class RowIds:
    """Whose rows a batch holds.

    Attributes:
        ids: (R,) int64, one for each row.
        source: where they came from.
    """

    ids: Tensor
    source: str


@dataclass(frozen=True)
class Unmatched:
    """Why it is not known whose rows a batch holds.

    Attributes:
        kind: of the reason, in a word.
        reason: what was found and what to do.
    """

    kind: str
    reason: str


class Identity:
    """Finds ids in batches, and remembers the names of samples that have one.

    Args:
        source: see ``sample_ids`` of :class:`~diffhook.capture.settings.Settings`.
    """

    def __init__(self, source: str | Callable[[Any], Any] | Literal[False] | None) -> None:
        self._source = source
        self.names: dict[int, str] = {}  #: id → name
        self.found = _INDEX  #: where the last batch's ids came from
        self.dataset: int | None = None  #: id() of that batch's, where known
        self._settled: dict[int | None, str] = {}  # per dataset, where its ids come from from now on
        self._warned: set[str] = set()

    @property
    def own_ids(self) -> bool:
        """Whether samples have ids of their own, which are not their index in the dataset."""
        return self.found != _INDEX

    def of(self, batch: Any, index: Tensor | None = None, dataset: int | None = None) -> Tensor | None:
        """(B,) int64 ids, or of every row where ``index`` is; None if the batch tells none.

        Args:
            index: indices in the dataset, where known; of every row where that is known.
            dataset: id() of the dataset. All batches of one have their ids from where the first has them.

        Raises:
            ConfigurationError: what ``source`` names holds no ids.
        """
        self.dataset = dataset
        ids = self._of(batch, index)
        if ids is None or index is None or ids is index:
            return ids
        if len(ids) == (items := _items(index)):
            ids = with_roles(ids, len(index) // items)
        self._warn_of_shared(ids, index)
        return ids

    def settled(self, dataset: int | None) -> bool:
        """Whether batches of that dataset have had ids."""
        return dataset in self._settled

    def _warn_of_shared(self, ids: Tensor, index: Tensor) -> None:
        if len(ids) != len(index) or "shared" in self._warned:
            return
        places: dict[int, int] = {}
        for sample, place in zip((ids % ROLE).tolist(), (index % ROLE).tolist(), strict=True):
            if places.setdefault(sample, place) != place:
                self._warn(
                    "shared",
                    "samples %d and %d of the dataset have the same id, %r (%s), and count as one sample in "
                    "every score: if they are two, pass sample_ids=... (a key, or a function of the batch), "
                    "or sample_ids=False for the index",
                    places[sample],
                    place,
                    self.names.get(sample, sample),
                    self.found,
                )
                return

    def _warn(self, what: str, message: str, *found: object) -> None:
        if what not in self._warned:
            self._warned.add(what)
            logger.warning(message, *found)

    def _of(self, batch: Any, index: Tensor | None) -> Tensor | None:
        if callable(self._source):
            return self.named(self._source(batch), "sample_ids(batch)")
        if self._source is False:
            return index
        if not isinstance(batch, Mapping):
            return None if self._source else index
        if self._source:
            found = batch.get(self._source)
            if found is None:
                if self.settled(self.dataset):
                    self._warn_of_none(batch, self._source)
                return None
            self._settled[self.dataset] = self._source
            return self.named(found, f"batch[{self._source!r}]")
        return self._well_known(batch, index)

    def named(self, values: Any, found: str) -> Tensor:
        """(B,) int64 ids of ``values``, which ``found`` names in messages.

        Raises:
            ConfigurationError: they are no ids.
        """
        ids = self._ids(values.flatten() if isinstance(values, Tensor) else values)
        if ids is None:
            raise ConfigurationError(
                f"{found} is {_describe(values)}; expected (B,) integers in [0, 2^51), or B strings"
            )
        self.found = found
        return ids

    def _well_known(self, batch: Mapping[str, Any], index: Tensor | None) -> Tensor | None:
        rows = next((len(v) for v in batch.values() if isinstance(v, Tensor) and v.dim() > 1), None)
        settled = self._settled.get(self.dataset)
        if settled == _INDEX:
            return self._by_index(index)
        for key in KEYS if settled is None else (settled,):
            ids = self._ids(batch[key]) if key in batch else None
            if ids is None or (rows is not None and rows % len(ids)):
                continue
            if index is None or len(ids) in (_items(index), rows):
                self._settled[self.dataset] = key
                self.found = f"batch[{key!r}]"
                return ids
        if settled is None:
            return self._by_index(index)
        self._warn_of_none(batch, settled)
        return None

    def _warn_of_none(self, batch: Mapping[str, Any], key: str) -> None:
        self._warn(
            "none",
            "batch[%r] is %s, where earlier batches had ids: such batches are not captured, since the log "
            "would know some samples by two ids",
            key,
            _describe(batch.get(key)),
        )

    def _by_index(self, index: Tensor | None) -> Tensor | None:
        if index is not None:
            self._settled[self.dataset] = self.found = _INDEX
        return index

    def _ids(self, values: Any) -> Tensor | None:
        ids = as_ids(values)
        if ids is not None and not isinstance(values, Tensor) and isinstance(values[0], str):
            self.names.update(zip(ids.tolist(), values, strict=True))
        return ids


def as_ids(values: Any) -> Tensor | None:
    """(B,) int64 of (B,) integers or B strings; None if ``values`` is anything else."""
    if not isinstance(values, Tensor):
        values = values.tolist() if hasattr(values, "tolist") else values  # numpy
        if not isinstance(values, Sequence) or isinstance(values, str) or not len(values):
            return None
        if all(isinstance(value, str) for value in values):
            return torch.tensor([name_id(value) for value in values])
        if not all(hasattr(value, "__index__") for value in values):
            return None
        values = torch.tensor([int(value) for value in values])
    if values.dim() != 1 or not len(values) or values.is_floating_point() or values.dtype == torch.bool:
        return None
    ids = values.detach().long()
    return ids if bool(((ids >= 0) & (ids < ROLE)).all()) else None


def with_roles(sample_ids: Tensor, blocks: int) -> Tensor:
    """(blocks · B,) ids of a batch in which every sample has several rows, block after block.

    That is how prior preservation is collated: B instance images, then their B class images.
    """
    return torch.cat([sample_ids + role * ROLE for role in range(blocks)])


def _items(index: Tensor) -> int:
    return int((index < ROLE).sum())


def blocks(ids: Tensor) -> int:
    """How many rows every sample of a batch has, given the (R,) ids of its rows; 1 if they differ."""
    first = ids < ROLE
    samples = int(first.sum()) if not bool(first.all()) else len(ids.unique())
    return len(ids) // samples if samples and len(ids) % samples == 0 else 1


def _describe(values: Any) -> str:
    if isinstance(values, Tensor):
        return f"a tensor of shape {tuple(values.shape)} and {values.dtype}"
    shown = repr(values)
    return shown if len(shown) < 60 else f"a {type(values).__name__} {shown[:50]}…"
