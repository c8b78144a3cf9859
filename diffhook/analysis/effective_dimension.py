"""Is the projection large enough? How many dimensions the rows' gradients fill, against D."""

from __future__ import annotations

from dataclasses import dataclass

from diffhook.analysis.defaults import as_log, best_source
from diffhook.analysis.execution import HERE, Execution
from diffhook.analysis.methods import WhitenedReTrac, whitening
from diffhook.analysis.second_moment import second_moment
from diffhook.analysis.tables import source_table
from diffhook.log import RunLog
from diffhook.log.store import Location

_FULL = 0.5  # of D; a sketch that is filled further mixes up what it should tell apart


@dataclass(frozen=True)
class EffectiveDimension:
    """How many directions the rows' unit gradients fill, beyond the λ by which the default method whitens.

    Attributes:
        value: tr(G (G + λI)⁻¹), with G and λ of :class:`~diffhook.analysis.methods.WhitenedReTrac`.
        dim: D.
        rows: of the table; the value is below it, too.
        source: whose rows.
    """

    value: float
    dim: int
    rows: int
    source: str

    @property
    def enough(self) -> bool:
        """Whether D leaves room."""
        return self.value <= _FULL * self.dim

    def __str__(self) -> str:
        so = "D is enough" if self.enough else "a larger projection_dim would tell samples apart better"
        return (
            f"the gradients of {self.rows:,} {self.source} rows fill {self.value:,.0f} of D = {self.dim:,} "
            f"dimensions: {so}"
        )


def effective_dimension(
    log: RunLog | Location,
    source: str | None = None,
    *,
    execution: Execution = HERE,
) -> EffectiveDimension:
    """The effective dimension of a log's rows, in one pass over their projections.

    Args:
        log, source, execution: as for :func:`diffhook.influence`.

    Raises:
        LogError, ConfigurationError: as :func:`diffhook.influence`.
    """
    log = as_log(log)
    source = best_source(log, execution=execution) if source is None else source
    method = WhitenedReTrac()
    table = source_table(log, source, method=method)
    moment = second_moment(table, method, execution)
    value = whitening.effective_dimension(moment, method.ridge)
    return EffectiveDimension(value, table.dim, len(table), source)
