"""What this run was."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from diffhook import words
from diffhook.log import RunLog
from diffhook.log import store as files
from diffhook.report.rendering import Part, part

_UNKNOWN = "not known: the run still goes on, or was killed"


def run_part(log: RunLog) -> Part:
    """Model, rows, capture and what it cost; the whole configuration behind a fold."""
    summary = read_summary(log)
    facts = {
        "Model": _model(log),
        "Training seen": _training(log),
        "Training loss": log.objective_words,
        "Captured": _captured(log, summary),
        "Overhead": _overhead(log, summary),
        "Snapshots": words.at_steps([snapshot.step for snapshot in log.snapshots]),
        "Queries": ", ".join(log.queries),
    }
    if len(log.probe):
        facts["Probes"] = words.plural(len(log.probe), "row")
    return part(
        "run",
        "This run",
        "The run",
        facts={name: value for name, value in facts.items() if value},
        plan=read_plan(log),
        configuration=list(_flat({**log.config, "summary": summary})),
    )


def read_plan(log: RunLog) -> list[str]:
    """What the hook said before the first step, line by line; [] where the log has none."""
    content = files.get(log.store, "plan.json")
    found: list[str] = json.loads(content)["text"] if content else []
    return found


def read_summary(log: RunLog) -> dict[str, Any]:
    """What the hook measured of the last session that came to its end; {} where none has."""
    content = files.get(log.store, "summary.json")
    found: dict[str, Any] = json.loads(content) if content else {}
    return found


def _model(log: RunLog) -> str:
    identity = log.config["identity"]
    numbers = sum(int(np.prod(shape)) for _, shape in identity["parameters"])
    kind = str(identity["model"]["class"]).rpartition(".")[2]
    return f"{kind}, {numbers:,} trained parameters"


def _training(log: RunLog) -> str:
    if not len(log.train):
        return ""
    samples = len(np.unique(log.train["sample"]))
    visits = len(log.train) / samples
    return (
        f"{words.plural(int(log.train['step'].max()) + 1, 'step')}, {words.plural(samples, 'sample')}, "
        f"{visits:.3g} {'visit' if visits == 1 else 'visits'} each"
    )


def _captured(log: RunLog, summary: dict[str, Any]) -> str:
    projection = log.config["identity"]["projection"]
    stride = summary.get("stride")
    steps = {None: "stride not known", 1: "every step"}.get(stride, f"one step in {stride}")
    kind = {"none": "norms only", "full": "whole gradients"}.get(
        projection["kind"], f"norms and D = {projection['dim']} projections"
    )
    return f"{steps}, {words.plural(len(log.train), 'row')}, {kind}"


def _overhead(log: RunLog, summary: dict[str, Any]) -> str:
    if "capture_overhead" not in summary:
        return _UNKNOWN
    beside = {name: summary.get(f"{name[:-1]}_seconds", 0.0) for name in ("snapshots", "probes")}
    training = summary["seconds"] - summary["capture_seconds"] - sum(beside.values())
    took = {"capture": summary["capture_seconds"], **{name: each for name, each in beside.items() if each}}
    added = " + ".join(f"{words.duration(each)} of {name}" for name, each in took.items())
    share = sum(took.values()) / training if training > 0 else np.nan
    text = f"{share:.1%}: {added}, beside {words.duration(training)} of training"
    sessions = len(log.sessions)
    return text + (f"; in the last session that ended, of {sessions}" if sessions > 1 else "")


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Leaves of a nested configuration as "a.b.c", text."""
    if path == "identity.parameters":
        yield path, words.plural(len(value), "tensor")
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, ", ".join(map(str, value)) if isinstance(value, list) else str(value)
