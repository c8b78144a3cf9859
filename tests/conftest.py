"""What holds for every test."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.devices import has_gpu

# Measured choices of algorithms stay in the process: no test reads or writes the user's cache.
os.environ.setdefault("DIFFHOOK_TUNING", "")
# Workers of pytest-xdist, and what they start, have a core each: threads of one would wait for another's.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A log sees its rows to the disk, hundreds of times in these tests, of which a slow disk makes minutes: a
# file system in memory has that for nothing. Only where it has room, and nobody has chosen a folder.
_IN_MEMORY, _ROOM = Path("/dev/shm"), 8 << 30
if "TMPDIR" not in os.environ and _IN_MEMORY.is_dir() and shutil.disk_usage(_IN_MEMORY).free > _ROOM:
    os.environ["TMPDIR"] = tempfile.tempdir = str(_IN_MEMORY)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of a GPU are no tests where there is none."""
    left_out = [item for item in items if item.get_closest_marker("gpu") and not has_gpu()]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
