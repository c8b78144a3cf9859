"""Keeps the names of samples in the log."""

from __future__ import annotations

from diffhook.log import LogWriter
from diffhook.log.samples import names_json, names_key, read_names


class NameTable:
    """Writes what ``names`` holds to this rank's file of the log.

    An object store knows no appending, so the file is written anew: when it has grown by half, at
    checkpoints and at the end.

    Args:
        names: id → name; grows while training runs.
    """

    def __init__(self, names: dict[int, str]) -> None:
        self.names = names
        self._written = 0

    def read(self, writer: LogWriter) -> None:
        """Begin with what earlier runs have left in the log."""
        known = read_names(writer.store)
        self._written = len(known)
        self.names.update(known)

    def write_if_grown(self, writer: LogWriter) -> None:
        if len(self.names) > 1.5 * self._written:
            self.write(writer)

    def write(self, writer: LogWriter) -> None:
        if len(self.names) > self._written:
            self._written = len(self.names)
            # A copy: training may add names while another thread settles a checkpoint.
            writer.record(names_key(writer.rank), names_json(dict(self.names)))
