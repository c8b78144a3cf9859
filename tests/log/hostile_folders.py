"""Logs in a folder that somebody has prepared: links, pipes, devices, bombs of names, escape sequences.

Commands that read a log are run on each. They may refuse; they may not crash, hang, read or write anything
outside the log, or print what a terminal would obey.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from diffhook.cli import main
from diffhook.log.checksum import with_checksum
from tests.log.fuzz import MUTATIONS, Files, Outcome

HANGS, WAITS = 10, 60  # seconds of work, and of a clock that goes on while others have the machine
SECRET = "-----BEGIN OPENSSH PRIVATE KEY-----"
ESCAPES = [
    "\x1b]0;owned\x07",
    "\x1b[2J",
    "\x9b31m",
    "\u202egnp.exe",
    "a\r\nb",
    "\x00",
    "$\\frac{$",
    "=1+1",
    "\ud800",
]
_COMMANDS = (
    ["info"], ["info", "--json"], ["verify"], ["alerts"], ["outliers"], ["bias"], ["compact", "--out", "OUT"],
    ["outliers", "--html", "OUT.html"], ["outliers", "--csv", "OUT.csv", "--exclude", "9", "OUT.txt"],
    ["influence"], ["report", "--out", "OUT.html"], ["merge", "LOG", "--out", "OUT"], ["verify", "--repair"],
)  # fmt: skip
_WRITTEN = (".html", ".csv", ".txt")  # for people; a copy of the log holds what the log holds

Mutation = Callable[[random.Random, Path, Path], None]


def linked(rng: random.Random, log: Path, outside: Path) -> None:
    """A file, or a folder, is a link to something outside."""
    place = _place(rng, log)
    if rng.random() < 0.3:
        place = place.parent
    _replace(place, lambda: os.symlink(rng.choice([outside / "key", outside, outside / "other"]), place))


def piped(rng: random.Random, log: Path, outside: Path) -> None:
    place = _place(rng, log)
    _replace(place, lambda: os.mkfifo(place))


def device(rng: random.Random, log: Path, outside: Path) -> None:
    """A link to one, which needs no rights to make, or one of its own where we may make it."""
    place, kind = _place(rng, log), rng.choice(["zero", "random", "stdin"])

    def make() -> None:
        if os.geteuid() == 0 and kind == "zero":
            with contextlib.suppress(OSError):
                os.mknod(place, 0o20666, os.makedev(1, 5))
                return
        os.symlink(f"/dev/{kind}", place)

    _replace(place, make)


def bombed(rng: random.Random, log: Path, outside: Path) -> None:
    """Names of files that lie, and many of them."""
    folder = log / rng.choice(["", "train", "train/rank-0000", "names", "queries", "snapshots", "alerts"])
    folder.mkdir(exist_ok=True)
    for name in [
        *ESCAPES,
        "x" * 255,
        "..a",
        "rank-9999",
        "rank-0000-999.json",
        "step-99999999",
        "-rf",
        "%s%n",
    ]:
        with contextlib.suppress(OSError, ValueError, UnicodeError):
            (folder / name.replace("/", "")).write_bytes(b"{}")
    for number in range(rng.choice([0, 2000])):
        (folder / f"rank-{number:04d}-000.json").write_bytes(b"{}")


def escaped(rng: random.Random, log: Path, outside: Path) -> None:
    """Strings of the log's own JSON are commands to a terminal, and the checksums are right."""
    for path in rng.sample(sorted(log.rglob("*.json*")), 6):
        with contextlib.suppress(ValueError):
            lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            path.write_text(
                "".join(json.dumps(_with_checksum(_cursed(rng, json.loads(line)))) + "\n" for line in lines)
            )


def rotten(rng: random.Random, log: Path, outside: Path) -> None:
    """What tests/log/fuzz.py does to the bytes of files."""
    files: Files = {p.relative_to(log).as_posix(): p.read_bytes() for p in log.rglob("*") if p.is_file()}
    before = dict(files)
    rng.choice(MUTATIONS)(rng, files, rng.choice(sorted(files)))
    for key in before:
        if key not in files:
            (log / key).unlink()
        elif files[key] != before[key]:
            (log / key).write_bytes(files[key])


