"""`diffhook info` says what a log gives away."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffhook.cli import main
from diffhook.log import LogWriter, Snapshot
from diffhook.log.samples import name_id
from diffhook.log.table_writer import TableWriter
from diffhook.log.testing import CONFIG, some_rows


def test_it_says_what_is_in_a_log_and_how_large_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = LogWriter(tmp_path, CONFIG)
    writer.put("train", some_rows(10))
    writer.snapshot(Snapshot(5, 0.1, 0.5), bytes(1000))
    writer.close()
    assert main(["info", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["schema"], facts["train rows"], facts["samples"], facts["snapshots"]) == (3, 10, 10, [5])
    assert facts["holds images"] is False
    found = {part.name: 0 for part in tmp_path.iterdir()}
    for path in (p for p in tmp_path.rglob("*") if p.is_file()):
        found[path.relative_to(tmp_path).parts[0]] += path.stat().st_size
    assert facts["bytes"] == found
    assert main(["info", str(tmp_path)]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "the trained weights in its snapshots" in words
    assert "It holds no image." in words


def test_thumbnails_are_told_before_a_log_is_shared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = LogWriter(tmp_path, CONFIG)
    for sample in range(3):
        writer.thumbnail(sample, b"\x89PNG\r\n\x1a\n" + bytes(9))
    writer.close()
    assert main(["info", str(tmp_path)]) == 0
    assert "It holds small images of 3 samples." in " ".join(capsys.readouterr().out.split())
    assert main(["info", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["thumbnails"], facts["holds images"]) == (3, True)


def test_names_captions_and_paths_are_told_before_a_log_is_shared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told() -> str:
        assert main(["info", str(tmp_path)]) == 0
        return " ".join(capsys.readouterr().out.split())

    LogWriter(tmp_path, CONFIG).close()
    assert "It names no sample. No query holds a caption or a path." in told()
    writer = LogWriter(tmp_path, CONFIG)
    writer.put("train", some_rows(2))
    writer.keep_names({name_id("private/face.png"): "private/face.png"})
    writer.close()
    dim = CONFIG["identity"]["projection"]["dim"]
    for query, samples in (("mine", {"captions": ["a face"]}), ("none", {})):
        table = TableWriter(writer.store, f"queries/{query}/rank-0000", dim, "float16")
        table.append(some_rows(1))
        table.flush()
        table.describe({"snapshots": [], "samples": samples})
    assert "It names 1 samples, by their files or keys." in told()
    assert "are kept with 1 of its queries" in told()
