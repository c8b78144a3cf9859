"""Logs that were truncated, mutated, or made to do harm: each reads right or ends in a LogError."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from zarr.core.buffer import cpu
from zarr.storage import MemoryStore

from diffhook.cli.info import describe
from diffhook.errors import LogError
from diffhook.log import LogWriter, Snapshot, open_log
from diffhook.log import table_writer as writing
from diffhook.log.table_writer import TableWriter
from diffhook.log.testing import CONFIG, DIM, some_rows
from diffhook.log.verification import verify

Files = dict[str, bytes]
Mutation = Callable[[random.Random, Files, str], None]
_HANGS = 60.0  # seconds
PNG = b"\x89PNG\r\n\x1a\n" + bytes(30)
HOSTILE: list[Any] = [
    -1, 0, 1, 7, 2**31, 2**63, 10**30, 1e308, True, None, "", "x", "../../etc/passwd", "NaN", [], {},
    [2**40], [2**40, DIM], [-5], [1e9], {"name": "pickle"}, {"name": "zstd"}, [{"name": "bytes"}],
]  # fmt: skip


def original() -> Files:
    """A log with a bit of everything."""
    store = MemoryStore()
    rows_per_shard, writing.rows_per_shard = writing.rows_per_shard, lambda dim, dtype: 16
    try:
        for session in (0, 1):  # two processes, then one
            for rank in range(2 - session):
                log = LogWriter(store, CONFIG, rank=rank, start_step=8 * session)
                log.put("train", some_rows(40, 1000 * rank + 100 * session))
                log.put("probe", some_rows(10, step=9))
                if rank == 0:
                    log.keep_names({sample: f"{sample}.png" for sample in range(3 + session)})
                log.alert({"step": 3, "kind": "test", "message": "…"})
                if rank == 0:
                    log.snapshot(Snapshot(9, 0.1, 0.9), b"weights of session %d" % session)
                    log.thumbnail(3, PNG)
                log.close()
        query = TableWriter(store, "queries/q/rank-0000", DIM, "float16")
        query.append(some_rows(5, step=9))
        query.flush()
        query.describe({"snapshots": [[9, 1]]})
    finally:
        writing.rows_per_shard = rows_per_shard
    return {key: value.to_bytes() for key, value in store._store_dict.items()}


def open_files(files: Files) -> MemoryStore:
    return MemoryStore({key: cpu.Buffer.from_bytes(content) for key, content in files.items()})


def contents(files: Files) -> dict[str, Any]:
    """Everything a reader can ask of a log.

    Raises:
        LogError: where something is damaged.
    """
    log = open_log(open_files(files))
    found: dict[str, Any] = {"config": log.config}
    tables = {"train": log.train, "probe": log.probe, **{f"queries/{n}": t for n, t in log.queries.items()}}
    for name, table in tables.items():
        for column in table.columns:
            found[f"{name}/{column}"] = table[column].tobytes()
        for block in table.blocks():
            table.read(block, "sample")
    for snapshot in log.snapshots:
        found[f"snapshot {snapshot.step}"] = (snapshot.lr, snapshot.lr_sum, snapshot.parameters())
    found["alerts"] = [(a["step"], a["message"]) for a in log.alerts()]
    found["thumbnails"] = dict(log.thumbnails)
    found["names"] = list(log.names().items())
    describe(log)
    log.to_xarray()
    return found


# ── mutations ─────────────────────────────────────────────────────────────────────────────────────


def truncated(rng: random.Random, files: Files, key: str) -> None:
    files[key] = files[key][: rng.randrange(len(files[key]) + 1)]


def flipped(rng: random.Random, files: Files, key: str) -> None:
    content = bytearray(files[key])
    for _ in range(rng.choice([1, 1, 8])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    files[key] = bytes(content)


def removed(rng: random.Random, files: Files, key: str) -> None:
    del files[key]


def replaced(rng: random.Random, files: Files, key: str) -> None:
    """By a file of another kind. (A chunk in the place of its like has a right checksum.)"""
    files[key] = files[rng.choice([other for other in sorted(files) if len(files[other]) != len(files[key])])]


def overwritten(rng: random.Random, files: Files, key: str) -> None:
    start = rng.randrange(len(files[key]))
    size = rng.choice([1, 4, 64])
    files[key] = files[key][:start] + rng.randbytes(size) + files[key][start + size :]


def nested(rng: random.Random, files: Files, key: str) -> None:
    files[key] = b'{"a":' * 50_000 + b"1" + b"}" * 50_000


def hostile(rng: random.Random, files: Files, key: str) -> None:
    """One value of a JSON file is another: shapes, codecs, sessions, names."""
    key = rng.choice([k for k in sorted(files) if k.endswith(".json")])
    document = json.loads(files[key])
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for index, value in node.items() if isinstance(node, dict) else enumerate(node):
            places.append((node, index))
            if isinstance(value, dict | list):
                walk(value)

    walk(document)
    node, index = rng.choice(places)
    node[index] = rng.choice(HOSTILE)
    files[key] = json.dumps(document).encode()


def rechecksummed(rng: random.Random, files: Files, key: str) -> None:
    """A hostile author computes the right checksum too."""
    from diffhook.log.checksum import with_checksum

    hostile(rng, files, key)
    for name in [k for k in files if k.endswith("zarr.json")]:
        try:
            document = json.loads(files[name])
            own = document.get("attributes", {})
            if "crc32" in own:
                document["attributes"] = with_checksum({k: v for k, v in own.items() if k != "crc32"})
            elif "diffhook" in own:
                own["diffhook"] = with_checksum({k: v for k, v in own["diffhook"].items() if k != "crc32"})
            files[name] = json.dumps(document).encode()
        except (AttributeError, TypeError, ValueError):
            continue


MUTATIONS: tuple[Mutation, ...] = (
    truncated, flipped, removed, replaced, overwritten, nested, hostile, rechecksummed,
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What came of reading a mutated log.

    Attributes:
        kind: "right" or "error" (a LogError); or what must not be: "wrong", "crashed" or "hung".
        words: which log it was, and what happened.
    """

    kind: str
    words: str


