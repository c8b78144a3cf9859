"""Snapshots: the trainable parameters at a step, kept although a script rotates its checkpoints."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice, starmap
from typing import Any

from zarr.abc.store import Store

from diffhook.errors import LogError
from diffhook.log import store as files
from diffhook.log.checksum import parse, verified
from diffhook.log.reference import Reference

ROOT = "snapshots"
_FOLDER = re.compile(r"step-\d{8,18}(-session-\d{1,6})?")
_LOOKED_UP = 1000  # one by one, where a listing lacks them


@dataclass(frozen=True)
class Snapshot:
    """One snapshot, its parameters not yet read.

    Attributes:
        step: optimiser steps taken.
        lr: learning rate of the last of them.
        lr_sum: sum of the learning rates of the steps since the snapshot before.
        session: number of the process start that took it.
        reference: where the parameters lie, if not in the log: of a checkpoint of the user's.
        details: whatever else the writer recorded.
    """

    step: int
    lr: float
    lr_sum: float
    session: int = 0
    reference: Reference | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    store: Store | None = field(default=None, repr=False, compare=False)
    folder: str = field(default="", repr=False, compare=False)
    digest: str = field(default="", repr=False, compare=False)  # SHA-256, of the parameters
    preconditioner_digest: str | None = field(default=None, repr=False, compare=False)  # None: not kept

    @property
    def key(self) -> str:
        """Where it lies."""
        return f"{ROOT}/{self.folder or folder_of(self.step, self.session)}"

    def parameters(self) -> bytes:
        """The parameters as a safetensors file's content, of a snapshot that holds them.

        Raises:
            LogError: the file is gone, or not what was written; or the snapshot refers to a checkpoint.
        """
        if self.reference is not None:
            raise LogError(
                f"{self.key} holds no parameters: they lie in the checkpoint {self.reference.path}, which "
                "diffhook.capture.checkpoints.snapshots reads"
            )
        return self._read("parameters", self.digest)

    def preconditioner(self) -> bytes | None:
        """1 / (√v̂ + ε) of each parameter, likewise; None where the run did not keep it."""
        known = self.preconditioner_digest
        return None if known is None else self._read("preconditioner", known)

    def check(self) -> None:
        """Read everything that it holds or refers to.

        Raises:
            LogError: it is gone, or not what was written.
        """
        if self.reference is None:
            self.parameters()
        else:
            self.reference.located()
        self.preconditioner()

    def _read(self, name: str, digest: str) -> bytes:
        assert self.store is not None
        content = files.get(self.store, f"{self.key}/{name}.safetensors")
        if content is None:
            raise LogError(f"{files.describe(self.store)}: {self.key} has lost its {name}")
        if hashlib.sha256(content).hexdigest() != digest:
            raise LogError(
                f"{files.describe(self.store)}: {self.key}/{name}.safetensors is damaged: "
                "it is not what was written"
            )
        return content


def folder_of(step: int, session: int) -> str:
    """The name of a snapshot's folder. No session writes over the snapshot of another."""
    return f"step-{step:08d}" + (f"-session-{session}" if session else "")


def read_snapshots(store: Store, known: Iterable[tuple[int, int]] = ()) -> list[Snapshot]:
    """All finished snapshots, of all sessions, by step.

    Args:
        known: (step, session) of those that were written: a network's listing may come short.

    Raises:
        LogError: a description is damaged.
    """
    found = [read_snapshot(store, folder) for folder in snapshot_folders(store, known)]
    return sorted((s for s in found if s is not None), key=lambda s: s.step)


def snapshot_folders(store: Store, known: Iterable[tuple[int, int]] = ()) -> list[str]:
    """Names of the folders that are listed, and of the ``known`` snapshots that are not."""
    listed = [name for name in files.names(store, ROOT) if _FOLDER.fullmatch(name)]
    unlisted = set(starmap(folder_of, known)).difference(listed)
    return [*listed, *islice(sorted(unlisted), _LOOKED_UP)]


def read_snapshot(store: Store, folder: str) -> Snapshot | None:
    """The snapshot in one folder; None where it was never finished.

    Raises:
        LogError: its description is damaged.
    """
    place = f"{ROOT}/{folder}/snapshot.json"
    content = files.get(store, place)
    if content is None:
        return None
    fields = verified(parse(content, place), place)
    try:
        digest = fields.pop("sha256")
        preconditioner = fields.pop("preconditioner_sha256", None)
        step, session = fields.pop("step"), fields.pop("session")
        lr, lr_sum = float(fields.pop("lr")), float(fields.pop("lr_sum"))
        reference = Reference.of(fields.pop("reference", None))
        if type(step) is not int or type(session) is not int or step < 0 or session < 0:
            raise ValueError(f"step {step!r}, session {session!r}")
        if folder != folder_of(step, session):
            raise ValueError(f"it is of {folder_of(step, session)}")
        snapshot = Snapshot(
            step, lr, lr_sum, session, reference, fields, store, folder, digest, preconditioner
        )
    except (ValueError, KeyError, TypeError) as error:
        raise LogError(f"{files.describe(store)}: {place} is damaged: {error!r}") from error
    return snapshot
