"""A ranking of samples, with reasons, and what one does with it: files, and datasets without them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from diffhook.analysis.reason import Reason
from diffhook.analysis.roles import of_role, role_of
from diffhook.errors import ConfigurationError
from diffhook.log.samples import NAMES_AS_THEY_ARE, ROLE_STRIDE, name_id, sample_words, split_id
from diffhook.notebook import Displayed
from diffhook.words import number, plural, spreadsheet_cell, table

if TYPE_CHECKING:
    from torch.utils.data import Sampler, Subset

_SHOWN = 10  # samples of a repr


@dataclass(frozen=True)
class Labels:
    """Of N samples in words, "" where they are not known.

    Attributes:
        own: their labels.
        better: of the other labels the one that fits best.
    """

    own: tuple[str, ...]
    better: tuple[str, ...]

    def take(self, positions: Iterable[int]) -> Labels:
        """Of the samples at these positions."""
        chosen = list(positions)
        return Labels(tuple(self.own[i] for i in chosen), tuple(self.better[i] for i in chosen))


@dataclass(frozen=True)
class Ranking(Displayed):
    """Samples by descending score.

    Attributes:
        sample_ids: (N,) int64.
        scores: (N,) float64, descending; infinite for samples whose gradient was not finite.
        reasons: per sample, what is to be said of it in words; often nothing.
        title: what the scores are.
        signals: name → (N,) float64, what the scores were made of; NaN where a signal knows nothing.
        names: id → name, of samples that have one.
        thumbnails: id → PNG, where the log keeps them: what a notebook shows.
        counted: names of the signals that are in the score.
        labels: the samples' labels and those that fit better, where the log or the user tells them.
        regularisation: ids of the samples that are regularisation images.
    """

    sample_ids: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float64]
    reasons: tuple[tuple[str, ...], ...]
    title: str
    signals: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    names: Mapping[int, str] = field(default_factory=dict)
    thumbnails: Mapping[int, bytes] = field(default_factory=dict)
    counted: tuple[str, ...] = ()
    labels: Labels | None = None
    regularisation: frozenset[int] = frozenset()

    @classmethod
    def sort(
        cls,
        sample_ids: npt.NDArray[np.int64],
        scores: npt.NDArray[np.float64],
        reasons: list[list[str]],
        title: str,
        signals: Mapping[str, npt.NDArray[np.float64]] | None = None,
        names: Mapping[int, str] | None = None,
        thumbnails: Mapping[int, bytes] | None = None,
        counted: Sequence[str] = (),
        labels: Labels | None = None,
    ) -> Ranking:
        """From samples in any order."""
        order = np.argsort(-scores, kind="stable")
        said = tuple(tuple(reasons[i]) for i in order)
        sorted_signals = {name: values[order] for name, values in (signals or {}).items()}
        ids, values = sample_ids[order], scores[order]
        own = labels and labels.take(order.tolist())
        return cls(
            ids, values, said, title, sorted_signals, names or {}, thumbnails or {}, tuple(counted), own
        )

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __repr__(self) -> str:
        rows = [
            (
                rank,
                self.named(int(sample)),
                number(float(score)),
                "; ".join(Reason.of(each).brief for each in reasons),
            )
            for rank, (sample, score, reasons) in enumerate(
                zip(self.sample_ids[:_SHOWN], self.scores[:_SHOWN], self.reasons[:_SHOWN], strict=True), 1
            )
        ]
        more = f"\n… and {len(self) - _SHOWN:,} more" if len(self) > _SHOWN else ""
        listed = table(("rank", "sample", "score", "reasons"), rows) if rows else "nothing"
        return f"Ranking of {plural(len(self), 'sample')}: {self.title}\n{listed}{more}"

    def take(self, positions: Any) -> Ranking:
        """The samples at these positions, a slice, or where a mask (N,) is true; in that order."""
        signals = {name: values[positions] for name, values in self.signals.items()}
        chosen = np.arange(len(self))[positions].tolist()
        reasons = tuple(self.reasons[i] for i in chosen)
        return replace(
            self,
            labels=self.labels and self.labels.take(chosen),
            sample_ids=self.sample_ids[positions],
            scores=self.scores[positions],
            reasons=reasons,
            signals=signals,
        )

    def of_role(self, role: str) -> Ranking:
        """The samples that are "training" or "regularisation" images.

        Raises:
            ConfigurationError: it is neither.
        """
        return self.take(of_role(self.sample_ids, self.regularisation, role))

    def records(self, k: int | None = None) -> list[dict[str, Any]]:
        """The first k (or all) as dicts of rank, sample, name (where samples have names), role (where some
        are regularisation images), score, reasons, and a key for each signal."""
        columns = self._columns(k)
        lists = (values.tolist() if isinstance(values, np.ndarray) else values for values in columns.values())
        rows = zip(*lists, strict=True)
        return [{"rank": rank, **dict(zip(columns, row, strict=True))} for rank, row in enumerate(rows, 1)]

    def _columns(self, k: int | None) -> dict[str, Any]:
        """What :meth:`records` has besides the rank, column by column."""
        ids = self.sample_ids[:k].tolist()
        roles = [role_of(sample, self.regularisation) for sample in ids]
        return {
            "sample": self.sample_ids[:k],
            **({"name": [self._name(sample) for sample in ids]} if self.names else {}),
            **({"role": roles} if self.regularisation else {}),
            "score": self.scores[:k],
            "reasons": ["; ".join(each) for each in self.reasons[:k]],
            **{name: values[:k] for name, values in self.signals.items()},
        }

    # ── files ─────────────────────────────────────────────────────────────────────────────────

    def to_csv(self, path: str | Path, k: int | None = None) -> None:
        with open(path, "w", newline="", encoding="utf-8", errors=NAMES_AS_THEY_ARE) as file:
            writer = csv.DictWriter(file, ["rank", *self._columns(0)])
            writer.writeheader()
            writer.writerows(
                {key: spreadsheet_cell(v) if isinstance(v, str) else v for key, v in record.items()}
                for record in self.records(k)
            )

    def to_json(self, path: str | Path, k: int | None = None) -> None:
        document = {"title": self.title, "samples": self.records(k)}
        Path(path).write_text(json.dumps(document, indent=1))

    def to_parquet(self, path: str | Path, k: int | None = None) -> None:
        """Needs the extra "parquet"."""
        from diffhook.analysis.parquet import write_parquet

        write_parquet(path, self._columns(k))

    def exclude(self, path: str | Path, k: int | None = None, *, threshold: float | None = None) -> None:
        """Write :meth:`excluded`, a line each: the name of a sample that has one of one line, the id of any
        other."""
        ids = self.excluded(k, threshold=threshold).tolist()
        names = {sample: self.named(sample) for sample in ids}
        lines = "".join(f"{n if len(n.splitlines()) == 1 else sample}\n" for sample, n in names.items())
        Path(path).write_text(lines, encoding="utf-8", errors=NAMES_AS_THEY_ARE)

    def named(self, sample: int) -> str:
        """The sample's name, or its id where it has none; and "(class)" after it for its class image."""
        return sample_words(sample, self.names)

    def _name(self, sample: int) -> str:
        """Nothing where it has none."""
        return self.named(sample) if split_id(sample)[0] in self.names else ""

    # ── datasets ──────────────────────────────────────────────────────────────────────────────

    def excluded(self, k: int | None = None, *, threshold: float | None = None) -> npt.NDArray[np.int64]:
        """Ids of the first k samples, or of those that score more than the threshold; strongest first.

        A further row of a sample (the class image of prior preservation) stands for its sample, once: a
        dataset has no other way to leave it out.

        Raises:
            ConfigurationError: not exactly one of both is given, or k is negative.
        """
        if (k is None) == (threshold is None):
            raise ConfigurationError(f"k is {k} and threshold is {threshold}; expected exactly one of them")
        if k is not None and k < 0:
            raise ConfigurationError(f"k is {k}; expected 0 or more")
        found = self.sample_ids[:k] if threshold is None else self.sample_ids[self.scores > threshold]
        own = found % ROLE_STRIDE
        return own[np.sort(np.unique(own, return_index=True)[1])]

    def keep(
        self,
        dataset: Any,
        k: int | None = None,
        *,
        threshold: float | None = None,
        names: Sequence[str | int] | None = None,
    ) -> Subset[Any]:
        """The dataset without the first k samples, or those that score more than the threshold.

        In the subset, indices count anew: a log of a run on it has its own ids. A
        :meth:`sampler` keeps them.

        Args:
            names: of the dataset's samples, in order, what the training's batches named them by: strings,
                or integers. By default ids are taken for indices in the dataset, which they are unless
                batches held ids of their own.

        Raises:
            ConfigurationError: not exactly one of k and threshold; samples that are not in the dataset,
                or that have names while ``names`` is not given.
        """
        from torch.utils.data import Subset

        return Subset(dataset, self._kept(len(dataset), k, threshold, names).tolist())

    def sampler(
        self,
        dataset: Any,
        k: int | None = None,
        *,
        threshold: float | None = None,
        names: Sequence[str | int] | None = None,
        shuffle: bool = True,
        seed: int = 0,
    ) -> Sampler[int]:
        """Indices of the whole dataset without those of :meth:`excluded`; reshuffled every epoch.

        Arguments and errors are those of :meth:`keep`.
        """
        from diffhook.analysis.sampler import KeptSampler

        return KeptSampler(self._kept(len(dataset), k, threshold, names), shuffle=shuffle, seed=seed)

    def _kept(
        self, size: int, k: int | None, threshold: float | None, names: Sequence[str | int] | None
    ) -> npt.NDArray[np.intp]:
        ids = self.excluded(k, threshold=threshold)
        own = np.arange(size) if names is None else _ids(names)
        if len(own) != size:
            raise ConfigurationError(f"there are {len(own)} names for a dataset of {size} samples")
        foreign = ids[~np.isin(ids, own)]
        if len(foreign):
            raise ConfigurationError(self._foreign(int(foreign[0]), size, names))
        return np.flatnonzero(~np.isin(own, ids))

    def _foreign(self, sample: int, size: int, names: Sequence[str | int] | None) -> str:
        """What is to be said of a sample that the dataset does not have."""
        begin = f"the ranking excludes sample {self.named(sample)}"
        if names is not None:
            given = f", such as {names[0]!r}" if len(names) else ""
            return f"{begin}, which is not among the names of the dataset{given}"
        if sample in self.names:
            return (
                f"{begin}, and a dataset does not tell which of its samples that is: pass names=, what the "
                "training's batches named the dataset's samples by, in the dataset's order"
            )
        return f"{begin}, but the dataset has {size} samples: is it the one that was trained on?"


def _ids(names: Sequence[str | int]) -> npt.NDArray[np.int64]:
    """(N,) ids of samples by what a batch names them."""
    return np.array([name_id(name) if isinstance(name, str) else int(name) for name in names], np.int64)