KINDS: tuple[Mutation, ...] = (linked, piped, device, bombed, escaped, rotten)


def _place(rng: random.Random, log: Path) -> Path:
    return rng.choice(sorted(p for p in log.rglob("*") if p.is_file()))


def _replace(place: Path, make: Callable[[], None]) -> None:
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    make()


def _cursed(rng: random.Random, value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _cursed(rng, v) for k, v in value.items() if k != "crc32"}
    if isinstance(value, list):
        return [_cursed(rng, item) for item in value]
    return rng.choice(ESCAPES) if isinstance(value, str) and rng.random() < 0.3 else value


def _with_checksum(value: Any) -> Any:
    """As FORMAT.md wants it: the root's part, a group's attributes, or the whole object."""
    own = value.get("attributes") if isinstance(value, dict) else None
    if isinstance(own, dict) and "diffhook" in own:
        return {**value, "attributes": {"diffhook": with_checksum(own["diffhook"])}}
    if isinstance(own, dict) and own:
        return {**value, "attributes": with_checksum(own)}
    return with_checksum(value) if isinstance(value, dict) and own is None else value


def check(seed: int, files: Files) -> Outcome:
    """Prepare a log, run some of the commands on it, and repair it."""
    rng = random.Random(seed)
    mutation = KINDS[seed % len(KINDS)]
    with tempfile.TemporaryDirectory(prefix="diffhook-hostile-") as folder:
        log, outside, out = Path(folder, "log"), Path(folder, "outside"), Path(folder, "out")
        for key, content in files.items():
            (log / key).parent.mkdir(parents=True, exist_ok=True)
            (log / key).write_bytes(content)
        (outside / "other").mkdir(parents=True)
        (outside / "key").write_text(SECRET)
        mutation(rng, log, outside)
        refused = 0
        for command in [*rng.sample(_COMMANDS[:-1], 2), _COMMANDS[-1]]:
            problem, status = _problem(command, log, out)
            if _contents(outside) != {"key": SECRET, "other": ""}:
                problem = "wrong", "something outside was written"
            if problem is not None:
                kind, words = problem
                return Outcome(kind, f"seed {seed}: {mutation.__name__}: {' '.join(command)}: {words}")
            refused += status != 0
            shutil.rmtree(out, ignore_errors=True)
    return Outcome("error" if refused else "right", f"seed {seed}: {mutation.__name__}")


def _problem(command: list[str], log: Path, out: Path) -> tuple[tuple[str, str] | None, int]:
    words = {"LOG": str(log), **{f"OUT{suffix}": f"{out}{suffix}" for suffix in ("", *_WRITTEN)}}
    arguments = [command[0], str(log), *(words.get(word, word) for word in command[1:])]
    told = io.StringIO()
    try:
        with _alarm(), contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            status = main(arguments)
    except _Hung:
        return ("hung", f"more than {HANGS} s of work, or {WAITS} s in all"), 1
    except SystemExit:
        status = 2
    except BaseException as error:
        return ("crashed", repr(error)), 1
    files = [p for p in [*out.rglob("*"), *(Path(f"{out}{suffix}") for suffix in _WRITTEN)] if p.is_file()]
    copied = "".join(p.read_bytes().decode("latin-1") for p in files)
    if SECRET in told.getvalue() + copied:
        return ("wrong", "what is outside was read"), status
    if set(told.getvalue()) & set("\x1b\x9b\x00\u202e") or "\x1b" in "".join(
        p.read_text(errors="replace") for p in files if p.suffix in _WRITTEN
    ):
        return ("wrong", f"a command to the terminal: {told.getvalue()!r}"), status
    return None, status


class _Hung(BaseException):
    pass


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise _Hung

    timers = {signal.ITIMER_PROF: (signal.SIGPROF, HANGS), signal.ITIMER_REAL: (signal.SIGALRM, WAITS)}
    usual = {number: signal.signal(number, ring) for number, _ in timers.values()}
    for timer, (_, seconds) in timers.items():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)
        for number, handler in usual.items():
            signal.signal(number, handler)


def _contents(folder: Path) -> dict[str, str]:
    return {p.name: p.read_text() if p.is_file() else "" for p in folder.rglob("*")}
