"""Any JSON in the place of any part of a log: it reads, or ends in a LogError. Looked for by hypothesis."""

from __future__ import annotations

import json
from contextlib import suppress
from functools import cache
from pathlib import PurePosixPath
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from diffhook.errors import LogError
from diffhook.log.checksum import with_checksum
from diffhook.log.store import check_name
from diffhook.log.verification import verify
from tests.log import fuzz

QUICK = settings(derandomize=True, max_examples=10, deadline=None, database=None)

NUMBERS = st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from([0, 1, 16, 40, 2**31, 2**47, 2**63])
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
COUNTS = st.integers(-2, 2**64) | st.integers(0, 60)


FILES = cache(fuzz.original)


def read(key: str, content: Any) -> None:
    """Everything that a reader can ask; what comes of it may be a LogError and nothing else."""
    changed = {**FILES(), key: json.dumps(content).encode()}
    with suppress(LogError):
        fuzz.contents(changed)
    with suppress(LogError):
        verify(fuzz.open_files(changed))


def document(key: str) -> Any:
    return json.loads(FILES()[key])


@QUICK
@given(st.text() | st.text(alphabet="ab./\\:~-_ \0", max_size=12))
def test_no_name_leads_out_of_the_log(name: str) -> None:
    try:
        check_name(name)
    except LogError:
        return
    path = PurePosixPath("queries") / name
    assert path.parent == PurePosixPath("queries")
    assert path.name == name
    assert not name.startswith(".")
    assert not set(name) & set("/\\:\0")


@QUICK
@given(data=st.data())
def test_no_metadata_of_a_column_does_harm(data: st.DataObject) -> None:
    column = data.draw(st.sampled_from(["loss", "projection", "sample", "step"]))
    key = f"train/rank-0000/{column}/zarr.json"
    found = document(key)
    read(key, {**found, data.draw(st.sampled_from(sorted(found))): data.draw(VALUES)})


@QUICK
@given(shape=st.lists(COUNTS, max_size=3), chunk=st.lists(COUNTS, max_size=3), inner=COUNTS)
def test_no_shape_claims_memory_or_rows(shape: list[int], chunk: list[int], inner: int) -> None:
    key = "train/rank-0000/projection/zarr.json"
    found = document(key)
    found["codecs"][0]["configuration"]["chunk_shape"][0] = inner
    grid = {"name": "regular", "configuration": {"chunk_shape": chunk}}
    read(key, {**found, "shape": shape, "chunk_grid": grid})


@QUICK
@given(data=st.data())
def test_no_attributes_of_a_group_do_harm_even_with_a_right_checksum(data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(["train/rank-0000/zarr.json", "queries/q/rank-0000/zarr.json"]))
    sessions = st.lists(
        st.fixed_dictionaries(
            {"first_row": COUNTS, "start_step": NUMBERS}, optional={"dropped_rows": NUMBERS}
        ),
        max_size=4,
    )
    changes = data.draw(
        st.fixed_dictionaries(
            {},
            optional={
                "committed": COUNTS | VALUES,
                "columns": st.lists(st.text(max_size=8) | st.just("loss"), max_size=4) | VALUES,
                "sessions": sessions | VALUES,
                "lost": st.lists(st.lists(COUNTS, max_size=3), max_size=3) | VALUES,
                "description": VALUES,
            },
        )
    )
    found = document(key)
    own = {name: value for name, value in found["attributes"].items() if name != "crc32"}
    read(key, {**found, "attributes": with_checksum({**own, **changes})})


@QUICK
@given(
    where=st.sampled_from(["zarr.json", "snapshots/step-00000009/snapshot.json", "alerts/rank-0000.jsonl"]),
    value=VALUES | st.dictionaries(st.sampled_from(["step", "session", "lr", "sha256", "kind"]), VALUES),
    checksummed=st.booleans(),
)
def test_no_json_in_a_small_file_does_harm(where: str, value: Any, checksummed: bool) -> None:
    if checksummed and isinstance(value, dict):
        value = with_checksum(value)
    if where == "zarr.json":
        value = {"zarr_format": 3, "node_type": "group", "attributes": {"diffhook": value}}
    assert where in FILES()
    read(where, value)
