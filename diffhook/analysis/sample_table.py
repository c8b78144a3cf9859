"""The samples of a run so far: visits, losses and norms relative to those at their timesteps, alerts.

Everything here can be read while the run still writes; see :meth:`diffhook.log.RunLog.refresh`.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from diffhook.analysis.defaults import as_log
from diffhook.analysis.roles import of_role, regularisation_images, role_of
from diffhook.analysis.standardize import Standard, looked_at
from diffhook.analysis.tables import source_table
from diffhook.errors import ConfigurationError
from diffhook.log import RunLog, Table
from diffhook.log.alerts import THROTTLE
from diffhook.log.samples import NAMES_AS_THEY_ARE, sample_words
from diffhook.log.store import Location
from diffhook.words import spreadsheet_cell

ORDERS = {"loss": "mean_loss", "norm": "norm", "visits": "visits", "last": "last_loss", "alerts": "alerts"}
"""What samples can be sorted by → the attribute, all descending."""

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SampleTable:
    """Samples in rows. A loss or norm of 1 is the median of rows at similar timesteps and steps.

    Attributes:
        sample_ids: (N,) int64.
        visits: (N,) int64, captured training rows.
        last_loss: (N,) float64, the newest row's loss, relative; NaN where it is unknown.
        mean_loss: (N,) float64, mean over visits of the relative loss; NaN where none is known.
        norm: (N,) float64, the same of the gradient norm; infinite once a gradient was not finite.
        factor: (N,) float64, by which the throttle multiplies the sample's loss; 1 without one.
        last_step: (N,) int64, optimiser step of the newest row.
        alerts: (N,) int64, alerts that name the sample, without the throttle's records.
        last_alert: per sample "kind, step 12" of the newest of them; "" without any.
        names: id → name, of samples that have one.
        regularisation: ids of the samples that are regularisation images.
    """

    sample_ids: Counts
    visits: Counts
    last_loss: Floats
    mean_loss: Floats
    norm: Floats
    factor: Floats
    last_step: Counts
    alerts: Counts
    last_alert: tuple[str, ...]
    names: Mapping[int, str]
    regularisation: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.sample_ids)

    def sort(self, by: str = "loss") -> SampleTable:
        """Highest first, unknown last; equal ones by id.

        Raises:
            ConfigurationError: ``by`` is none of :data:`ORDERS`.
        """
        if by not in ORDERS:
            raise ConfigurationError(f"sort is {by!r}; expected one of {', '.join(ORDERS)}")
        descending = -getattr(self, ORDERS[by]).astype(np.float64)
        return self._take(np.argsort(descending, kind="stable"))  # NaN last

    def of_role(self, role: str) -> SampleTable:
        """The samples that are "training" or "regularisation" images.

        Raises:
            ConfigurationError: it is neither.
        """
        return self._take(np.flatnonzero(of_role(self.sample_ids, self.regularisation, role)))

    def _take(self, order: npt.NDArray[np.intp]) -> SampleTable:
        columns: dict[str, Any] = {
            name: values[order] for name, values in vars(self).items() if isinstance(values, np.ndarray)
        }
        return replace(self, **columns, last_alert=tuple(self.last_alert[i] for i in order.tolist()))

    def records(self, k: int | None = None) -> list[dict[str, Any]]:
        """The first k samples (or all) as dicts."""
        return [
            {
                "sample": sample,
                "name": sample_words(sample, self.names),
                "role": role_of(sample, self.regularisation),
                "visits": int(self.visits[row]),
                "last_loss": float(self.last_loss[row]),
                "mean_loss": float(self.mean_loss[row]),
                "norm": float(self.norm[row]),
                "factor": float(self.factor[row]),
                "last_step": int(self.last_step[row]),
                "alerts": int(self.alerts[row]),
                "last_alert": self.last_alert[row],
            }
            for row, sample in enumerate(self.sample_ids[:k].tolist())
        ]

    def to_csv(self, path: str | Path) -> None:
        """All samples; a file that another program reads meanwhile is replaced as a whole."""
        partial = f"{path}.partial"
        with open(partial, "w", newline="", encoding="utf-8", errors=NAMES_AS_THEY_ARE) as file:
            writer = csv.writer(file)
            writer.writerow(_HEADER)
            for record in self.records():
                writer.writerow(spreadsheet_cell(v) if isinstance(v, str) else v for v in record.values())
        os.replace(partial, path)


_HEADER = (
    "sample", "name", "role", "visits", "last_loss", "mean_loss", "norm", "factor", "last_step", "alerts",
    "last_alert",
)  # fmt: skip


def sample_table(log: RunLog | Location) -> SampleTable:
    """The samples that have been trained on so far, by id; empty while there are no training rows.

    Losses and norms are divided by the median of rows in the same timestep bin and stage of training, as
    :class:`~diffhook.analysis.standardize.Standard` has it.

    Raises:
        LogError, ConfigurationError: as :func:`diffhook.open_log`; or the log holds sums of rows only.
    """
    log = as_log(log)
    table = source_table(log, "train", projected=False) if len(log.train) else log.train
    rows = _Rows.read(table)
    counts, newest, factors = _alerts(log, rows.sample_ids)
    return SampleTable(
        rows.sample_ids,
        rows.visits,
        rows.last("loss"),
        rows.mean("loss"),
        rows.mean("grad_norm"),
        factors,
        rows.last_step,
        counts,
        newest,
        log.names(),
        regularisation_images(log),
    )


@dataclass(frozen=True)
class _Rows:
    """A table's rows, grouped by sample."""

    sample_ids: Counts
    visits: Counts
    last_step: Counts
    relative: Mapping[str, Floats]  # column → (rows,), in the order of `of`
    of: npt.NDArray[np.intp]  # (rows,) position of each row's sample
    newest: npt.NDArray[np.intp]  # (N,) each sample's last row

    @classmethod
    def read(cls, table: Table) -> _Rows:
        columns = {c: table[c] for c in ("sample", "step", "timestep", "loss", "grad_norm")}
        ids, of, visits = np.unique(columns["sample"], return_inverse=True, return_counts=True)
        newest = np.zeros(len(ids), np.intp)
        by_step = np.argsort(columns["step"], kind="stable")
        newest[of[by_step]] = by_step  # of several rows for one sample the last assignment stays
        relative = {c: _relative(table, c, columns) for c in ("loss", "grad_norm")}
        last_step = columns["step"].astype(np.int64)[newest]
        return cls(ids.astype(np.int64), visits.astype(np.int64), last_step, relative, of, newest)

    def last(self, column: str) -> Floats:
        return self.relative[column][self.newest]

    def mean(self, column: str) -> Floats:
        values = self.relative[column]
        known = ~np.isnan(values)
        count = np.bincount(self.of[known], minlength=len(self.sample_ids))
        total = np.bincount(self.of[known], values[known], minlength=len(self.sample_ids))
        return np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)


def _relative(table: Table, column: str, columns: Mapping[str, npt.NDArray[Any]]) -> Floats:
    if not len(table):
        return np.empty(0)
    standard = Standard.learn(column, looked_at(table, (column, "timestep", "step")))
    return standard.ratios(columns)


def _alerts(log: RunLog, sample_ids: Counts) -> tuple[Counts, tuple[str, ...], Floats]:
    """How many alerts name each sample, the newest of them, and the throttle's factor."""
    counts = dict.fromkeys(sample_ids.tolist(), 0)
    newest, factors = dict.fromkeys(counts, ""), dict.fromkeys(counts, 1.0)
    for alert in log.alerts():  # by step
        for sample in filter(counts.__contains__, alert["samples"]):
            if alert["kind"] == THROTTLE:
                factors[sample] = float(alert["value"])
                continue
            counts[sample] += 1
            newest[sample] = f"{alert['kind']}, step {alert['step']}"
    return (
        np.fromiter(counts.values(), np.int64, len(counts)),
        tuple(newest.values()),
        np.fromiter(factors.values(), np.float64, len(factors)),
    )
