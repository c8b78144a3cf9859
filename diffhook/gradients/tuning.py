"""Which of several ways to the same numbers is fastest here: measured once, remembered.

Operation counts mislead: the ranking of batched products, grouped convolutions and Gram matrices
differs between processors, libraries and shapes. So the first time a shape is met, every way is
timed on the tensors at hand (milliseconds each) and the fastest is kept, for this process and in a
file for later ones.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import torch

logger = logging.getLogger("diffhook")

_REPEATS = 3
# Numbers of products that ways are timed on. An accelerator is idle under few, and all ways seem alike.
_TIMED_ON_CPU = 1 << 20
_TIMED_ELSEWHERE = 1 << 26


class Tuner:
    """Remembers the fastest way for each key.

    Args:
        path: JSON file to read and keep up to date; None to remember in this process only.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._chosen: dict[str, str] | None = None

    def fastest(self, key: str, ways: Mapping[str, Callable[[], object]]) -> str:
        """The name of the fastest way; ways that raise are out.

        Args:
            key: names the problem: operation, shapes, dtype, device.
            ways: name → does the work once, on the same data.
        """
        if self._chosen is None:
            self._chosen = self._read()
        if self._chosen.get(key) not in ways:
            seconds = {name: _seconds(way) for name, way in ways.items()}
            self._chosen[key] = min(seconds, key=seconds.__getitem__)
            # What another process has chosen in the meantime stands, so that ranks agree.
            self._chosen |= {k: v for k, v in self._read().items() if k != key or v in ways}
            self._write()
        return self._chosen[key]

    def _read(self) -> dict[str, str]:
        try:
            found = {} if self._path is None else json.loads(self._path.read_text())
        except (OSError, ValueError):
            found = {}
        return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}

    def _write(self) -> None:
        """Publish by rename; a folder that cannot be written is left alone from then on."""
        if self._path is None or self._chosen is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._path.parent, delete=False) as file:
                json.dump(self._chosen, file, indent=0, sort_keys=True)
            os.replace(file.name, self._path)
        except OSError as error:
            logger.debug("measured choices are not kept: %s", error)
            self._path = None


def timed_rows(size: int, device: torch.device) -> slice:
    """Rows enough to measure on, whose products are of so many numbers each."""
    numbers = _TIMED_ON_CPU if device.type == "cpu" else _TIMED_ELSEWHERE
    return slice(0, max(numbers // size, 1))


def _seconds(way: Callable[[], object]) -> float:
    """Least time of a few runs; infinite for a way that raises."""
    try:
        least = float("inf")
        for _ in range(_REPEATS):
            began = time.perf_counter()
            way()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            least = min(least, time.perf_counter() - began)
        return least
    except RuntimeError:
        return float("inf")


@cache
def tuner(device: torch.device) -> Tuner:
    """The tuner for a kind of device on this machine.

    The file lies in the user's cache folder; the environment variable DIFFHOOK_TUNING names another
    folder, and set to nothing it keeps everything in memory.
    """
    folder = os.environ.get("DIFFHOOK_TUNING")
    if folder == "":
        return Tuner(None)
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "diffhook")
    if device.type == "cuda":
        kind = torch.cuda.get_device_name(device)
    else:
        kind = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()}"
    name = re.sub(r"[^\w.+]+", "-", f"{kind} torch {torch.__version__}")
    return Tuner((Path(folder) if folder else base) / f"tuning-{name}.json")
