"""Say what a log holds, before one uses or shares it.

example: diffhook info runs/butterflies
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping
from itertools import islice
from typing import Any

import numpy as np

from diffhook import words
from diffhook.analysis.effective_dimension import effective_dimension
from diffhook.analysis.execution import Execution
from diffhook.analysis.grouped import distinct_samples
from diffhook.analysis.roles import regularisation_images
from diffhook.cli.printing import print_json, print_table
from diffhook.log import RunLog, Snapshot, Table, open_log
from diffhook.log import store as files
from diffhook.log.alerts import THROTTLE
from diffhook.log.samples import ROLE_STRIDE

_MUCH = 1 << 29  # numbers of projections, a gigabyte
_NAMED = 3  # of the parameters left out
_SHARING = (
    "Who gets this log gets: sample ids and the timesteps, losses and gradient norms of each, the mean, "
    "contrast and roughness of its pixels, random projections of gradients, {weights}, the model's "
    "configuration and the versions of libraries. {names} {queries} {images}"
)

_BRANCHES = (
    "A start of the run is a session. Rows of another branch are kept and do not count; "
    "diffhook.open_log(path, session=N) reads the run as session N knows it."
)


def arguments(command: argparse.ArgumentParser) -> None:
    pass


def run(args: argparse.Namespace) -> None:
    log = open_log(args.log)
    facts = describe(log)
    if args.json:
        print_json(facts)
        return
    shown = {**facts, "snapshots": words.at_steps(facts["snapshots"])}
    for name in ("snapshots missing", "checkpoints that are not there"):
        shown[name] = words.at_steps(facts[name]) if facts[name] else None
    shown["checkpoints"] = facts["checkpoints"] or None
    for name in ("class images", "regularisation images", "throttled samples", "rows without a loss"):
        shown[name] = facts[name] or None
    sessions = shown.pop("sessions")
    shown["micro-batches left out"] = facts["micro-batches left out"] or None
    shown["parameters left out"] = _left_out(facts["parameters left out"])
    rows = [(name, _words(value)) for name, value in shown.items() if value is not None]
    count = facts["thumbnails"]
    images = f"It holds small images of {count:,} samples." if count else "It holds no image."
    named, told = facts["named samples"], facts["queries that hold texts or paths"]
    names = f"It names {named:,} samples, by their files or keys." if named else "It names no sample."
    queries = (
        f"The captions or paths that they were asked with are kept with {told} of its queries."
        if told
        else "No query holds a caption or a path."
    )
    sharing = _SHARING.format(names=names, queries=queries, images=images, weights=_weights(log))
    print_table("", ["", "value"], rows, sharing)
    if len(sessions) > 1:
        print_table("Sessions", list(sessions[0]), [list(s.values()) for s in sessions], _BRANCHES)


def describe(log: RunLog) -> dict[str, Any]:
    """What is in the log, and how large its parts are.

    "rows without a loss" are training rows whose own loss is not known, so that nothing by loss sees them.
    "parameters left out" are in no norm or projection; name → why. "micro-batches left out" made no rows;
    reason → how many. Both are known when a run has ended. "class images" are further rows of samples in a
    batch, as prior preservation has them.
    """
    from diffhook.report.parts.run import read_summary

    identity = log.config["identity"]
    projection = identity["projection"]
    steps, rows = log.dropped()
    ids = distinct_samples(log.train if len(log.train) else log.probe, Execution())
    own = int((ids < ROLE_STRIDE).sum())
    return {
        "log": log.location,
        "schema": log.schema,
        "model": (identity.get("model") or {}).get("class"),
        "trained parameters": len(identity.get("parameters") or ()),
        "parameters left out": read_summary(log).get("parameters_left_out", {}),
        "training loss": log.objective_words or None,
        "projection": projection["kind"],
        "projection dimension": projection["dim"],
        "filled": _filled(log),
        "rows summed for": identity.get("aggregate", "nothing: they are as captured"),
        "train rows": len(log.train),
        "rows without a loss": _without_loss(log.train),
        "samples": own,
        "class images": len(ids) - own,
        "regularisation images": sum(sample < ROLE_STRIDE for sample in regularisation_images(log)),
        "probe rows": len(log.probe),
        "queries": {name: len(table) for name, table in log.queries.items()},
        "snapshots": [snapshot.step for snapshot in log.snapshots],
        "snapshots of weights loaded after the step": [
            snapshot.step for snapshot in log.snapshots if snapshot.details.get("loaded") is True
        ],
        "snapshots missing": log.index.missing_snapshots,
        "checkpoints": [s.reference.path for s in log.snapshots if s.reference is not None],
        "checkpoints that are not there": [s.step for s in log.snapshots if _is_away(s)],
        "sessions": _sessions(log),
        "alerts": len(log.alerts()),
        "throttled samples": _throttled(log),
        "micro-batches left out": read_summary(log).get("left_out", {}),
        "steps left out": steps,
        "rows left out": rows,
        "snapshots left out": log.dropped_snapshots(),
        "named samples": len(log.names()),
        "queries that hold texts or paths": sum(map(_tells, log.queries.values())),
        "thumbnails": len(log.thumbnails),
        "holds images": bool(log.thumbnails),
        "bytes": sizes(log),
    }


def _without_loss(table: Table) -> int:
    """Read block by block."""
    return sum(int(np.isnan(table.read(block, "loss")).sum()) for block in table.blocks())


def _throttled(log: RunLog) -> int:
    """How many samples' losses the throttle has ever multiplied by less than 1."""
    return len({sample for a in log.alerts() if a["kind"] == THROTTLE for sample in a["samples"]})


