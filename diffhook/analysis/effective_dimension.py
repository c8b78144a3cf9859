"""Is the projection large enough? How many dimensions the samples' gradients fill, against D."""

from __future__ import annotations

from dataclasses import dataclass

from diffhook.analysis.defaults import as_log, best_source
from diffhook.analysis.execution import HERE, Execution
from diffhook.analysis.grouped import distinct_samples
from diffhook.analysis.methods import WhitenedReTrac, whitening
from diffhook.analysis.sample_sums import sample_sums
from diffhook.analysis.tables import snapshot_steps, source_table
from diffhook.log import RunLog
from diffhook.log.store import Location

_FULL = 0.5  # of D; a sketch that is filled further mixes up what it should tell apart
# Of a sample's own share of the trace, tr(ΦᵀΦ)/N: what is below that tells no sample from another.
_RIDGE = 0.03


class _UnitMeans(WhitenedReTrac):
    """The samples' mean unit gradients Φ at each snapshot."""

    requires = frozenset({"grams"})


@dataclass(frozen=True)
class EffectiveDimension:
    """How many directions the samples' mean unit gradients fill at a snapshot.

    Attributes:
        value: tr(ΦᵀΦ (ΦᵀΦ + λI)⁻¹) with λ = 0.03 · tr(ΦᵀΦ)/N, at the snapshot where it is largest.
        dim: D.
        samples: N; the value is below it, too.
        source: whose rows.
        step: the snapshot's.
    """

    value: float
    dim: int
    samples: int
    source: str
    step: int

    @property
    def enough(self) -> bool:
        """Whether D leaves room."""
        return self.value <= _FULL * self.dim

    def __str__(self) -> str:
        so = "D is enough" if self.enough else "a larger projection_dim would tell samples apart better"
        return (
            f"the gradients of {self.samples:,} samples fill {self.value:,.0f} of D = {self.dim:,} "
            f"dimensions ({self.source} rows, step {self.step}): {so}"
        )


def effective_dimension(
    log: RunLog | Location,
    source: str | None = None,
    *,
    execution: Execution = HERE,
) -> EffectiveDimension:
    """The effective dimension of a log's samples, in one pass over its projections.

    Args:
        log, source, execution: as for :func:`diffhook.influence`.

    Raises:
        LogError, ConfigurationError: as :func:`diffhook.influence`.
    """
    log = as_log(log)
    source = best_source(log, execution=execution) if source is None else source
    method = _UnitMeans()
    table, steps = source_table(log, source, method=method), snapshot_steps(log)
    ids = distinct_samples(table, execution)
    sums = sample_sums(log, table, method, ids, steps, execution)
    counts = (sums.rate > 0).sum(1).tolist()
    values = {
        k: whitening.effective_dimension(grams, _RIDGE * table.dim / max(counts[k], 1))
        for k, grams in (sums.grams or {}).items()
    }
    fullest = max(values, key=lambda k: values[k], default=0)
    value = values.get(fullest, 0.0)
    return EffectiveDimension(value, table.dim, counts[fullest], source, int(steps[fullest]))
