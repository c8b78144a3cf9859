"""What counts is the path of sessions that leads to the live one; the rest is kept and can be asked for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from diffhook.cli import main
from diffhook.errors import LogError
from diffhook.log import LogWriter, Snapshot, open_log
from diffhook.log.lineage import Session, Span, continued, longest, path_to
from diffhook.log.testing import CONFIG, some_rows
from diffhook.log.verification import verify


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffhook.log.table_writer.rows_per_shard", lambda dim, dtype: 16)


def run(
    path: Path, start: int, stop: int, after: str | None = None, *, ranks: int = 1, first: int = 0
) -> str:
    """One start of a run: two rows a step and rank, a snapshot with two probe rows at its end. Its id."""
    token = f"run {start} {stop} {len(list(path.glob('train/rank-*/zarr.json')))} {first}"
    writers = [
        LogWriter(path, CONFIG, rank=r, processes=ranks, start_step=start, after=after, run=token)
        for r in range(ranks)
    ]
    for step in range(start, stop):
        for writer in writers:
            writer.put("train", some_rows(2, first + 1000 * writer.rank + 2 * step, step=step))
    writers[0].snapshot(Snapshot(stop, 0.1, 0.3), b"weights")
    writers[0].put("probe", some_rows(2, first, step=stop))
    for writer in writers:
        writer.close()
    return writers[0].position() or ""


def steps(path: Path, session: int | None = None) -> list[int]:
    """Of the rows that count, each step once; two rows of each, as written."""
    found = open_log(path, session).train["step"].tolist()
    assert sorted(found) == sorted(2 * sorted(set(found))), "no row is there twice, and none is half there"
    return sorted(set(found))


def test_a_path_goes_from_the_live_session_to_its_beginning() -> None:
    sessions = [Session("a", 0), Session("b", 5, 0), Session("c", 15, 0), Session("d", 17, 2)]
    forever = path_to(sessions)[3].stop
    assert path_to(sessions) == {0: Span(-1, 15), 2: Span(15, 17), 3: Span(17, forever)}
    assert path_to(sessions, 1) == {0: Span(-1, 5), 1: Span(5, forever)}
    assert path_to([]) == {}
    with pytest.raises(LogError, match="there is no session 4; the log has 4, counted from 0"):
        path_to(sessions, 4)


def test_a_session_that_went_on_from_before_its_parents_start_ends_all_between() -> None:
    """As without a checkpoint that says more: training goes on at a step of the newest session."""
    sessions = [Session("a", 0), Session("b", 10, 0), Session("c", 3, 1)]
    path = path_to(sessions)
    assert [path[number].stop for number in (0, 1)] == [3, 3]
    assert not path[1].rows(np.arange(10, 20), probes=True).any()


def test_ranks_without_a_word_between_them_begin_the_same_session() -> None:
    first = continued([], 0)
    assert continued(first, 0) == first, "the other rank joins"
    second = continued(first, 0, has_begun=True)
    assert len(second) == 2
    third = continued(second, 7, second[0].id)
    assert third[-1].parent == 0
    assert continued(third, 7, second[0].id) == third
    assert continued(third, 9)[-1] == Session(continued(third, 9)[-1].id, 9, 2)
    assert longest([first, third, second]) == third
    with pytest.raises(LogError, match="its ranks have different records of the same sessions"):
        longest([third, [*second, Session("another", 7, 0)]])


def test_a_wrong_branch_is_left_and_the_run_it_left_comes_back(tmp_path: Path) -> None:
    """Checkpoint 5 of a run that reached 15, one step, then checkpoint 15 again."""
    first = run(tmp_path, 0, 15)
    run(tmp_path, 5, 6, first, first=100)
    assert steps(tmp_path) == list(range(6))
    run(tmp_path, 15, 20, first)
    assert steps(tmp_path) == list(range(20))
    log = open_log(tmp_path)
    assert sorted(log.train["sample"]) == list(range(40)), "not a row of the wrong branch"
    assert [s.step for s in log.snapshots] == [15, 20]
    assert steps(tmp_path, 1) == list(range(6)), "it is kept, and can be asked for"
    assert [s.step for s in open_log(tmp_path, 1).snapshots] == [6]
    assert log.verify() == []
    with pytest.raises(LogError, match="there is no session 3"):
        open_log(tmp_path, 3)


def test_info_lists_every_session_and_which_of_its_rows_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(tmp_path, 0, 15)
    run(tmp_path, 5, 6, first)
    run(tmp_path, 15, 20, first)
    assert main(["info", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["sessions"]
    assert [(s["goes on from"], s["at step"], s["rows"], s["count"]) for s in told] == [
        ("the beginning", 0, 30, "before step 15"),
        ("session 0", 5, 2, "none: another branch"),
        ("session 0", 15, 10, "all"),
    ]
    assert main(["info", str(tmp_path)]) == 0
    assert "none: another branch" in capsys.readouterr().out


def test_probe_rows_and_snapshot_of_a_checkpoints_own_step_survive_a_resume(tmp_path: Path) -> None:
    """Train to 10 and save; train on to 13; resume 10: its probes were taken before the branch left."""
    first = run(tmp_path, 0, 10)
    run(tmp_path, 10, 13, first, first=50)
    run(tmp_path, 10, 20, first)
    log = open_log(tmp_path)
    assert sorted(log.probe["step"].tolist()) == [10, 10, 20, 20]
    assert log.probe["weight"].tolist() == [0.25] * 4
    assert [(s.step, s.session) for s in log.snapshots] == [(10, 0), (20, 2)]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (4, 3), (1, 4)])
def test_another_number_of_processes_loses_and_doubles_nothing(
    tmp_path: Path, before: int, after: int
) -> None:
    """To step 13, with a checkpoint at 10, and on from there."""
    first = run(tmp_path, 0, 13, ranks=before)
    run(tmp_path, 10, 20, first, ranks=after)
    found = open_log(tmp_path).train
    by_step = np.bincount(found["step"])
    assert by_step.tolist() == 10 * [2 * before] + 10 * [2 * after]
    assert len(set(zip(found["step"].tolist(), found["sample"].tolist(), strict=True))) == len(found)
    assert open_log(tmp_path).verify() == []
    assert open_log(tmp_path).live_ranks == set(range(after))


def test_opening_a_log_supersedes_nothing_and_the_first_row_does(tmp_path: Path) -> None:
    run(tmp_path, 0, 8)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and "alerts" not in p.parts}
    writer = LogWriter(tmp_path, CONFIG, start_step=3)
    assert steps(tmp_path) == list(range(8))
    writer.close()
    assert before == {p: p.read_bytes() for p in before}
    writer = LogWriter(tmp_path, CONFIG, start_step=3)
    writer.put("train", some_rows(2, step=3))
    writer.close()
    assert steps(tmp_path) == list(range(4))


def test_a_run_into_a_used_log_says_what_it_will_do(tmp_path: Path) -> None:
    assert LogWriter(tmp_path, CONFIG).will_supersede() == ""
    run(tmp_path, 0, 8)

    def said(start: int) -> str:
        writer = LogWriter(tmp_path, CONFIG, start_step=start)
        words = writer.will_supersede()
        writer.close()
        return words

    held = "the log holds 16 rows of an earlier run of 16 samples; "
    assert said(0).startswith(f"{held}they are superseded from step 0 on, once the first new row is written")
    assert said(5).startswith(f"{held}6 of them are superseded from step 5 on")
    assert said(8) == f"{held}this run goes on after them, from step 8"


def test_another_dataset_in_the_same_log_is_refused_by_name(tmp_path: Path) -> None:
    def config(samples: int | None) -> dict[str, object]:
        dataset = None if samples is None else {"samples": samples}
        return {"identity": {**CONFIG["identity"], "dataset": dataset}}  # type: ignore[dict-item]

    LogWriter(tmp_path, config(64)).close()
    with pytest.raises(LogError, match=r"another dataset: dataset\.samples: the log has 64, this run 65"):
        LogWriter(tmp_path, config(65))
    LogWriter(tmp_path, config(None)).close()  # a loop that names its samples itself


def test_a_checkpoint_of_a_session_that_the_log_lacks_is_told_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, 0, 8)
    run(tmp_path, 6, 9, "of a log that is gone")
    assert "is of a session that the log at" in caplog.text
    assert steps(tmp_path) == list(range(9))


def test_ranks_that_contradict_each_other_are_told_not_believed(tmp_path: Path) -> None:
    run(tmp_path / "a", 0, 4, ranks=2)
    run(tmp_path / "b", 0, 4, ranks=2, first=7)
    mark = "train/rank-0001/zarr.json"
    (tmp_path / "a" / mark).write_bytes((tmp_path / "b" / mark).read_bytes())
    with pytest.raises(LogError, match="different records of the same sessions"):
        len(open_log(tmp_path / "a").train)
    assert any("different records" in str(finding) for finding in verify(open_log(tmp_path / "a").store))
