"""Whether a run's samples are those of the log that it writes into.

Two datasets of equal length and kind are told apart by what their samples are called, or look like.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from itertools import islice

import numpy as np
import numpy.typing as npt
from scipy.special import bdtr

from diffhook.appearance import COLUMNS, FEW, STATISTICS, Values, look_alike, on_scale, usual_differences
from diffhook.errors import LogError
from diffhook.log import RunLog
from diffhook.log.samples import ROLE_STRIDE

logger = logging.getLogger("diffhook")

_ROWS = 1 << 16  # of the log that are looked at, the last ones
_ENOUGH = 64  # samples, after which nothing more is compared
_CHANCE = 1e-3  # that the same dataset would be recognised so seldom
_TOLD = 3  # names, in a message
_LATEST = 4096  # samples, after which none is looked for at another's place
_NEARBY = 8  # places by which a file that was added, removed or renamed may have moved a sample
_EQUAL = 0.01  # of what half of the samples differ by: what was moved looks the same to the digit
_MOVED = 3  # samples at others' places that are no accident
_DOUBTFUL = 32  # samples that are compared before rows of any are believed …
_DOUBTFUL_ROWS = 256  # … or rows, where few have been seen before

Ids = npt.NDArray[np.integer]


class Familiarity:
    """Compares samples with what a log says of the same ids, one after another.

    A sample is recognised by :func:`~diffhook.appearance.look_alike`. How often the same sample is
    recognised, which random crops prevent, is learned from the log's own repeated visits; where there are
    none, nothing is concluded. Samples without names that look exactly like those beside them in the log have
    been moved, as by a file that was added, removed or renamed. Ids that the log does not have are of another
    dataset once there are more in all than the dataset has samples.

    Args:
        ids: (rows,) sample ids of the log, in the order of their visits.
        appearance: (rows, 3) :data:`~diffhook.appearance.STATISTICS` of each.
        location: the log's, for the message.
        names: those that the log has, id → name.
        size: samples of the dataset, of which the log's has as many; None: not known.
    """

    def __init__(
        self,
        ids: Ids,
        appearance: npt.NDArray[np.floating],
        location: str,
        names: Mapping[int, str] | None = None,
        size: int | None = None,
    ) -> None:
        known = np.isfinite(appearance).all(1)
        appearance, order = on_scale(appearance[known]), np.argsort(ids[known], kind="stable")
        again = np.flatnonzero(np.diff(ids[known][order]) == 0)
        self._location = location
        self._names = dict(names or {})
        self._ids = {*(ids % ROLE_STRIDE).tolist(), *self._names}
        self._strangers: set[int] = set()  # ids that the log does not have
        self._met: set[int] = set()  # and all of this run
        self._size = size
        self._appearance = dict(zip(ids[known].tolist(), appearance, strict=True))  # the last visit's
        self._seen: dict[int, bool] = {}  # sample → whether it was recognised
        self._moved: dict[int, int] = {}  # sample → the one of the log that it looks like
        self._rows = 0  # of this run that were looked at
        self._told = False
        self._differences = usual_differences(appearance) if len(appearance) else np.zeros(len(STATISTICS))
        hits = look_alike(appearance[order][again], appearance[order][again + 1], self._differences).sum()
        self._usual = float(hits / (len(again) + 1))  # how often a sample is recognised

    @classmethod
    def of(cls, log: RunLog, size: int | None = None) -> Familiarity:
        """
        Args:
            size: samples of this run's dataset; None: not known.

        Raises:
            LogError: the log is damaged.
        """
        ids: list[Ids] = [np.empty(0, np.int64)]
        appearance: list[npt.NDArray[np.floating]] = [np.empty((0, len(STATISTICS)))]
        for block in reversed(list(log.train.blocks())):
            ids.insert(1, log.train.read(block, "sample"))
            appearance.insert(1, np.stack([log.train.read(block, name) for name in COLUMNS], 1))
            if sum(map(len, ids)) >= _ROWS:
                break
        dataset = log.config["identity"].get("dataset") or {}
        size = size if dataset.get("samples") == size else None
        return cls(np.concatenate(ids), np.concatenate(appearance), log.location, log.names(), size)

    def meet(self, ids: Ids, names: Mapping[int, str]) -> None:
        """Compare what the samples of a batch are called.

        Args:
            ids: (rows,).
            names: id → name, of those that have one.

        Raises:
            LogError: they are another dataset's.
        """
        if self._size is None or not len(self._ids) <= self._size:
            return
        own = set((ids % ROLE_STRIDE).tolist())
        self._met |= own
        self._strangers |= own - self._ids
        if len(self._ids | self._met) <= self._size or len(self._met) > self._size:
            return
        recognised = len(self._met) - len(self._strangers)
        if recognised <= FEW * len(self._met):
            self._check_naming(names)
            raise LogError(
                f"the log at {self._location} belongs to another dataset of {self._size:,} samples: it has "
                f"{_called(self._ids, self._names)}, this run has {_called(self._strangers, names)}. Choose "
                "another path, or train on the log's samples to continue it"
            )

    def _check_naming(self, names: Mapping[int, str]) -> None:
        """Raises a LogError where one side's samples have names and the other's have none: they may be the
        same, and nothing can tell."""
        named = {sample: names[sample] for sample in self._strangers if sample in names}
        if bool(named) == bool(self._names):
            return
        before, now, then = (
            ("by position, without names", f"by name ({_called(self._strangers, names)})", "sample_ids=False")
            if named
            else (f"by name ({_called(self._ids, self._names)})", "by position, without names", "sample_ids=")
        )
        raise LogError(
            f"the log at {self._location} has its samples {before}, and this run has them {now}: whether "
            f"they are the same ones cannot be told. Have them as before ({then}) to continue the log, or "
            "choose another path"
        )

    def see(self, ids: Ids, appearance: npt.NDArray[np.floating]) -> None:
        """Compare the samples of a batch.

        Args:
            ids: (rows,).
            appearance: (rows, 3) statistics, NaN where they are not known.

        Raises:
            LogError: they are another dataset's.
        """
        self._rows += len(ids)
        if len(self._seen) >= _LATEST or not self._appearance:
            return
        for sample, statistics in zip(ids.tolist(), on_scale(appearance), strict=True):
            if sample in self._appearance and sample not in self._seen and np.isfinite(statistics).all():
                self._compare(sample, statistics)
        recognised = sum(self._seen.values())
        self._refuse_moved(len(self._seen) - recognised)
        if len(self._seen) > _ENOUGH:
            return
        if recognised <= FEW * len(self._seen) and self._chance(recognised) < _CHANCE:
            few = recognised or "none"
            raise LogError(
                f"the log at {self._location} belongs to another dataset, or to one that was prepared "
                f"otherwise: of {len(self._seen)} samples with ids that it knows, {few} look as they did "
                "(mean, contrast, roughness). Choose another path, or train on the log's samples to continue "
                "it"
            )

        if not self._told and not self.undecided and self._chance(recognised) < _CHANCE**2:
            self._told = True
            logger.warning(
                "of %d samples with ids that the log at %s knows, %d do not look as they did (mean, "
                "contrast, roughness); where an index means another picture now, rows of both stand under it",
                len(self._seen),
                self._location,
                len(self._seen) - recognised,
            )

    @property
    def undecided(self) -> bool:
        """Whether too few samples have been compared for rows to be believed."""
        enough = min(_DOUBTFUL, len(self._appearance))
        return len(self._seen) < enough and self._rows < _DOUBTFUL_ROWS

    def _compare(self, sample: int, statistics: Values) -> None:
        self._seen[sample] = bool(look_alike(statistics, self._appearance[sample], self._differences))
        if self._seen[sample] or sample in self._names:
            return
        equal = _EQUAL * self._differences + 1e-6
        for other in range(sample - _NEARBY, sample + _NEARBY + 1):
            known = self._appearance.get(other)
            if known is not None and (np.abs(statistics - known) <= equal).all():
                self._moved[sample] = other
                return

    def _refuse_moved(self, unlike: int) -> None:
        """
        Raises:
            LogError: of the samples that do not look as they did, most look like others beside them.
        """
        if len(self._moved) < _MOVED or 2 * len(self._moved) <= unlike:
            return
        told = ", ".join(f"{now} like {before}" for now, before in islice(self._moved.items(), _TOLD))
        raise LogError(
            f"the log at {self._location} has the samples in another order: {len(self._moved)} of "
            f"{len(self._seen)} look like others beside them ({told}), as after a file was added, removed or "
            "renamed. Choose another path, or give samples names, which stay with them (`sample_ids`)"
        )

    def _chance(self, recognised: int) -> float:
        return float(bdtr(recognised, len(self._seen), self._usual))  # binomial


def _called(ids: Collection[int], names: Mapping[int, str]) -> str:
    """Three of them, as their names or ids have it."""
    told = sorted(repr(names[i][:80]) if i in names else f"{i}" for i in islice(sorted(ids), _TOLD))
    return ", ".join(told) + (" …" if len(ids) > _TOLD else "")
