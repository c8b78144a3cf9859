"""Compact and merge: the same rows in fewer files, all at once or not at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffhook.cli import main
from diffhook.errors import ConfigurationError, LogError
from diffhook.gradients.sketch import Sketch
from diffhook.log import LogWriter, Snapshot, open_log
from diffhook.log.compaction import compact, fold, merge
from diffhook.log.table_writer import TableWriter
from diffhook.log.testing import CONFIG, DIM, some_rows


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffhook.log.table_writer.rows_per_shard", lambda dim, dtype: 16)


def write(location: Path, ranks: Any = (0, 1, 2), steps: Any = range(6), first: int = 0) -> None:
    for rank in ranks:
        writer = LogWriter(location, CONFIG, rank=rank, start_step=min(steps))
        for step in steps:
            writer.put("train", some_rows(3, first + 1000 * rank + 3 * step, step=step))
        if rank == 0:
            writer.put("probe", some_rows(5, step=max(steps) + 1))
            writer.snapshot(Snapshot(max(steps) + 1, 0.1, 0.3, writer.session), b"weights %d" % max(steps))
            writer.alert({"step": min(steps), "kind": "test", "message": f"at {min(steps)}"})
            writer.thumbnail(max(steps), b"\x89PNG\r\n\x1a\n".ljust(20))
        writer.close()


def add_query(location: Path, name: str, first: int = 0) -> None:
    log = open_log(location)
    writer = TableWriter(log.writable_store(), f"queries/{name}/rank-0000", DIM, "float16")
    writer.append(some_rows(4, first, step=6))
    writer.flush()
    writer.describe({"snapshots": [[s.step, s.session] for s in log.snapshots]})


def rows(location: Path, table: str = "train") -> dict[str, Any]:
    found = getattr(open_log(location), table) if table != "q" else open_log(location).queries["q"]
    order = np.lexsort((found["sample"], found["step"]))
    return {name: found[name][order] for name in found.columns}


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_a_compact_copy_holds_the_rows_that_count_in_whole_shards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "log")
    write(tmp_path / "log", ranks=(0,), steps=range(4, 8), first=500)  # 4 and 5 again, without rank 1
    add_query(tmp_path / "log", "q")
    before = {p: p.read_bytes() for p in (tmp_path / "log").rglob("*") if p.is_file()}
    assert main(["compact", str(tmp_path / "log"), "--out", str(tmp_path / "new")]) == 0
    assert capsys.readouterr().out.strip() == f"{tmp_path / 'new'}: 48 train rows, 5 probe rows"
    assert before == {p: p.read_bytes() for p in (tmp_path / "log").rglob("*") if p.is_file()}
    old, new = open_log(tmp_path / "log"), open_log(tmp_path / "new")
    for table in ("train", "probe", "q"):
        assert_same(rows(tmp_path / "new", table), rows(tmp_path / "log", table))
    sizes = [block.stop - block.start for block in new.train.blocks()]
    assert sizes == [16, 16, 16]
    kept = [{s.step: s.parameters() for s in log.snapshots} for log in (old, new)]
    assert kept[0] == kept[1]
    assert [a["message"] for a in new.alerts()] == [a["message"] for a in old.alerts()]
    assert dict(new.thumbnails) == dict(old.thumbnails)
    assert new.config == old.config
    assert new.verify() == []
    writer = LogWriter(tmp_path / "new", CONFIG, start_step=2)  # and a run goes on from it
    writer.put("train", some_rows(4, 9000, step=2))
    writer.close()
    assert set(open_log(tmp_path / "new").train["step"]) == {0, 1, 2}
    assert open_log(tmp_path / "new").train["step"].tolist().count(2) == 4


def test_folding_gives_the_sketch_that_a_smaller_dim_would_have_made() -> None:
    shapes = {"a": (7, 5), "wide": (130, 128, 3, 3), "b": (301,), "matrix": (256, 300), "large": (150, 128)}
    random = torch.Generator().manual_seed(1)
    gradients = {n: torch.randn(2, *s, generator=random).double() for n, s in shapes.items()}
    for dim, smaller in ((64, 16), (60, 20), (96, 1), (48, 48)):
        found = {
            size: Sketch(size, {n: torch.Size(s) for n, s in shapes.items()}, seed=5).project(gradients)
            for size in (dim, smaller)
        }
        folded = fold(found[dim].numpy(), smaller)
        np.testing.assert_allclose(folded, found[smaller].numpy(), rtol=2e-4, atol=1e-3)


def test_a_folded_copy_says_its_dim_and_others_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "log")
    add_query(tmp_path / "log", "q")
    compact(tmp_path / "log", tmp_path / "new", dim=4)
    new, old = open_log(tmp_path / "new"), rows(tmp_path / "log")
    assert new.config["identity"]["projection"] == {"dim": 4, "seed": 0, "kind": "sketch"}
    assert new.train.dim == new.queries["q"].dim == 4
    expected = old["projection"].astype(np.float32)
    np.testing.assert_allclose(
        rows(tmp_path / "new")["projection"], expected[:, :4] + expected[:, 4:], rtol=1e-3, atol=1e-3
    )
    for dim in (3, 0, -4, 16):
        with pytest.raises(ConfigurationError, match=f"dim is {dim}; expected a divisor of the log's 8"):
            compact(tmp_path / "log", tmp_path / "other", dim=dim)
    assert not (tmp_path / "other").exists()


def test_parts_of_a_run_are_merged(tmp_path: Path) -> None:
    write(tmp_path / "whole", steps=range(8))
    write(tmp_path / "a", ranks=(0, 1), steps=range(4))
    write(tmp_path / "b", ranks=(2,), steps=range(8))
    write(tmp_path / "c", ranks=(0, 1), steps=range(4, 8))
    add_query(tmp_path / "c", "q")
    parts = [str(tmp_path / name) for name in ("a", "b", "c", "a")]  # one of them twice
    assert main(["merge", *parts, "--out", str(tmp_path / "all")]) == 0
    assert_same(rows(tmp_path / "all"), rows(tmp_path / "whole"))
    found = open_log(tmp_path / "all")
    assert [(s.step, s.parameters()) for s in found.snapshots] == [(4, b"weights 3"), (8, b"weights 7")]
    assert [a["message"] for a in found.alerts()] == ["at 0", "at 4"]
    assert list(found.queries) == ["q"]
    assert found.verify() == []


def test_what_is_not_one_run_is_not_merged(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b", first=7)
    with pytest.raises(ConfigurationError, match=r"different rows of train/rank-0000, step 0: they are two"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "all")
    projection = {**CONFIG["identity"]["projection"], "seed": 1}  # type: ignore[dict-item]
    other = {**CONFIG, "identity": {**CONFIG["identity"], "projection": projection}}  # type: ignore[dict-item]
    LogWriter(tmp_path / "c", other).close()
    with pytest.raises(ConfigurationError, match=r"different configurations; at projection\.seed"):
        merge([tmp_path / "a", tmp_path / "c"], tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_a_copy_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "log")
    (tmp_path / "log/train/rank-0001/loss/c/0").unlink()
    with pytest.raises(LogError, match="rank-0001/loss"):
        compact(tmp_path / "log", tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log"]
    (tmp_path / "taken").mkdir()
    with pytest.raises(LogError, match="taken exists: choose another place"):
        compact(tmp_path / "log", tmp_path / "taken")


def test_what_was_left_out_is_still_told_by_the_copy(tmp_path: Path) -> None:
    for name, rank in (("a", 0), ("b", 1)):
        write(tmp_path / name, ranks=(rank,))
        store = open_log(tmp_path / name).writable_store()
        table = TableWriter(store, f"train/rank-{rank:04d}", DIM, "float16")
        table.note_dropped(steps=3 + rank, rows=12, snapshots=rank)
        table.flush()
    assert open_log(tmp_path / "a").dropped() == (3, 12)
    compact(tmp_path / "a", tmp_path / "small")
    assert open_log(tmp_path / "small").dropped() == (3, 12)
    merge([tmp_path / "a", tmp_path / "b", tmp_path / "a"], tmp_path / "both")
    both = open_log(tmp_path / "both")
    assert (both.dropped(), both.dropped_snapshots()) == ((7, 24), 1)


@pytest.mark.skipif(sys.platform == "win32", reason="no locks")
def test_what_a_killed_copy_left_is_removed_by_the_next_but_not_one_at_work(tmp_path: Path) -> None:
    write(tmp_path / "log")
    killed, other = tmp_path / "new.0123abcd.unfinished", tmp_path / "new.mine.unfinished"
    for left in (killed, other):
        (left / "train").mkdir(parents=True)
    at_work = tmp_path / "new.ffffffff.unfinished"
    at_work.mkdir()
    code = (
        "import sys; from diffhook.log.lock import lock_rank; from diffhook.log.store import open_store;"
        "store = open_store(sys.argv[1], read_only=False); lock_rank(store, 0, store);"
        "print('locked', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(at_work)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    compact(tmp_path / "log", tmp_path / "new")
    assert {p.name for p in tmp_path.iterdir()} == {"log", "new", other.name, at_work.name}
    assert not (tmp_path / "new/locks").exists()
    process.communicate()
