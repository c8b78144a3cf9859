"""A ranking of samples, with reasons."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from diffhook.notebook import Displayed


@dataclass(frozen=True)
class Ranking(Displayed):
    """Samples by descending score.

    Attributes:
        sample_ids: (N,) int64.
        scores: (N,) float64, descending; infinite for samples whose gradient was not finite.
        flags: per sample, what is to be said of it in words; often nothing.
        title: what the scores are.
    """

    sample_ids: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float64]
    flags: tuple[tuple[str, ...], ...]
    title: str

    @classmethod
    def sort(
        cls,
        sample_ids: npt.NDArray[np.int64],
        scores: npt.NDArray[np.float64],
        flags: list[list[str]],
        title: str,
    ) -> Ranking:
        """From samples in any order."""
        order = np.argsort(-scores, kind="stable")
        return cls(sample_ids[order], scores[order], tuple(tuple(flags[i]) for i in order), title)

    def __len__(self) -> int:
        return len(self.sample_ids)

    def records(self, k: int | None = None) -> list[dict[str, object]]:
        """The first k (or all) as dicts of rank, sample, score, flags."""
        return [
            {
                "rank": rank,
                "sample": int(sample),
                "score": float(score),
                "flags": "; ".join(flags),
            }
            for rank, (sample, score, flags) in enumerate(
                zip(self.sample_ids[:k], self.scores[:k], self.flags[:k], strict=True), 1
            )
        ]

    def to_csv(self, path: str | Path, k: int | None = None) -> None:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ["rank", "sample", "score", "flags"])
            writer.writeheader()
            writer.writerows(self.records(k))

    def to_json(self, path: str | Path, k: int | None = None) -> None:
        document = {"title": self.title, "samples": self.records(k)}
        Path(path).write_text(json.dumps(document, indent=1))
