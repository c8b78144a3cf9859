"""Which samples are broken, mislabelled, or pull the model alone."""

from __future__ import annotations

import numpy as np

from diffhook.analysis.ranking import Ranking
from diffhook.analysis.standardize import standardized_norms
from diffhook.analysis.tables import source_table
from diffhook.log import RunLog

_NOTABLE = 3.0  # robust standard deviations


def outliers(log: RunLog, source: str = "train") -> Ranking:
    """Rank samples by their gradient norm, standardised within timestep bins, mean over visits.

    Norms depend strongly on the timestep, so each is compared with those near the same timestep and
    at the same stage of training: score = mean of (log norm − median) / (1.4826 · MAD). Needs norms
    only, so it works on a log captured with projection_dim=0.

    Raises:
        LogError: no rows.
    """
    table = source_table(log, source, projected=False)
    deviation = standardized_norms(table)
    ids, position = np.unique(table["sample"], return_inverse=True)
    known = ~np.isnan(deviation)
    infinite = np.bincount(position, np.isinf(deviation), len(ids))
    usable = known & np.isfinite(deviation)
    visits = np.bincount(position, usable, len(ids))
    total = np.bincount(position, np.where(usable, deviation, 0.0), len(ids))
    notable = np.bincount(position, usable & (deviation > _NOTABLE), len(ids))
    scores = np.divide(total, visits, out=np.zeros(len(ids)), where=visits > 0)
    scores[infinite > 0] = np.inf
    flags = [
        _reasons(int(bad), int(high), int(seen))
        for bad, high, seen in zip(infinite, notable, visits, strict=True)
    ]
    title = f"outliers: gradient norm standardised within timestep bins ({source} rows)"
    return Ranking.sort(ids, scores, flags, title)


def _reasons(infinite: int, notable: int, visits: int) -> list[str]:
    reasons = []
    if infinite:
        reasons.append(f"gradient not finite on {infinite} of {infinite + visits} visits")
    if notable:
        reasons.append(f"norm far above its timestep's on {notable} of {visits} visits")
    return reasons
