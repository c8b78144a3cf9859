"""The same log in an object store, over HTTP, and moved by plain copy."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffhook.cli import main
from diffhook.errors import LogError
from diffhook.log import LogWriter, Snapshot, open_log
from diffhook.log.testing import CONFIG, some_rows
from tests.log import s3_faults


@pytest.fixture(scope="module")
def server() -> Iterator[s3_faults.FaultyApp]:
    """One for all tests, without faults until one asks for them."""
    with s3_faults.faulty_s3() as app:
        yield app


@pytest.fixture
def s3(server: s3_faults.FaultyApp) -> Any:
    """The fsspec file system of its bucket "runs"."""
    import fsspec

    return fsspec.filesystem("s3", use_listings_cache=False)


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffhook.log.table_writer.rows_per_shard", lambda dim, dtype: 16)


def write(location: Any) -> None:
    """Two sessions, the second going back a little."""
    for start, stop in ((0, 10), (8, 12)):
        writer = LogWriter(location, CONFIG, start_step=start)
        for step in range(start, stop):
            writer.put("train", some_rows(4, 4 * step, step=step))
            if step == 9:
                writer.flush()
        writer.snapshot(Snapshot(stop, 0.1, 0.3, writer.session), b"weights")
        writer.alert({"step": stop - 1, "kind": "test", "message": "…"})
        writer.close()


def check(location: Any) -> None:
    log = open_log(location)
    assert log.train["sample"].tolist() == [*range(32), *range(32, 48)]
    expected = np.concatenate([some_rows(4, 4 * step)["projection"] for step in range(12)])
    np.testing.assert_array_equal(log.train["projection"], expected)
    assert [s.parameters() for s in log.snapshots] == [b"weights"]
    assert [a["step"] for a in log.alerts()] == [11]


def test_a_log_in_an_object_store_is_written_resumed_and_read(
    s3: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    write("s3://runs/butterflies")
    check("s3://runs/butterflies")
    assert main(["info", "s3://runs/butterflies"]) == 0
    assert "It holds no image." in " ".join(capsys.readouterr().out.split())


def test_a_log_moves_by_plain_copy_in_both_directions(s3: Any, tmp_path: Path) -> None:
    write(tmp_path / "here")
    s3.put(str(tmp_path / "here"), "runs/there", recursive=True)
    check("s3://runs/there")
    s3.get("runs/there", str(tmp_path / "back"), recursive=True)
    check(tmp_path / "back")
    shutil.copytree(tmp_path / "back", tmp_path / "again")
    check(tmp_path / "again")
    shutil.move(tmp_path / "again", tmp_path / "moved")
    check(tmp_path / "moved")
    here = sorted(
        p.relative_to(tmp_path / "here").as_posix() for p in (tmp_path / "here").rglob("*") if p.is_file()
    )
    there = sorted(key.removeprefix("runs/there/") for key in s3.find("runs/there"))
    assert here == there, "the layout is the same everywhere"


def test_a_damaged_object_is_quarantined_in_the_store(s3: Any, tmp_path: Path) -> None:
    write(tmp_path)
    s3.put(str(tmp_path), "runs/damaged", recursive=True)
    key = "runs/damaged/train/rank-0000/projection/c/1/0"
    s3.pipe(key, s3.cat(key)[:-10])
    assert main(["verify", "s3://runs/damaged", "--repair"]) == 0
    assert s3.exists("runs/damaged/quarantine/000/train/rank-0000/projection/c/1/0")
    assert open_log("s3://runs/damaged").train["sample"].tolist() == [*range(16), *range(32, 48)]


def test_faults_of_the_store_cost_time_and_neither_rows_nor_the_training(
    server: s3_faults.FaultyApp,
) -> None:
    """503, 500, slow answers and none, from the opening on."""
    counts, problems = s3_faults.check(server, 5, 6, kinds=("503", "500", "cut", "slow"))
    assert problems == []
    assert sum(counts["faults"].values()) == 6
    assert counts["rows"] + counts["counted_as_dropped"] == 5 * s3_faults.BATCH


def test_listings_that_come_short_lose_and_double_nothing(server: s3_faults.FaultyApp) -> None:
    """While the log is opened, resumed by fewer processes, and written: half of each listing is missing."""
    place = "s3://runs/short"
    server.kinds, server.share, server.left = ("short",), 1.0, 10**6
    expected: Counter[tuple[int, int]] = Counter()
    names: dict[int, str] = {}
    for start, processes in ((0, 2), (4, 1)):
        for rank in range(processes):
            writer = LogWriter(place, CONFIG, rank=rank, processes=processes, start_step=start)
            sample = 100 * start + 10 * rank
            names[sample] = f"{sample}.png"
            writer.keep_names({sample: names[sample]})
            for step in range(start, start + 4):
                writer.put("train", some_rows(2, sample, step=step))
                expected.update((step, sample + i) for i in range(2))
            writer.thumbnail(sample, b"\x89PNG\r\n\x1a\n")
            writer.close()
    for _ in range(2):  # a reader beside it
        table = open_log(place).train
        assert Counter(zip(table["step"].tolist(), table["sample"].tolist(), strict=True)) == expected
    assert server.seen["short"] > 10
    server.left, server.share = 0, 0.25
    log = open_log(place)
    assert len(log.sessions) == 2
    assert log.names() == names
    assert set(log.thumbnails) == set(names)
    assert log.verify() == []


def test_what_is_not_there_is_a_log_error(s3: Any) -> None:
    with pytest.raises(LogError, match=r"no diffhook log at .*runs/nothing"):
        open_log("s3://runs/nothing")
    with pytest.raises(LogError, match="no-such-bucket"):
        open_log("s3://no-such-bucket/run")
    with pytest.raises(LogError, match="cannot open nonsense://x"):
        open_log("nonsense://x")
