"""Names of samples: on the disk before their rows count, whole or told, and cheap."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from diffhook.cli import main
from diffhook.integrations.torch import TorchHook
from diffhook.log import LogWriter, open_log
from diffhook.log.samples import NameWriter, read_names
from diffhook.log.testing import CONFIG, some_rows
from tests.log.faults import FaultyStore
from tests.runs import TinyDenoiser, denoising_losses, identified
from tests.waiting import wait_until


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffhook.log.table_writer.rows_per_shard", lambda dim, dtype: 16)


def test_names_are_on_the_disk_before_the_rows_that_use_them_count() -> None:
    memory = MemoryStore()
    store, commits = FaultyStore(memory), []

    def look(key: str, value: Buffer) -> Buffer:
        if key == "train/rank-0000/zarr.json":
            committed = json.loads(value.to_bytes())["attributes"]["committed"]
            commits.append((committed, set(read_names(memory)) >= set(range(committed))))
        return value

    store.fault = look
    writer = LogWriter(store, CONFIG)
    names: dict[int, str] = {}
    writer.keep_names(names)
    for first in range(0, 200, 5):
        names.update({sample: str(sample) for sample in range(first, first + 5)})
        writer.put("train", some_rows(5, first))
    writer.close()
    assert all(there for _, there in commits)
    assert len({count for count, _ in commits}) > 3
    assert open_log(store).names() == {sample: str(sample) for sample in range(200)}


def test_names_of_the_rows_that_a_killed_run_has_committed_can_be_told(tmp_path: Path) -> None:
    model = TinyDenoiser()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    hook = TorchHook(tmp_path / "log", model, optimizer, strict=True, projection_dim=16)
    for step in range(9):
        clean = identified()[:4]
        with hook.step(sample_ids=[f"{step}-{i}.png" for i in range(4)]):
            denoising_losses(
                model, (clean, torch.randn_like(clean), torch.full((4,), step))
            ).mean().backward()
        optimizer.step()
    wait_until(lambda: len(open_log(tmp_path / "log").train) >= 32)
    log = open_log(tmp_path / "log")  # as a kill would leave it
    samples = set(log.train["sample"].tolist())
    assert len(samples) == 32
    assert samples <= set(log.names())
    hook.close()


def test_many_names_are_written_in_parts_and_a_later_run_adds_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("diffhook.log.samples._PART_NAMES", 10)
    store, written = FaultyStore(MemoryStore()), []
    store.fault = lambda key, value: (written.append(key), value)[1]
    expected: dict[int, str] = {}
    for session in range(2):
        names = {1000 + session: "met before the log was opened"}
        writer = NameWriter(store, 0)
        writer.keep(names)
        for count in (1, 8, 12, 40, 40):
            names.update({100 * session + i: f"{session}/{i}" for i in range(count)})
            writer.flush()
        expected |= names
        assert read_names(store) == names == expected
    assert len(expected) == 82
    assert sorted(set(written)) == [f"names/rank-0000-{number:03d}.json" for number in range(10)]
    assert written.count("names/rank-0000-000.json") == 3, "what is full is not written again"


def _damaged(location: Path) -> Path:
    for rank in range(2):
        writer = LogWriter(location, CONFIG, rank=rank)
        writer.keep_names({sample: f"{sample}.png" for sample in range(10 * rank, 10 * rank + 3)})
        writer.put("train", some_rows(3, 10 * rank))
        writer.close()
    path = location / "names/rank-0000-000.json"
    path.write_bytes(path.read_bytes()[:-10])
    return path


def test_damaged_names_are_found_and_moved_aside(tmp_path: Path) -> None:
    _damaged(tmp_path)
    (line,) = open_log(tmp_path).verify()
    assert line.startswith("names/rank-0000-000.json: ")
    assert "is damaged" in line
    assert main(["verify", str(tmp_path), "--repair"]) == 0
    assert (tmp_path / "quarantine/000/names/rank-0000-000.json").exists()
    assert open_log(tmp_path).names() == {sample: f"{sample}.png" for sample in range(10, 13)}
    assert len(open_log(tmp_path).train) == 6


def test_one_changed_letter_of_a_name_is_found(tmp_path: Path) -> None:
    path = _damaged(tmp_path).with_name("rank-0001-000.json")
    path.write_text(path.read_text().replace("11.png", "17.png"))
    assert any("names/rank-0001-000.json: " in line for line in open_log(tmp_path).verify())


def test_a_run_goes_on_without_damaged_names_and_adds_those_it_meets(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = _damaged(tmp_path)
    before = damaged.read_bytes()
    writer = LogWriter(tmp_path, CONFIG, start_step=9)
    names = {2: "2.png"}
    writer.keep_names(names)
    assert sorted(names) == [2, 10, 11, 12]
    writer.close()
    assert damaged.read_bytes() == before
    (told,) = [r for r in caplog.records if "names of samples are lost" in r.message]
    assert told.levelno == logging.WARNING
    damaged.unlink()
    assert sorted(open_log(tmp_path).names()) == [2, 10, 11, 12]
