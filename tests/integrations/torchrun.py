"""Processes of one training, as ``torchrun`` starts them."""

from __future__ import annotations

import runpy
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import diffhook
from diffhook.capture import DiffusionObjective, Grid, Probe
from diffhook.log.table import Table
from tests import forked
from tests.runs import SCHEDULER, identified

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
        first, second = (t[name][np.lexsort((t["timestep"], t["sample"], t["step"]))] for t in (one, two))
        np.testing.assert_allclose(second, first, rtol=rtol, atol=1e-6, err_msg=name)


def assert_serve_alike(one: Path, two: Path, make_model: Callable[[], nn.Module], after: Path) -> None:
    """Queries, and probes that are made later at a log's snapshots, do not depend on it either.

    Args:
        one, two: logs of the same training.
        make_model: of that training.
        after: a folder for the logs of probes.
    """
    objective, probe, given = DiffusionObjective(SCHEDULER), Probe(None, Grid(3)), {"projection_dim": 16}
    scores, probes = [], []
    for path in (one, two):
        model = make_model()
        diffhook.query(path, identified()[:2], "made", model=model, objective=objective, overwrite=True)
        scores.append(diffhook.influence(path, "made", "tracin").values)
        found, log = f"{path}/snapshots/*", after / path.name
        probes.append(
            diffhook.from_checkpoints(model, found, identified(), objective, log, probe=probe, **given).probe
        )
    np.testing.assert_allclose(scores[1], scores[0], rtol=1e-4, atol=1e-5 * np.abs(scores[0]).max())
    assert len(probes[0]) == 2 * 12 * 3
    assert_same_rows(*probes, rtol=1e-4)
