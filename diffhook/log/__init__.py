"""The run log on disk: one table of per-sample gradients, and snapshots. zarr and numpy, no torch."""

from diffhook.log.content import Content
from diffhook.log.reader import RunLog, open_log
from diffhook.log.schema import COLUMNS, SCHEMA_VERSION, Rows
from diffhook.log.snapshots import Snapshot
from diffhook.log.table import Block, Table
from diffhook.log.writer import LogWriter

__all__ = [
    "COLUMNS",
    "SCHEMA_VERSION",
    "Block",
    "Content",
    "LogWriter",
    "Rows",
    "RunLog",
    "Snapshot",
    "Table",
    "open_log",
]
