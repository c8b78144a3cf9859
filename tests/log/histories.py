"""Random histories of a log: what people do to it over weeks, beside a model that says what must be readable.

The model knows nothing of sessions. A checkpoint is a copy of all that led to it; to resume is to go on
from that copy. Every row has a sample id of its own: one that is lost, doubled or of another branch is seen.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from diffhook.log import LogWriter, Snapshot, durable, open_log
from diffhook.log import table_writer as writing
from diffhook.log.compaction import compact
from diffhook.log.index import LogIndex
from diffhook.log.lock import release_rank
from diffhook.log.repair import repair
from diffhook.log.table_writer import TableWriter
from diffhook.log.testing import CONFIG, DIM, some_rows
from diffhook.log.verification import verify

LENGTH = 14  # things that happen
SHARD = 8  # rows
_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # no power cut is played here
Row = tuple[int, int]  # step, sample


@dataclass(frozen=True)
class State:
    """What a run has seen: rows of its steps, probes and snapshots at its checkpoints."""

    train: frozenset[Row] = frozenset()
    probe: frozenset[Row] = frozenset()
    snapshots: frozenset[Row] = frozenset()  # step, and a number that tells it from another branch's

    def before(self, step: int) -> State:
        return State(
            frozenset(row for row in self.train if row[0] < step),
            frozenset(row for row in self.probe if row[0] <= step),
            frozenset(row for row in self.snapshots if row[0] <= step),
        )

    def without(self, samples: set[int]) -> State:
        kept = (frozenset(row for row in rows if row[1] not in samples) for rows in (self.train, self.probe))
        return State(*kept, self.snapshots)


@dataclass(frozen=True)
class Checkpoint:
    step: int
    position: str | None  # what its diffhook.json says
    state: State


@dataclass
class Run:
    """A run that is alive: its processes' writers, and what it has seen."""

    writers: list[LogWriter]
    step: int
    state: State
    safe: State  # on the disk for sure
    wrote: bool = False
    unsafe: list[list[Row]] = field(default_factory=list)  # rank → its rows since, in order


