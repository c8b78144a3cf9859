"""A log from anywhere: reading it cannot run code, leave its folder, hang or fill the memory."""

from __future__ import annotations

import ast
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import diffhook.log
from diffhook.errors import LogError
from diffhook.log import LogWriter, open_log
from diffhook.log.mark import put_attributes
from diffhook.log.store import check_name
from diffhook.log.testing import CONFIG, some_rows
from diffhook.log.verification import verify
from tests.log import fuzz, hostile_folders


@pytest.fixture(scope="module")
def files() -> fuzz.Files:
    return fuzz.original()


@pytest.fixture(scope="module")
def expected(files: fuzz.Files) -> dict[str, Any]:
    return fuzz.contents(files)


def test_a_mutated_log_reads_right_or_names_the_damage(files: fuzz.Files, expected: dict[str, Any]) -> None:
    """Of every kind of mutation a few; examples/benchmarks/fuzz.py makes a thousand."""
    outcomes = [fuzz.check(seed, files, expected) for seed in range(3 * len(fuzz.MUTATIONS))]
    bad = [outcome.words for outcome in outcomes if outcome.kind not in ("right", "error")]
    assert bad == []
    assert any(outcome.kind == "error" for outcome in outcomes)


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes in folders")
def test_a_prepared_folder_harms_nobody_who_runs_a_command_on_it(files: fuzz.Files) -> None:
    outcomes = [hostile_folders.check(seed, files) for seed in range(len(hostile_folders.KINDS))]
    assert [outcome.words for outcome in outcomes if outcome.kind not in ("right", "error")] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [10**14]}, None),  # longer than what counts: not looked at
        ({"shape": [-1]}, "-1 rows"),
        ({"shape": [1 << 60]}, "rows in chunks"),
        ({"shape": ["40"]}, "shape"),
        ({"shape": [40, 40]}, "shape"),
        ({"shape": [39]}, None),  # the mark says how many there are
        ({"data_type": "float64"}, "data type 'float64'; expected float32"),
        ({"fill_value": 7}, "fill_value is 7"),
        ({"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1 << 40]}}}, "chunks of"),
        ({"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [0]}}}, "chunks of 0"),
        ({"codecs": [{"name": "bytes", "configuration": {"endian": "big"}}, {"name": "crc32c"}]}, "codecs"),
        ({"codecs": [{"name": "pickle"}]}, "codecs"),
        ({"codecs": [{"name": "bytes"}, {"name": "zstd"}, {"name": "crc32c"}]}, "codecs"),
        ({"chunk_key_encoding": {"name": "v2"}}, "chunk_key_encoding"),
        ({"node_type": "group"}, "node_type"),
    ],
)
def test_absurd_metadata_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], message: str | None
) -> None:
    writer = LogWriter(tmp_path, CONFIG)
    writer.put("train", some_rows(40))
    writer.close()
    path = tmp_path / "train/rank-0000/loss/zarr.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    if message is None:
        np.testing.assert_array_equal(open_log(tmp_path).train["loss"], some_rows(40)["loss"])
        return
    with pytest.raises(LogError, match=f"train/rank-0000/loss/zarr.json is damaged: .*{message}"):
        _ = open_log(tmp_path).train["loss"]


def test_rows_without_chunks_are_not_made_up(tmp_path: Path) -> None:
    """A few bytes of metadata cannot claim memory for rows that are not there."""
    writer = LogWriter(tmp_path, CONFIG)
    writer.put("train", some_rows(1))
    writer.close()
    log = open_log(tmp_path)
    group = log.train.groups[0]
    for name in group.columns:
        path = tmp_path / f"train/rank-0000/{name}/zarr.json"
        document = json.loads(path.read_text())
        document["shape"][0] = 1 << 47
        path.write_text(json.dumps(document))
    put_attributes(log.writable_store(), "train/rank-0000", {**group.attributes, "committed": 1 << 47})
    with pytest.raises(LogError, match=r"not all of its .* chunks are there"):
        len(open_log(tmp_path).train)
    assert verify(open_log(tmp_path).store)


@pytest.mark.parametrize("name", ["..", "../../outside", "a..b", ".hidden", "a/b", "", "x" * 101, "ä"])
def test_names_lead_nowhere(name: str) -> None:
    from diffhook.log.store import check_name

    with pytest.raises(LogError, match="cannot name a part of a log"):
        check_name(name)


def test_queries_of_a_dangerous_name_are_none(tmp_path: Path) -> None:
    LogWriter(tmp_path, CONFIG).close()
    (tmp_path / "queries/a..b").mkdir(parents=True)
    assert open_log(tmp_path).index.query_names == []
    with pytest.raises(LogError, match=r"'a\.\.b' cannot name a part of a log"):
        check_name("a..b")


def test_a_link_out_of_the_log_is_not_written_through(tmp_path: Path) -> None:
    LogWriter(tmp_path / "log", CONFIG).close()
    (tmp_path / "elsewhere").mkdir()
    os.symlink(tmp_path / "elsewhere", tmp_path / "log/queries")
    with pytest.raises(LogError, match="queries is a symbolic link"):
        open_log(tmp_path / "log").writable_store()
    with pytest.raises(LogError, match="symbolic link"):
        LogWriter(tmp_path / "log", CONFIG)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_nothing_in_the_log_package_can_run_what_it_reads() -> None:
    forbidden = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "importlib", "subprocess"}
    for path in Path(diffhook.log.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name.partition(".")[0] for alias in node.names}
                names.add((getattr(node, "module", "") or "").partition(".")[0])
                assert not names & forbidden, path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "__import__"), path
