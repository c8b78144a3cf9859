"""D, where no one has chosen it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import diffhook
from diffhook.capture.budget import LOG_BYTES
from diffhook.capture.loop.run.describe import dataset_size
from diffhook.capture.projection_dim import LEAST, MOST, ROWS, known_dim, usual_dim
from diffhook.errors import LogError
from diffhook.log import LogWriter
from diffhook.log.testing import CONFIG, DIM
from tests.runs import SCHEDULER, TinyDenoiser, identified, train

LARGEST = LOG_BYTES // (2 * MOST * ROWS)  # number of samples that still get the most


@pytest.mark.parametrize(
    ("samples", "dim"),
    [
        (1, MOST),
        (LARGEST, MOST),
        (LARGEST + 1, MOST // 2),
        (2 * LARGEST, MOST // 2),
        (2 * LARGEST + 1, LEAST),
        (10**9, LEAST),
        (None, LEAST),
    ],
)
def test_it_halves_while_rows_do_not_fit(samples: int | None, dim: int) -> None:
    assert usual_dim(samples) == dim


def test_more_rows_of_each_sample_leave_less_room() -> None:
    assert usual_dim(LARGEST, 2 * ROWS) == MOST // 2


class Stream(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Any:
        yield from torch.zeros(3, 1)


def test_a_stream_has_no_size() -> None:
    assert dataset_size(DataLoader(Stream())) is dataset_size(None) is None
    assert dataset_size(DataLoader(TensorDataset(torch.zeros(3, 1)))) == 3


class TestOfALog:
    def test_nothing_is_there(self, tmp_path: Path) -> None:
        assert known_dim(tmp_path / "log") is known_dim(tmp_path) is None

    def test_a_sketch(self, tmp_path: Path) -> None:
        LogWriter(tmp_path / "log", CONFIG).close()
        assert known_dim(tmp_path / "log") == DIM

    @pytest.mark.parametrize("kind", ["full", "none"])
    def test_whole_gradients_and_norms_were_asked_for(self, tmp_path: Path, kind: str) -> None:
        projection = {**CONFIG["identity"]["projection"], "kind": kind}
        identity = {**CONFIG["identity"], "projection": projection}
        LogWriter(tmp_path / "log", {**CONFIG, "identity": identity}).close()
        assert known_dim(tmp_path / "log") is None

    def test_another_programs_group(self, tmp_path: Path) -> None:
        (tmp_path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
        with pytest.raises(LogError, match="not one of diffhook's"):
            known_dim(tmp_path)


def test_a_run_takes_the_usual_and_one_that_goes_on_that_of_its_log(tmp_path: Path) -> None:
    train(tmp_path / "new", probe=False)
    assert diffhook.open_log(tmp_path / "new").train.dim == MOST
    train(tmp_path / "chosen", probe=False, projection_dim=16)
    rows = len(diffhook.open_log(tmp_path / "chosen").train)
    train(tmp_path / "chosen", probe=False)
    again = diffhook.open_log(tmp_path / "chosen").refresh().train
    assert (again.dim, len(again)) == (16, rows)  # of the second start, which supersede the first's
    with pytest.raises(LogError, match="another configuration: projection"):
        train(tmp_path / "chosen", probe=False, projection_dim=32)


def test_checkpoints_are_measured_likewise(tmp_path: Path) -> None:
    torch.save(TinyDenoiser().state_dict(), tmp_path / "step-1.bin")
    data = [(image,) for image in identified(4)]

    def measure(count: int, log: str, **options: Any) -> int | None:
        probe = diffhook.Probe(count, diffhook.Grid(2))
        objective = diffhook.DiffusionObjective(SCHEDULER)
        checkpoints = {1: tmp_path / "step-1.bin"}
        found = diffhook.from_checkpoints(
            TinyDenoiser(), checkpoints, data, objective, tmp_path / log, probe=probe, **options
        )
        return found.probe.dim

    assert measure(2, "new") == MOST
    assert measure(2, "chosen", projection_dim=16) == measure(4, "chosen") == 16
