"""What a checkpoint says of the log, so that a resumed run continues it where it belongs."""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from diffhook.errors import LogError
from diffhook.log import open_log
from diffhook.log.store import Location

logger = logging.getLogger("diffhook")

_STATE = "diffhook.json"  # in a checkpoint's folder; scripts parse names that begin "checkpoint"
_MOST_STEPS = 1 << 48
_LARGEST = 1 << 16  # bytes


@dataclass(frozen=True)
class Position:
    """Where in a log a checkpoint stands.

    Attributes:
        step: optimiser steps taken.
        lr_sum: sum of the learning rates since the last snapshot.
        session: id of the log's session whose rows before ``step`` led here; None: not known.
        uncounted: of the steps, those that the optimiser's own count lacks, as one that was made anew since.
    """

    step: int = 0
    lr_sum: float = 0.0
    session: str | None = None
    uncounted: int = 0

    def to_json(self) -> dict[str, Any]:
        """Empty before the first step: such a checkpoint says nothing."""
        return asdict(self) if self.step else {}

    @classmethod
    def from_json(cls, found: Any) -> Self:
        """
        Raises:
            ValueError: it cannot be a position; the message says what was found.
        """
        if not isinstance(found, Mapping):
            raise ValueError(f"expected a JSON object, found {type(found).__name__}")
        step, lr_sum, session = found.get("step", 0), found.get("lr_sum", 0.0), found.get("session")
        if type(step) is not int or not 0 <= step < _MOST_STEPS:
            raise ValueError(f"step {step!r}; expected a number of optimiser steps")
        if type(lr_sum) not in (int, float) or not 0 <= lr_sum < float("inf"):
            raise ValueError(f"lr_sum {lr_sum!r}; expected a sum of learning rates")
        if session is not None and not isinstance(session, str):
            raise ValueError(f"session {session!r}; expected the id of one")
        uncounted = found.get("uncounted", 0)
        if type(uncounted) is not int or abs(uncounted) >= _MOST_STEPS:
            raise ValueError(f"uncounted {uncounted!r}; expected a number of optimiser steps")
        return cls(step, float(lr_sum), session, uncounted)

    def checked(self, taken: int, counted: int) -> Self:
        """The position after ``taken`` steps in all, if the checkpoint is right. Where the optimiser that was
        loaded contradicts it, that is told, and the optimiser is believed: it holds what the steps have left.

        Args:
            counted: the optimiser's own count; 0: it keeps none.
        """
        begun_anew = counted <= taken - self.step  # it was not loaded, and says nothing
        if begun_anew or counted + self.uncounted == taken:
            return replace(self, step=taken)
        found = counted + self.uncounted
        logger.warning(
            "the checkpoint's %s says that %s optimiser steps were taken, but the optimiser that was loaded "
            "has taken %s: the log goes on from step %s, and loses no row before it",
            _STATE, f"{taken:,}", f"{found:,}", f"{found:,}",
        )  # fmt: skip
        return replace(self, step=found, lr_sum=0.0)  # the sum is of another moment


def write_state(folder: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write what :meth:`Position.to_json` gave into a checkpoint's folder: whole, or not at all.

    Raises:
        OSError: the disk failed.
    """
    if not state:
        return
    partial = Path(folder, f".{_STATE}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("w") as file:
            json.dump(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(Path(folder, _STATE))
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read_state(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What :func:`write_state` wrote; empty for a checkpoint written without us, or one whose file is
    damaged, which is told: capture goes on either way."""
    path = Path(folder, _STATE)
    try:
        if not path.exists():
            return {}
        if not path.is_file() or path.stat().st_size > _LARGEST:
            raise ValueError("expected a small file")
        return Position.from_json(json.loads(path.read_text())).to_json()
    except (OSError, ValueError, RecursionError) as error:  # no JSON is a ValueError too
        logger.warning(
            "%s cannot be used (%s): where the log goes on is read off the optimiser, or off its last row",
            path, error,
        )  # fmt: skip
        return {}


def steps_logged(location: Location) -> int:
    """How many steps the log there has seen; 0 where there is none."""
    try:
        steps = open_log(location).train["step"]
    except LogError:
        return 0
    return int(steps.max()) + 1 if len(steps) else 0
