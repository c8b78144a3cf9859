"""Which samples a batch holds: ids that are shown to be its rows', or the reason why there are none."""

from __future__ import annotations

import difflib
import inspect
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffhook.capture.loop.identity.batch_ids import as_ids, candidates, describe, fields_of, flat, leading
from diffhook.capture.loop.identity.dataset_names import DatasetNames
from diffhook.capture.loop.identity.index_check import IndexCheck
from diffhook.capture.loop.identity.origin import Origin
from diffhook.capture.samples.appearance import images_of
from diffhook.capture.samples.regularisation import regularisation_ids
from diffhook.errors import ConfigurationError
from diffhook.log.samples import ROLE_STRIDE

logger = logging.getLogger("diffhook")

INDEX = "dataset index"

_WAY_OUT = (
    "put an id of each row into the batch (batch['ids'], say), pass sample_ids=function of the batch, or "
    "name the samples with hook.step(sample_ids=...)"
)
_REASONS = {
    "unordered": "the rows of the batch are not recognised as the items that were collated, so it is not "
    "known whose they are",
    "contradiction": "some values of the batch are in the order of the items and others in another, so it is "
    "not known whose its rows are",
    "ambiguous": "several items of the batch look alike and the collation is not seen to keep their order, "
    "so it is not known which row is whose",
    "dropped": "the collation gave another number of rows than it got items, and they are not recognised as "
    "items",
    "ready-made-batch": "an item of the dataset is a batch already, and one id cannot stand for its rows",
    "no-ids": "the batch comes without dataset indices, and holds no ids under a well-known key",
    "unprepared": "no dataset index comes with the batch, since its loader is not the one that "
    "accelerator.prepare returned (an iterator made before prepare goes over your own), and it has no "
    "ids under a well-known key",
    "index-moves": "the dataset gives other samples under the same indices from one time to the next, so its "
    "indices are no ids (a dataset that shuffles itself anew at each epoch, or draws at random)",
    "failed": "an error of ours has kept it from being seen which samples the batch holds",
}


@dataclass(frozen=True)
class RowIds:
    """The samples of a batch.

    Attributes:
        ids: (R,) int64, one for each row; of further ones, such as class images, + role · ROLE_STRIDE.
        source: where they came from, for people: "dataset index", "batch['filenames']".
    """

    ids: Tensor
    source: str


@dataclass(frozen=True)
class Unmatched:
    """Why the samples of a batch are not known.

    Attributes:
        kind: for programs, and for telling each kind once: one of :class:`Origin`, "no-such-key" or "shared".
        reason: what was found and what to do.
    """

    kind: str
    reason: str