class History:
    """One log's life.

    Attributes:
        problems: what was lost, doubled, or otherwise not as the model says; empty if all is right.
        rows: how many were compared.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self._random = random.Random(seed)
        self._folder, self._copies = folder, 0
        self._log = folder / "log-0"
        self._samples = 0
        self._live = State()  # what must be readable
        self._ended: list[State] = []  # session → what must be readable of it
        self._known: set[str] = set()  # ids of sessions that the log has
        self._checkpoints: list[Checkpoint] = []
        self._queries: dict[str, frozenset[Row]] = {}
        self._run: Run | None = None
        self._told: list[str] = [f"seed {seed}"]
        self.problems: list[str] = []
        self.rows = 0

    def live(self) -> None:
        """Let things happen, and look at the log after each."""
        try:
            for _ in range(LENGTH):
                action = self._random.choice(self._possible())
                self._told.append(action.__name__.strip("_"))
                action()
                self._compare()
                if self.problems:
                    break
        except Exception as error:
            self._problem(f"{type(error).__name__}: {error}")
        finally:
            if self._run is not None:
                self._crash_writers(self._run)

    def _possible(self) -> list[Callable[[], None]]:
        if self._run is not None:
            return [*4 * [self._train], *2 * [self._checkpoint], self._crash, self._end]
        if not self._log.exists():
            return [self._second_run]
        resuming = [self._resume_newest, self._resume_older, self._resume_without_a_word]
        others = [self._second_run, self._copy, self._query, self._compact, self._repair, self._open_only]
        return [*(2 * resuming if self._checkpoints else []), *others]

    # ── a run ─────────────────────────────────────────────────────────────────────────────────

    def _begin(self, start: int, state: State, after: str | None) -> None:
        ranks = self._random.choice([1, 1, 2, 3, 4])
        token = f"run-{self._random.random()}"
        order = self._random.sample(range(ranks), ranks)
        writers = {
            rank: LogWriter(
                self._log, CONFIG, rank=rank, processes=ranks, start_step=start, after=after, run=token
            )
            for rank in order
        }
        self._run = Run([writers[r] for r in range(ranks)], start, state, state, False, [[] for _ in order])
        self._token = token

    def _second_run(self) -> None:
        self._begin(0, State(), None)

    def _resume_newest(self) -> None:
        self._resume(self._checkpoints[-1])

    def _resume_older(self) -> None:
        self._resume(self._random.choice(self._checkpoints))

    def _resume(self, checkpoint: Checkpoint) -> None:
        known = checkpoint.position in self._known
        state = checkpoint.state if known else self._live.before(checkpoint.step)
        self._begin(checkpoint.step, state, checkpoint.position)

    def _resume_without_a_word(self) -> None:
        """A checkpoint that was written without us: all that is known is its step."""
        step = self._random.choice(self._checkpoints).step
        self._begin(step, self._live.before(step), None)

    def _train(self) -> None:
        run = self._run
        assert run is not None
        for _ in range(self._random.randrange(1, 6)):
            for rank, writer in enumerate(run.writers):
                rows = self._new_rows(self._random.randrange(1, 4), run.step)
                writer.put("train", some_rows(len(rows), rows[0][1], step=run.step))
                run.unsafe[rank] += rows
                run.state = replace(run.state, train=run.state.train | set(rows))
            run.step += 1
        if self._random.random() < 0.3:
            self._settle(run)

    def _checkpoint(self) -> None:
        """A snapshot and its probes; all rows to the disk; then the checkpoint itself."""
        run = self._run
        assert run is not None
        if not run.wrote and not run.unsafe[0]:  # the recorder takes none at the step it was resumed at
            return
        if run.step not in {step for step, _ in run.state.snapshots}:
            number = self._samples = self._samples + 1
            probes = self._new_rows(self._random.randrange(1, 4), run.step)
            run.writers[0].snapshot(Snapshot(run.step, 0.1, 0.1), str(number).encode())
            run.writers[0].put("probe", some_rows(len(probes), probes[0][1], step=run.step))
            run.state = replace(
                run.state,
                probe=run.state.probe | set(probes),
                snapshots=run.state.snapshots | {(run.step, number)},
            )
        self._settle(run)
        self._checkpoints.append(Checkpoint(run.step, run.writers[0].position(), run.state))

    def _settle(self, run: Run) -> None:
        for writer in run.writers:
            writer.flush()
        if any(run.unsafe):
            run.wrote = True
        run.unsafe = [[] for _ in run.writers]
        run.safe = run.state
        if run.wrote:
            self._see(run.state)

    def _see(self, state: State) -> None:
        """The live session shows this; it is in the log by now."""
        if self._token not in self._known:
            self._known.add(self._token)
            self._ended.append(state)
        self._live = self._ended[-1] = state

    def _end(self) -> None:
        run = self._run
        assert run is not None
        self._settle(run)
        for writer in run.writers:
            writer.close()
        self._run = None

    def _crash(self) -> None:
        """Of the rows since the last flush, each rank has written a beginning, or none."""
        run = self._run
        assert run is not None
        self._crash_writers(run)
        self._run = None
        if not any(run.unsafe):
            return
        index = LogIndex(open_log(self._log).store)
        if all(session.id != self._token for session in index.sessions):
            return
        found = set(index.table("train")["sample"].tolist())
        kept: set[Row] = set()
        for rank, rows in enumerate(run.unsafe):
            there = [row[1] in found for row in rows]
            if sorted(there, reverse=True) != there:
                self._problem(f"rank {rank} kept {there} of its last rows: no beginning of them")
            kept |= {row for row, is_there in zip(rows, there, strict=True) if is_there}
        self._see(replace(run.safe, train=run.safe.train | kept))

    def _crash_writers(self, run: Run) -> None:
        for rank, writer in enumerate(run.writers):
            writer._backlog._stop()
            writer._backlog._thread.join()
            release_rank(writer.store, rank, writer)

    def _open_only(self) -> None:
        LogWriter(self._log, CONFIG, start_step=self._random.randrange(9)).close()

    # ── what else is done to a log ────────────────────────────────────────────────────────────

    def _elsewhere(self) -> Path:
        self._copies += 1
        return self._folder / f"log-{self._copies}"

    def _copy(self) -> None:
        target = self._elsewhere()
        shutil.copytree(self._log, target)
        self._log = target

    def _compact(self) -> None:
        target = self._elsewhere()
        sessions = open_log(self._log).sessions
        compact(self._log, target, progress=False)
        self._log = target
        self._known = {session.id for session in sessions[-1:]}
        self._ended = [self._live] if sessions else []
        self._queries = {n: at for n, at in self._queries.items() if at <= self._live.snapshots}

    def _query(self) -> None:
        log, name = open_log(self._log), f"q{len(self._queries)}"
        writer = TableWriter(log.writable_store(), f"queries/{name}/rank-0000", DIM, "float16")
        writer.append(some_rows(3))
        writer.flush()
        writer.describe({"snapshots": [[s.step, s.session] for s in log.snapshots]})
        self._queries[name] = self._live.snapshots

    def _repair(self) -> None:
        """A bit rots in a chunk: its rows are lost, and no other."""
        store = open_log(self._log).writable_store()
        index = LogIndex(store)
        groups = [g for t in ("train", "probe") for g in index.groups(t).values() if g.committed]
        if not groups:
            return
        group = self._random.choice(groups)
        start = self._random.randrange(0, group.committed, SHARD)
        stop = min(start + SHARD, group.committed)
        lost = set(group.read("sample", start, stop).tolist()) - {-1}
        column = self._random.choice(sorted(group.columns))
        chunk = self._log / group.layout(column).chunk_key(group.path, start // SHARD)
        content = bytearray(chunk.read_bytes())
        content[self._random.randrange(len(content))] ^= 1 << self._random.randrange(8)
        chunk.write_bytes(bytes(content))
        repair(store, verify(store))
        self._live = self._live.without(lost)
        self._ended = [state.without(lost) for state in self._ended]
        self._checkpoints = [replace(c, state=c.state.without(lost)) for c in self._checkpoints]

    # ── what a reader finds ───────────────────────────────────────────────────────────────────

    def _new_rows(self, count: int, step: int) -> list[Row]:
        first, self._samples = self._samples + 1, self._samples + count
        return [(step, sample) for sample in range(first, first + count)]

    def _compare(self) -> None:
        if self._run is not None and any(self._run.unsafe):
            return  # the writers are at work
        self._compare_with(None, self._live)
        if self._ended:
            number = self._random.randrange(len(self._ended))
            self._compare_with(number, self._ended[number])
        log = open_log(self._log)
        expected = sorted(n for n, at in self._queries.items() if at <= self._live.snapshots)
        self._expect("queries", sorted(log.queries), expected)
        self._expect("sessions", len(log.sessions), len(self._ended))
        if self._random.random() < 0.1:
            self._expect("findings of verify", log.verify(), [])

    def _compare_with(self, session: int | None, state: State) -> None:
        log = open_log(self._log, session)
        for name, rows in (("train", state.train), ("probe", state.probe)):
            table = log.index.table(name)
            found = Counter(zip(table["step"].tolist(), table["sample"].tolist(), strict=True))
            self._expect(f"{name} rows of session {session}", sorted(found.elements()), sorted(rows))
            self.rows += len(rows)
        snapshots = sorted((s.step, int(s.parameters())) for s in log.snapshots)
        self._expect(f"snapshots of session {session}", snapshots, sorted(state.snapshots))

    def _expect(self, what: str, found: object, expected: object) -> None:
        if found != expected:
            self._problem(f"{what}: found {str(found)[:300]}, expected {str(expected)[:300]}")

    def _problem(self, words: str) -> None:
        self.problems.append(f"{' → '.join(self._told)}: {words}")


def check(seeds: range) -> tuple[int, list[str]]:
    """Live through these histories. Returns the rows that were compared, and what was wrong."""
    rows_per_shard, writing.rows_per_shard = writing.rows_per_shard, lambda dim, dtype: SHARD
    sync, durable._sync_one = durable._sync_one, lambda path: None
    rows, problems = 0, []
    try:
        for seed in seeds:
            with tempfile.TemporaryDirectory(prefix="diffhook-history-", dir=_MEMORY) as folder:
                history = History(Path(folder), seed)
                history.live()
            rows += history.rows
            problems += history.problems
            for problem in history.problems:
                print(problem, flush=True)
    finally:
        writing.rows_per_shard, durable._sync_one = rows_per_shard, sync
    return rows, problems
