"""`diffhook verify`: exactly what is lost, and --repair that moves it aside and touches nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from diffhook.cli import main
from diffhook.log import LogWriter, Snapshot, open_log
from diffhook.log.table_writer import TableWriter
from diffhook.log.testing import CONFIG, some_rows

SHARD, INNER = 1024, 512


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two ranks of 2,500 and 40 rows, two snapshots, alerts."""
    monkeypatch.setattr("diffhook.log.table_writer.rows_per_shard", lambda dim, dtype: SHARD)
    for rank, count in ((0, 2500), (1, 40)):
        writer = LogWriter(tmp_path / "log", CONFIG, rank=rank)
        writer.put("train", some_rows(count, 10_000 * rank))
        if rank == 0:
            writer.snapshot(Snapshot(5, 0.1, 0.5), b"five")
            writer.snapshot(Snapshot(9, 0.1, 0.5), b"nine")
            writer.alert({"step": 1, "kind": "test", "message": "…"})
            writer.alert({"step": 2, "kind": "test", "message": "…"})
        writer.close()
    return tmp_path / "log"


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


ALL = (0, 2500)
DAMAGE: dict[str, tuple[str, Callable[[Path], None], tuple[int, int]]] = {
    "a bit of one chunk in a shard": (
        "train/rank-0000/projection/c/1/0", lambda p: flip(p, INNER * 16 + 100), (1536, 2048),
    ),
    "a shard cut short": ("train/rank-0000/projection/c/1/0", cut, (1024, 2048)),
    "a shard that is gone": ("train/rank-0000/projection/c/2/0", Path.unlink, (2048, 2500)),
    "a column's bit": ("train/rank-0000/loss/c/0", lambda p: flip(p, 7), (0, 1024)),
    "ids that are gone": ("train/rank-0000/sample/c/1", Path.unlink, (1024, 2048)),
    "ids cut short": ("train/rank-0000/sample/c/2", cut, (2048, 2500)),
    "a column's metadata": ("train/rank-0000/lr/zarr.json", cut, ALL),
    "a group's mark": ("train/rank-0000/zarr.json", lambda p: flip(p, 120), ALL),
    "a group's mark that is gone": ("train/rank-0000/zarr.json", Path.unlink, ALL),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_verify_says_which_rows_are_lost_and_repair_keeps_all_others(
    kind: str, log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, damage, (start, stop) = DAMAGE[kind]
    damage(log / key)
    damaged = {p: p.read_bytes() for p in log.rglob("*") if p.is_file()}
    assert main(["verify", str(log), "--json"]) == 1
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert problems
    assert all("train/rank-0000" in line for line in problems)
    if (start, stop) != ALL:
        named = {line.partition(" are lost")[0].partition("rows ")[2] for line in problems}
        first = min(int(n.split(" to ")[0]) for n in named)
        last = max(int(n.split(" to ")[1]) for n in named)
        assert (first, last) == (start, stop - 1)
    assert damaged == {p: p.read_bytes() for p in log.rglob("*") if p.is_file()}, "it only reads"

    assert main(["verify", str(log), "--repair"]) == 0
    assert "moved to quarantine/000/" in capsys.readouterr().out or "gone" in kind
    table = open_log(log).train
    whole = np.concatenate([np.arange(start), np.arange(stop, 2500)])
    assert table["sample"].tolist() == [*whole, *range(10_000, 10_040)]
    expected = some_rows(2500)
    for name in ("projection", "loss", "lr", "role"):
        np.testing.assert_array_equal(table[name][: len(whole)], expected[name][whole])
    assert open_log(log).verify() == []
    kept = {p: c for p, c in damaged.items() if "rank-0001" in str(p) or "snapshots" in str(p)}
    assert all(path.read_bytes() == content for path, content in kept.items())
    if "gone" not in kind:
        aside = log / "quarantine/000" / key
        assert aside.read_bytes() == damaged[log / key], "moved, not deleted"
    capsys.readouterr()
    assert main(["verify", str(log)]) == 0
    taken_out = f": {stop - start} rows were" if (start, stop) != ALL else " was"
    (note,) = [line for line in capsys.readouterr().out.splitlines() if "an earlier repair" in line]
    assert note.startswith(f"train/rank-0000{taken_out} taken out by an earlier repair")


def test_a_repaired_log_can_be_continued(log: Path) -> None:
    flip(log / "train/rank-0000/projection/c/2/0", 100)
    assert main(["verify", str(log), "--repair"]) == 0
    writer = LogWriter(log, CONFIG, start_step=10_000)
    writer.put("train", some_rows(1000, 5000, step=10_000))
    writer.close()
    assert open_log(log).verify() == []
    samples = open_log(log).train["sample"].tolist()
    assert samples == [*range(2048), *range(5000, 6000), *range(10_000, 10_040)]


def test_a_damaged_snapshot_and_alert_are_named_and_moved(
    log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(log / "snapshots/step-00000005/parameters.safetensors", 1)
    flip(log / "alerts/rank-0000.jsonl", 10)
    alerts, snapshot = sorted(open_log(log).verify())
    assert alerts.startswith("alerts/rank-0000.jsonl: alerts/rank-0000.jsonl, line 1 is damaged")
    assert "step-00000005/parameters.safetensors is damaged: it is not what was written" in snapshot
    assert main(["verify", str(log), "--repair"]) == 0
    assert [s.step for s in open_log(log).snapshots] == [9]
    assert (log / "quarantine/000/snapshots/step-00000005/parameters.safetensors").exists()
    assert (log / "quarantine/000/alerts/rank-0000.jsonl").exists()
    assert [a["step"] for a in open_log(log).alerts()] == [2], "the other line is kept"
    capsys.readouterr()
    assert main(["verify", str(log), "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert [note.partition(" was taken out")[0] for note in notes] == [
        "alerts/rank-0000.jsonl", "snapshots/step-00000005",
    ]  # fmt: skip


def test_thumbnails_after_a_repair_do_not_take_the_place_of_others(log: Path) -> None:
    for sample in range(3):
        writer = LogWriter(log, CONFIG, start_step=10_000)
        writer.thumbnail(sample, b"\x89PNG\r\n\x1a\n" + bytes(9))
        writer.close()
        if sample == 1:
            cut(log / "thumbnails/rank-0000-000.zip")
            assert main(["verify", str(log), "--repair"]) == 0
    assert list(open_log(log).thumbnails) == [1, 2]


def test_rows_that_are_there_twice_are_told_and_left_alone(log: Path) -> None:
    store = open_log(log).writable_store()
    table = TableWriter(store, "train/rank-0001", 8, "float16")
    table.append({name: column[5:8] for name, column in some_rows(40, 10_000).items()})
    table.flush()
    (line,) = open_log(log).verify()
    assert line == "train/rank-0001: 3 rows are there twice: 40, 41, 42"
    assert main(["verify", str(log), "--repair"]) == 1
    assert len(open_log(log).train) == 2543


def test_a_missing_rank_is_named(log: Path) -> None:
    writer = LogWriter(log, CONFIG, rank=3)
    writer.put("train", some_rows(4, 30_000))
    writer.close()
    assert open_log(log).verify() == ["train/rank-0002: all rows are lost: the whole rank is missing"]