class Identity:
    """Finds ids in batches, and remembers the names of samples that have one.

    Args:
        source: see ``sample_ids`` of :class:`~diffhook.capture.settings.Settings`.
    """

    def __init__(self, source: str | Callable[..., Any] | Literal[False] | None) -> None:
        self._source = source
        self._takes_indices = callable(source) and _positional(source) >= 2
        self.names: dict[int, str] = {}  #: id → name
        self.regularisation: set[int] = set()  #: ids of the samples that batches call regularisation images
        self.found = INDEX  #: where the last batch's ids came from
        self.datasets = DatasetNames()
        self._checks: dict[int, IndexCheck] = defaultdict(IndexCheck)  # by id() of datasets
        self._settled: dict[int, str] = {}  # id() of a dataset → where its ids come from from now on
        self._warned = False  # of samples that share an id
        self._waits = True

    def of(
        self, batch: Any, origin: Origin | None = None, *, waits: bool = True
    ) -> RowIds | Unmatched | None:
        """The ids of a batch's rows, or why they are not known; None if nothing is known of the batch at all.

        Args:
            origin: where the batch came from, if it came from a loader that is watched. All batches of one
                dataset have their ids from where the first has them.
            waits: whether an accelerator may be waited for, to look at what it holds.

        Raises:
            ConfigurationError: what ``source`` names holds no ids.
        """
        self._waits = waits
        found = self._of(batch, origin)
        if isinstance(found, RowIds):
            self.found = found.source
            self.regularisation |= regularisation_ids(fields_of(batch), found.ids)
            if origin is not None:
                self._settled.setdefault(id(origin.dataset), found.source)
                if not self._takes_indices:
                    self._warn_of_shared(found, origin)
        return found

    @property
    def telling_names(self) -> dict[int, str] | None:
        """Names that can show that samples are another dataset's; None where there are several datasets."""
        return self.names if self.datasets.is_one else None

    def by_index(self, dataset: Any) -> bool:
        """Whether the samples of a dataset are called by their index in it."""
        return self._settled.get(id(dataset), INDEX) == INDEX

    def named(self, values: Any, found: str) -> Tensor:
        """(B,) int64 ids of ``values``, which ``found`` names in messages.

        Raises:
            ConfigurationError: they are no ids.
        """
        ids = self._ids(values.flatten() if isinstance(values, Tensor) else values, None)
        if ids is None:
            raise ConfigurationError(
                f"{found} is {describe(values)}; expected (B,) integers in [0, 2^51), or B strings"
            )
        self.found = found
        return ids

    def _of(self, batch: Any, origin: Origin | None) -> RowIds | Unmatched | None:
        if callable(self._source):
            return self._by_function(self._source, batch, origin)
        batch = fields_of(batch)
        if self._source is False:
            return self._by_index(batch, origin)
        if self._source:
            return self._by_key(self._source, batch, origin)
        return self._by_well_known_key(batch, origin)

    # ── where ids come from ───────────────────────────────────────────────────────────────────

    def _by_function(
        self, function: Callable[..., Any], batch: Any, origin: Origin | None
    ) -> RowIds | Unmatched | None:
        if not self._takes_indices:
            return self._lifted(
                self.named(function(batch), "sample_ids(batch)"), "sample_ids(batch)", batch, origin
            )
        by_index = self._by_index(batch, origin)
        if origin is None or origin.rows is None or not isinstance(by_index, RowIds):
            return by_index
        indices = origin.rows[origin.rows < ROLE_STRIDE]
        source = "sample_ids(batch, indices)"
        return self._lifted(self.named(function(batch, indices), source), source, batch, origin)

    def _by_key(self, key: str, batch: Any, origin: Origin | None) -> RowIds | Unmatched | None:
        found = batch.get(key) if isinstance(batch, Mapping) else None
        if found is None:
            missing = self._missing(key, batch, origin)
            return missing or Unmatched("no-such-key", _no_such_key(key, batch))
        ids = self._ids(found, leading(batch))
        source = f"batch[{key!r}]"
        return self._lifted(self.named(found, source) if ids is None else ids, source, batch, origin)

    def _by_well_known_key(self, batch: Any, origin: Origin | None) -> RowIds | Unmatched | None:
        settled = None if origin is None else self._settled.get(id(origin.dataset))
        if not isinstance(batch, Mapping) or settled == INDEX:
            return self._by_index(batch, origin)
        if origin is not None and origin.kind == "contradiction":
            return _unknown(origin)
        lifted: RowIds | Unmatched | None = None
        for source, values in candidates(batch):
            ids = self._ids(values, leading(batch)) if settled in (None, source) else None
            lifted = lifted if ids is None else self._lifted(ids, source, batch, origin)
            if isinstance(lifted, RowIds):
                return lifted
        if settled is not None:
            return self._missing(settled, batch, origin)
        by_index = self._by_index(batch, origin)
        return lifted if lifted is not None and not isinstance(by_index, RowIds) else by_index

    def _by_index(self, batch: Any, origin: Origin | None) -> RowIds | Unmatched | None:
        if origin is None:
            return None
        if origin.rows is None:
            return _unknown(origin)
        if origin.streamed:
            return RowIds(origin.rows, INDEX)
        if not self._names_samples(batch, origin.dataset, origin.rows):
            return Unmatched("index-moves", f"{_REASONS['index-moves']}: {_WAY_OUT}")
        ids, names = self.datasets.ids(origin.dataset, origin.rows)
        self.names.update(names)
        return RowIds(ids, INDEX)

    def _names_samples(self, batch: Any, dataset: Any, rows: Tensor) -> bool:
        """Whether the indices of a batch's rows stand for what they stood for before."""
        check, images = self._checks[id(dataset)], images_of(batch)
        if images is not None and len(images) == len(rows) and (self._waits or images.device.type == "cpu"):
            check.see(rows.tolist(), images)
        return check.believed

    def _missing(self, source: str, batch: Any, origin: Origin | None) -> Unmatched | None:
        """Of batches that lack what earlier ones of their dataset had."""
        if origin is None or id(origin.dataset) not in self._settled:
            return None
        key = source.removeprefix("batch[").partition("]")[0].strip("'\"")
        held = describe(batch.get(key)) if isinstance(batch, Mapping) else describe(batch)
        return Unmatched(
            "no-ids",
            f"batch[{key!r}] is {held}, where earlier batches had ids: such batches are not captured, since "
            "the log would know some samples by two ids",
        )

    def _ids(self, values: Any, lead: tuple[int, ...] | None) -> Tensor | None:
        ids = as_ids(values, lead)
        held = None if ids is None else flat(values, lead)
        if ids is not None and isinstance(held, list) and isinstance(held[0], str):
            self.names.update(zip(ids.tolist(), held, strict=True))
        return ids

    # ── whose rows they are ───────────────────────────────────────────────────────────────────

    def _lifted(self, ids: Tensor, source: str, batch: Any, origin: Origin | None) -> RowIds | Unmatched:
        """From one id for each sample to one for each row."""
        lead = leading(batch)
        known = None if origin is None else origin.rows
        rows = len(known) if known is not None else lead[0] if lead else len(ids)
        if len(ids) == rows or (lead and len(ids) == math.prod(lead) and (lead[0] == 1 or known is None)):
            return RowIds(ids, source)
        if known is not None and (own := _by_item(ids, known)) is not None:
            return RowIds(own, source)
        if known is None and len(ids) > 1 and rows % len(ids) == 0:
            return RowIds(ids, source)  # the loop may name every row with hook.step
        count = f"{len(ids)} ids" if len(ids) > 1 else "one id"
        return Unmatched("shared", f"{source} has {count} for {rows} rows of the batch: {_WAY_OUT}")

    def _warn_of_shared(self, found: RowIds, origin: Origin) -> None:
        rows = origin.rows
        if self._warned or rows is None or len(found.ids) != len(rows):
            return
        places: dict[int, int] = {}
        for sample, place in zip(
            (found.ids % ROLE_STRIDE).tolist(), (rows % ROLE_STRIDE).tolist(), strict=True
        ):
            if places.setdefault(sample, place) != place:
                self._warned = True
                logger.warning(
                    "samples %d and %d of the dataset have the same id, %r (%s), and count as one sample in "
                    "every score: if they are two, pass sample_ids=... (a key, or a function of the batch), "
                    "or sample_ids=False for the index",
                    places[sample],
                    place,
                    self.names.get(sample, sample),
                    found.source,
                )
                return


