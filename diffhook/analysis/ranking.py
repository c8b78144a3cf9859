"""A ranking of samples, with reasons, and what one does with it: files, and datasets without them."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from diffhook.errors import ConfigurationError
from diffhook.notebook import Displayed

if TYPE_CHECKING:
    from torch.utils.data import Sampler, Subset


@dataclass(frozen=True)
class Ranking(Displayed):
    """Samples by descending score.

    Attributes:
        sample_ids: (N,) int64.
        scores: (N,) float64, descending; infinite for samples whose gradient was not finite.
        flags: per sample, what is to be said of it in words; often nothing.
        title: what the scores are.
        parts: name → (N,) float64, what the scores were made of; NaN where a part knows nothing.
    """

    sample_ids: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float64]
    flags: tuple[tuple[str, ...], ...]
    title: str
    parts: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict)

    @classmethod
    def sort(
        cls,
        sample_ids: npt.NDArray[np.int64],
        scores: npt.NDArray[np.float64],
        flags: list[list[str]],
        title: str,
        parts: Mapping[str, npt.NDArray[np.float64]] | None = None,
    ) -> Ranking:
        """From samples in any order."""
        order = np.argsort(-scores, kind="stable")
        words = tuple(tuple(flags[i]) for i in order)
        sorted_parts = {name: values[order] for name, values in (parts or {}).items()}
        return cls(sample_ids[order], scores[order], words, title, sorted_parts)

    def __len__(self) -> int:
        return len(self.sample_ids)

    def records(self, k: int | None = None) -> list[dict[str, Any]]:
        """The first k (or all) as dicts of rank, sample, score, flags, and a key for each part."""
        return [
            {
                "rank": rank,
                "sample": int(sample),
                "score": float(score),
                "flags": "; ".join(flags),
                **{name: float(values[rank - 1]) for name, values in self.parts.items()},
            }
            for rank, (sample, score, flags) in enumerate(
                zip(self.sample_ids[:k], self.scores[:k], self.flags[:k], strict=True), 1
            )
        ]

    # ── files ─────────────────────────────────────────────────────────────────────────────────

    def to_csv(self, path: str | Path, k: int | None = None) -> None:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ["rank", "sample", "score", "flags", *self.parts])
            writer.writeheader()
            writer.writerows(self.records(k))

    def to_json(self, path: str | Path, k: int | None = None) -> None:
        document = {"title": self.title, "samples": self.records(k)}
        Path(path).write_text(json.dumps(document, indent=1))

    def to_parquet(self, path: str | Path, k: int | None = None) -> None:
        """Needs the extra "parquet"."""
        from diffhook.analysis.parquet import write_parquet

        columns = {
            "sample": self.sample_ids[:k],
            "score": self.scores[:k],
            "flags": ["; ".join(flags) for flags in self.flags[:k]],
            **{name: values[:k] for name, values in self.parts.items()},
        }
        write_parquet(path, columns)

    def exclude(self, path: str | Path, k: int | None = None, *, threshold: float | None = None) -> None:
        """Write the ids of :meth:`excluded`, a line each."""
        ids = self.excluded(k, threshold=threshold)
        Path(path).write_text("".join(f"{sample}\n" for sample in ids))

    # ── datasets ──────────────────────────────────────────────────────────────────────────────

    def excluded(self, k: int | None = None, *, threshold: float | None = None) -> npt.NDArray[np.int64]:
        """Ids of the first k samples, or of those that score more than the threshold; strongest first.

        Raises:
            ConfigurationError: not exactly one of both is given, or k is negative.
        """
        if (k is None) == (threshold is None):
            raise ConfigurationError(f"k is {k} and threshold is {threshold}; expected exactly one of them")
        if k is not None and k < 0:
            raise ConfigurationError(f"k is {k}; expected 0 or more")
        return self.sample_ids[:k] if threshold is None else self.sample_ids[self.scores > threshold]

    def keep(self, dataset: Any, k: int | None = None, *, threshold: float | None = None) -> Subset[Any]:
        """The dataset without the first k samples, or those that score more than the threshold.

        In the subset, indices count anew: a log of a run on it has its own ids. A
        :meth:`sampler` keeps them.
        """
        from torch.utils.data import Subset

        return Subset(dataset, self._kept(len(dataset), k, threshold).tolist())

    def sampler(
        self,
        dataset: Any,
        k: int | None = None,
        *,
        threshold: float | None = None,
        shuffle: bool = True,
        seed: int = 0,
    ) -> Sampler[int]:
        """Indices of the whole dataset without those of :meth:`excluded`; reshuffled every epoch."""
        from diffhook.analysis.sampler import KeptSampler

        return KeptSampler(self._kept(len(dataset), k, threshold), shuffle=shuffle, seed=seed)

    def _kept(self, size: int, k: int | None, threshold: float | None) -> npt.NDArray[np.int64]:
        ids = self.excluded(k, threshold=threshold)
        if len(ids) and ids.max() >= size:
            raise ConfigurationError(
                f"the ranking excludes sample {ids.max()}, but the dataset has {size} samples: is it "
                "the one that was trained on?"
            )
        return np.setdiff1d(np.arange(size), ids)
