"""Processes of one training, as ``torchrun`` starts them."""

from __future__ import annotations

import runpy
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from diffhook.log.table import Table
from tests import forked

HERE = Path(__file__).parent


def torchrun(script: str | Path, *arguments: object, killed: bool = False, processes: int = 2) -> None:
    """Run a script of this folder in so many processes; their words are told where it fails."""
    with tempfile.TemporaryDirectory() as words:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=Path(words).name,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            start_method=forked.METHOD,
            logs_specs=DefaultLogsSpecs(log_dir=words, redirects=Std.ALL),
        )
        codes = set()
        try:
            elastic_launch(config, _run)(str(HERE / script), *map(str, arguments))
        except ChildFailedError as error:
            codes = {failure.exitcode for failure in error.failures.values()}
        told = "\n".join(path.read_text()[-3000:] for path in sorted(Path(words).rglob("std*.log")))
    assert (-signal.SIGKILL in codes) if killed else not codes, told  # others may fail of the one killed


def _run(script: str, *arguments: str) -> None:
    """In a process of its own."""
    torch.set_num_threads(1)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def assert_same_rows(one: Table, two: Table, rtol: float) -> None:
    """What each row holds does not depend on how many processes wrote them."""
    for name in ("step", "sample", "timestep", "weight", "lr", "loss", "grad_norm", "projection"):
        first, second = (t[name][np.lexsort((t["sample"], t["step"]))] for t in (one, two))
        np.testing.assert_allclose(second, first, rtol=rtol, atol=1e-6, err_msg=name)