def blocks(ids: Tensor) -> int:
    """How many rows every sample of a batch has, given the (R,) ids of its rows; 1 if they differ."""
    first = ids < ROLE_STRIDE
    samples = int(first.sum()) if not bool(first.all()) else len(ids.unique())
    return len(ids) // samples if samples and len(ids) % samples == 0 else 1


def _by_item(ids: Tensor, rows: Tensor) -> Tensor | None:
    """(R,) ids of rows, given those of the items in the order of their first rows."""
    items = rows[rows < ROLE_STRIDE].tolist()
    if (
        len(items) != len(ids)
        or len(set(items)) != len(items)
        or not {r % ROLE_STRIDE for r in rows.tolist()} <= set(items)
    ):
        return None
    own = dict(zip(items, ids.tolist(), strict=True))
    return torch.tensor(
        [own[row % ROLE_STRIDE] + row // ROLE_STRIDE * ROLE_STRIDE for row in rows.tolist()],
        dtype=torch.int64,
    )


def _unknown(origin: Origin) -> Unmatched:
    kind = origin.kind or "no-ids"
    instead = "iterate over the loader that prepare returns, " if kind == "unprepared" else ""
    return Unmatched(kind, f"{_REASONS[kind]}: {instead}{_WAY_OUT}")


def _no_such_key(key: str, batch: Any) -> str:
    if not isinstance(batch, Mapping):
        kind = type(batch).__name__
        return (
            f"sample_ids={key!r} is a key, but the batch is a {kind}: pass sample_ids=function of the batch"
        )
    keys = [str(name) for name in batch]
    close = difflib.get_close_matches(key, keys, 1)
    guess = f" Did you mean {close[0]!r}?" if close else ""
    return f"the batch has no key {key!r} (sample_ids); it has {', '.join(map(repr, keys)) or 'none'}.{guess}"


def _positional(function: Callable[..., Any]) -> int:
    """How many arguments a function must be given by position."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some that are written in C
        return 1
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds and p.default is p.empty for p in parameters)
