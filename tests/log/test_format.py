"""The format: what is on the disk is what FORMAT.md says; a log of another schema is refused."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import zarr

from diffhook.errors import LogError
from diffhook.log import SCHEMA_VERSION, LogWriter, open_log
from diffhook.log.compaction import compact
from tests.log.golden.make import CONFIG, FOLDER, rows


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """A log as it was written when this schema was settled."""
    with zipfile.ZipFile(FOLDER / f"schema-{SCHEMA_VERSION}.zip") as archive:
        archive.extractall(tmp_path / "log")
    return tmp_path / "log"


def check(location: Path) -> None:
    log = open_log(location)
    expected = [rows(4, 100 * rank + 4 * step, step) for rank in (0, 1) for step in range(5)]
    assert sorted(log.train["sample"]) == sorted(np.concatenate([r["sample"] for r in expected]))
    order = np.argsort(log.train["sample"])
    for name in expected[0]:
        values = np.concatenate([r[name] for r in expected])
        np.testing.assert_array_equal(log.train[name][order], values, err_msg=name)
    assert log.train["role"].tolist() == [0] * 40
    np.testing.assert_array_equal(log.probe["projection"], rows(3, 0, 5)["projection"])
    (snapshot,) = log.snapshots
    assert (snapshot.step, snapshot.lr, snapshot.lr_sum) == (5, 0.5, 2.5)
    assert snapshot.parameters() == b"parameters after 5 steps"
    assert [(a["step"], a["message"]) for a in log.alerts()] == [(4, "an alert")]
    assert log.config == CONFIG
    assert log.verify() == []


def test_a_log_reads_as_it_was_written_and_so_does_its_copy(golden: Path, tmp_path: Path) -> None:
    check(golden)
    compact(golden, tmp_path / "new")
    check(tmp_path / "new")


@pytest.mark.parametrize(
    "schema", [SCHEMA_VERSION + 1, 99, SCHEMA_VERSION - 1, 1, str(SCHEMA_VERSION), 3.0, 0, -1, True, None]
)
def test_another_schema_is_refused(tmp_path: Path, schema: object) -> None:
    root = zarr.create_group(tmp_path / "log")
    root.attrs["diffhook"] = {"schema": schema, "config": {}}
    with pytest.raises(LogError, match=f"has schema {schema!r}; this diffhook reads {SCHEMA_VERSION}: "):
        open_log(tmp_path / "log")


def test_it_opens_in_plain_zarr_and_in_xarray_as_documented(tmp_path: Path) -> None:
    xarray = pytest.importorskip("xarray")
    writer = LogWriter(tmp_path / "log", CONFIG)
    written = rows(20, 0, 0)
    writer.put("train", written)
    writer.close()
    group = zarr.open_group(tmp_path / "log", path="train/rank-0000", mode="r")
    assert group.attrs["committed"] == 20
    dataset = xarray.open_zarr(
        tmp_path / "log", group="train/rank-0000", consolidated=False, mask_and_scale=False
    )
    for name in written:
        np.testing.assert_array_equal(group[name][:], written[name])
        np.testing.assert_array_equal(dataset[name], written[name])
    assert dataset["projection"].dims == ("row", "projection_dim")
    assert set(zarr.open_group(tmp_path / "log", mode="r")) == {"train", "probe"}
    np.testing.assert_array_equal(open_log(tmp_path / "log").to_xarray()["loss"], written["loss"])
