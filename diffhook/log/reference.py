"""Where the parameters of a snapshot lie, if not in the log: in a checkpoint, which stays as it is."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from diffhook.errors import LogError


class MovedCheckpointError(LogError):
    """A checkpoint that a snapshot refers to is not where it was, or not what it was."""


@dataclass(frozen=True)
class Reference:
    """Files of a checkpoint, with their checksums.

    Attributes:
        path: of the checkpoint, absolute.
        files: name of a file of weights, from the checkpoint on ("." where it is a file itself) → SHA-256.
        ema: whether the averaged weights count, where the files hold both.
    """

    path: str
    files: Mapping[str, str]
    ema: bool = False

    @classmethod
    def make(cls, path: Path, files: Sequence[Path], *, ema: bool = False) -> Self:
        """Of a checkpoint as it is now. Reads its files once."""
        place = Path(os.path.abspath(path))
        names = {os.path.relpath(os.path.abspath(file), place): _sha256(file) for file in files}
        return cls(str(place), names, ema)

    @classmethod
    def of(cls, described: Any) -> Self | None:
        """What :meth:`describe` gave; None of a snapshot that holds its parameters.

        Raises:
            TypeError, KeyError: it makes no sense.
        """
        if described is None:
            return None
        path, names, ema = described["path"], described["files"], described["ema"]
        texts = [path, *names, *names.values()]
        if not names or not all(isinstance(text, str) for text in texts) or type(ema) is not bool:
            raise TypeError("a reference that names no files")
        return cls(path, dict(names), ema)

    def describe(self) -> dict[str, Any]:
        return {"path": self.path, "files": dict(self.files), "ema": self.ema}

    @property
    def digest(self) -> str:
        """Of the weights, wherever they lie."""
        listed = [f"{Path(name).name} {digest}" for name, digest in sorted(self.files.items())]
        return hashlib.sha256("\n".join([*listed, str(self.ema)]).encode()).hexdigest()

    @property
    def paths(self) -> list[Path]:
        """The files, whether they are there or not."""
        return [Path(os.path.normpath(os.path.join(self.path, name))) for name in self.files]

    def located(self) -> list[Path]:
        """The files, read once and found to be what they were.

        Raises:
            MovedCheckpointError: one is gone, or another.
        """
        for path, digest in zip(self.paths, self.files.values(), strict=True):
            if not path.is_file():
                raise MovedCheckpointError(
                    f"the checkpoint {self.path} is not there any more (no {path}): put it back, or, where "
                    "it was moved, run `diffhook checkpoints` again with its new place"
                )
            if _sha256(path) != digest:
                raise MovedCheckpointError(
                    f"{path} is not the checkpoint that was measured: its SHA-256 has changed. Put the "
                    "old file back, or measure the new ones into another log"
                )
        return self.paths


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
