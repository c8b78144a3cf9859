"""Processes forked from one that has imported what trainings need: that takes longer than most of them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

from torch.multiprocessing import start_processes

METHOD = "forkserver"
multiprocessing.set_forkserver_preload(["accelerate", "diffusers", "diffhook.integrations.accelerate"])


def run(function: Callable[..., None], *arguments: Any, processes: int = 2) -> None:
    """Call it with its rank and the arguments in each of the processes; an error in one is raised here."""
    start_processes(function, arguments, processes, start_method=METHOD)