def check(seed: int, files: Files, expected: dict[str, Any]) -> Outcome:
    """Mutate a log and read it."""
    rng = random.Random(seed)
    mutated = dict(files)
    mutation = rng.choice(MUTATIONS)
    key = rng.choice(sorted(files))
    mutation(rng, mutated, key)
    what = f"seed {seed}: {mutation.__name__} {key}"
    began = time.perf_counter()
    try:
        # Whoever can with_checksum can write another log.
        kind, words = _read(mutated, None if mutation is rechecksummed else expected)
    except Exception as error:
        kind, words = "crashed", repr(error)
    if time.perf_counter() - began > _HANGS:
        kind, words = "hung", f"it took longer than {_HANGS:g} s"
    return Outcome(kind, f"{what}: {words}")


def _read(mutated: Files, expected: dict[str, Any] | None) -> tuple[str, str]:
    try:
        found = contents(mutated)
    except LogError as error:
        with suppress(LogError):
            verify(open_files(mutated))
        return "error", str(error)
    try:
        verify(open_files(mutated))
    except LogError as error:
        return "wrong", f"it reads, but verify cannot open it: {error}"
    wrong = [] if expected is None else list(_differences(found, expected))
    return ("wrong", "; ".join(wrong)) if wrong else ("right", "")


def _differences(found: dict[str, Any], expected: dict[str, Any]) -> Iterator[str]:
    for name, value in found.items():
        if name in ("alerts", "thumbnails", "names"):
            if any(v not in expected[name] for v in value):
                yield f"{name} that never were"
        elif (name in expected or not _empty(value)) and value != expected.get(name):
            yield f"{name} reads wrong"
    for name in expected:
        if name not in found and not name.startswith(("snapshot", "queries/")):
            yield f"{name} is gone without a word"


def _empty(value: Any) -> bool:
    return isinstance(value, bytes) and not value
