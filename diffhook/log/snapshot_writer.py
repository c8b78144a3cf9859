"""A snapshot on its way to the disk."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import replace

from zarr.abc.store import Store

from diffhook.log import store as files
from diffhook.log.checksum import with_checksum
from diffhook.log.content import Content
from diffhook.log.snapshots import Snapshot


def write_snapshot(
    store: Store, snapshot: Snapshot, parameters: bytes | None, preconditioner: bytes | None = None
) -> None:
    """Write a whole snapshot, from memory.

    Args:
        parameters: None of a snapshot that refers to a checkpoint.
    """
    SnapshotWriter(parameters, preconditioner).write(store, snapshot)


def copy_snapshot(snapshot: Snapshot, store: Store, session: int) -> None:
    """Write the same snapshot into another log, as of another session there."""
    parameters = snapshot.parameters() if snapshot.reference is None else None
    own = replace(snapshot, session=session, folder="")
    write_snapshot(store, own, parameters, snapshot.preconditioner())


class SnapshotWriter:
    """Writes parameters, then the description: a snapshot without it does not exist.

    :meth:`write` may be called again where it has failed. Whoever waits for it in another thread, and will
    change the parameters once the wait is over, can :meth:`withdraw` it: it is then whole, or not there.

    Args:
        parameters: a safetensors file; None of a snapshot that refers to a checkpoint.
        preconditioner: likewise, where the snapshot has one.
    """

    def __init__(
        self, parameters: bytes | Content | None, preconditioner: bytes | Content | None = None
    ) -> None:
        given = {"parameters": parameters, "preconditioner": preconditioner}
        self._files = {name: Content.of(file) for name, file in given.items() if file is not None}
        self._digests: dict[str, str] | None = None  # of files that are on the disk
        self._deciding = threading.Lock()
        self._withdrawn = self._counts = False

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(content.size for content in self._files.values())

    @property
    def settled(self) -> bool:
        """Whether the files are the same whenever they are written."""
        return all(content.settled for content in self._files.values())

    def copy(self) -> None:
        """Hold the files in memory, as they are now."""
        self._files = {name: content.copied() for name, content in self._files.items()}

    def withdraw(self) -> bool:
        """Keep the snapshot from being there, however far its writing is. False: it is too late for that."""
        with self._deciding:
            self._withdrawn = not self._counts
            return self._withdrawn

    def write(self, store: Store, snapshot: Snapshot) -> bool:
        """Write it. Returns False where it was withdrawn."""
        try:
            if self._digests is None:
                self._digests = {name: self._put(store, snapshot, name) for name in self._files}
            with self._deciding:
                self._counts = not self._withdrawn
            if not self._counts:
                raise _WithdrawnError
        except _WithdrawnError:
            for name in self._files:
                files.remove(store, _place(snapshot, name))
            return False
        files.put(store, f"{snapshot.key}/snapshot.json", _description(snapshot, self._digests))
        return True

    def _put(self, store: Store, snapshot: Snapshot, name: str) -> str:
        """Write a file; its SHA-256."""
        digest = hashlib.sha256()

        def parts() -> Iterator[bytes | memoryview]:
            for part in self._files[name].parts():
                if self._withdrawn:
                    raise _WithdrawnError
                digest.update(part)
                yield part

        files.put_parts(store, _place(snapshot, name), parts())
        return digest.hexdigest()


class _WithdrawnError(Exception):
    """Nobody waits for the snapshot any more."""


def _place(snapshot: Snapshot, name: str) -> str:
    return f"{snapshot.key}/{name}.safetensors"


def _description(snapshot: Snapshot, digests: dict[str, str]) -> bytes:
    names = {"parameters": "sha256", "preconditioner": "preconditioner_sha256"}
    reference = snapshot.reference
    referred = {} if reference is None else {"sha256": reference.digest, "reference": reference.describe()}
    description = {
        "step": snapshot.step,
        "lr": snapshot.lr,
        "lr_sum": snapshot.lr_sum,
        "session": snapshot.session,
        **referred,
        **{names[name]: digest for name, digest in digests.items()},
        **snapshot.details,
    }
    return json.dumps(with_checksum(description), indent=1).encode()