def _is_away(snapshot: Snapshot) -> bool:
    """Whether it refers to a checkpoint that has no file at its place; verify also reads those."""
    return snapshot.reference is not None and not all(path.is_file() for path in snapshot.reference.paths)


def _weights(log: RunLog) -> str:
    if any(snapshot.reference is not None for snapshot in log.snapshots):
        return "the places of the checkpoints that it was measured at"
    return "the trained weights in its snapshots (and Adam's divisors, if they were to be kept)"


def _sessions(log: RunLog) -> list[dict[str, Any]]:
    """Every start of the run: where it went on from, its training rows, and which of them count."""
    found = []
    for number, (session, rows) in enumerate(zip(log.sessions, log.index.session_rows, strict=True)):
        span = log.index.path.get(number)
        counts = "none: another branch"
        if span is not None:
            counts = "all" if span.is_open else f"before step {span.stop}"
        after = "the beginning" if session.parent is None else f"session {session.parent}"
        told = {"session": number, "goes on from": after, "at step": session.start_step}
        found.append({**told, "rows": rows, "count": counts})
    return found


def _filled(log: RunLog) -> str | None:
    """Whether the projection is large enough; None where that would take reading much, or cannot be told."""
    numbers = max(len(table) * table.dim for table in (log.train, log.probe))
    if "aggregate" in log.config["identity"] or not 0 < numbers <= _MUCH:
        return None
    return str(effective_dimension(log))


def sizes(log: RunLog) -> dict[str, int]:
    """Part of the log → bytes of its files."""
    found: Counter[str] = Counter()
    for key in files.keys(log.store, ""):
        found[key.partition("/")[0]] += files.size(log.store, key)
    return dict(found.most_common())


def _tells(query: Table) -> bool:
    """Whether a query's description holds what its user wrote: captions, or a path."""
    samples = (query.description or {}).get("samples") or {}
    return any(samples.get(key) for key in ("captions", "images"))


def _left_out(parameters: Mapping[str, str]) -> str | None:
    """Their number and the first of them with the reasons; None where all are covered."""
    if not parameters:
        return None
    more = " …" if len(parameters) > _NAMED else ""
    return f"{len(parameters)}: {_words(dict(islice(parameters.items(), _NAMED)))}{more}"


def _words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} ({_words(inner)})" for name, inner in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
