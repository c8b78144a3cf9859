"""What the hook says before the first step and after the last."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import IterableDataset

from diffhook import words
from diffhook.capture import Plan, Recorder
from diffhook.capture.loop.run.volume import Volume
from diffhook.capture.plan import CAPTURED_STEP
from diffhook.capture.probes.prober import Prober
from diffhook.console import announce
from diffhook.gradients.sharding import is_sharded

logger = logging.getLogger("diffhook")

NO_BACKWARD = (
    "no row, because no backward went through a captured forward of the trained parameters: call "
    "loss.backward() or accelerator.backward(loss) on a loss of the watched model"
)


def tell_plan(
    plan: Plan, recorder: Recorder, batch: int, loader: Any, snapshot_every: int | None, ids_from: str
) -> None:
    """To the terminal and the log, see :func:`plan_text`. The first rank's to tell.

    Args:
        loader: the training's; None: not known.
        snapshot_every: steps, where the user says so.
    """
    if recorder.rank > 0:
        return
    sized = loader is not None and not isinstance(loader.dataset, IterableDataset)  # streams warn
    volume = Volume.of(plan, recorder, batch, len(loader) if sized else None, snapshot_every)
    text = plan_text(plan, recorder, batch, volume, ids_from)
    recorder.writer.record("plan.json", {"text": text.splitlines()})
    announce(text)
    if shortage := volume.shortage():
        logger.warning("%s", shortage)


def plan_text(
    plan: Plan,
    recorder: Recorder,
    batch: int,
    volume: Volume,
    ids_from: str,
) -> str:
    """Rows, bytes and snapshots to expect.

    Args:
        batch: rows of a micro-batch, of all processes.
        ids_from: where the samples' ids come from.
    """
    engine, per_row = recorder.engine, recorder.writer.bytes_per_row
    stride = f"one step in {plan.stride}" if plan.stride > 1 else "every step"
    if plan.budget is not None:
        stride = f"as many steps as fit into {plan.budget}"
    lines = [
        f"diffhook: capturing {stride}, {len(engine.parameters)} parameters "
        f"({sum(shape.numel() for shape in engine.shapes.values()):,} numbers), "
        f"D = {engine.sketch.dim if engine.sketch else 0}",
        f"  {batch} rows of {per_row:,} bytes a micro-batch"
        + (
            f"; {batch * volume.epoch / plan.stride:,.0f} rows, "
            f"{words.size(batch * volume.epoch / plan.stride * per_row)} an epoch"
            if volume.epoch
            else ""
        ),
        f"  {_expected(plan, recorder)}; measured as it goes",
        f"  {volume.snapshots_text()}",
        f"  sample ids: {ids_from}",
    ]
    if is_sharded(engine.model):
        lines.append("  the parameters are sharded: it is not checked that samples stay apart in the model")
    more = [_probes(recorder.prober, per_row), volume.room_text(), recorder.writer.will_supersede()]
    return "\n".join([*lines, *(f"  {told}" for told in more if told)])


def _probes(prober: Prober, row_bytes: int) -> str:
    """What is probed; "" where nothing is."""
    probe = prober.probe
    if prober.waits_for_end:
        return "all samples are probed at the end, if the budget affords it (probe=False: never)"
    if probe is None:
        return ""
    if probe.dataset is None:
        return "probes at snapshots, once the training loss is recognised"
    samples, grid = len(probe.ids(len(probe.dataset))), probe.grid
    return (
        f"probes at snapshots: {samples:,} samples × {grid.count} timesteps × {grid.draws} draws"
        + (f" × {grid.replicates} replicates" if grid.replicates > 1 else "")
        + f", {words.size(samples * grid.rows * row_bytes)} each"
    )


def _expected(plan: Plan, recorder: Recorder) -> str:
    """What events add to the training, before anything is measured."""
    trained = sum(p.numel() for p in recorder.engine.parameters.values())
    longer = CAPTURED_STEP * trained / sum(p.numel() for p in recorder.engine.model.parameters())
    if plan.budget is not None and plan.budget.seconds:
        return f"a captured step takes about {longer:.1%} longer"
    share = longer / plan.stride if plan.budget is None else plan.budget.share
    return f"expected to add about {share:.1%} to the training"


def training_seconds(plan: Plan, recorder: Recorder, seconds: float) -> float:
    """What the training itself took of so many seconds."""
    return seconds - plan.capture_seconds - recorder.prober.seconds - recorder.snapshot_seconds


def summary(
    plan: Plan, recorder: Recorder, seconds: float, left_out: Mapping[str, int]
) -> tuple[dict[str, Any], str]:
    """Measured numbers, as JSON and as text.

    Args:
        left_out: reason → micro-batches that were not captured.
    """
    training = training_seconds(plan, recorder, seconds)
    overhead = plan.capture_seconds / training if training > 0 else 0.0
    numbers = {
        "seconds": round(seconds, 3),
        "capture_seconds": round(plan.capture_seconds, 3),
        "probe_seconds": round(recorder.prober.seconds, 3),
        "snapshot_seconds": round(recorder.snapshot_seconds, 3),
        "capture_overhead": round(overhead, 4),
        "stride": plan.stride,
        "rows": recorder.rows_written,
        "rows_without_loss": recorder.rows_without_loss,
        "bytes": recorder.row_bytes,
        "dropped_steps": recorder.writer.dropped_steps,
        "dropped_rows": recorder.writer.dropped_rows,
        "snapshots": recorder.snapshots_written,
        "dropped_snapshots": recorder.writer.dropped_snapshots,
        "alerts": dict(Counter(recorder.alerts)),
        "left_out": dict(left_out),
        "coverage": str(recorder.engine.coverage),
        "parameters_left_out": dict(recorder.engine.coverage.missing),
    }
    lines = [
        *_captured(plan, recorder),
        f"capture added {plan.capture_seconds:.1f} s to {training:.1f} s of training "
        f"({overhead:.1%}); snapshots took {recorder.snapshot_seconds:.1f} s"
        + (f", probes {recorder.prober.seconds:.1f} s" if recorder.prober.seconds else ""),
        *_lacking(recorder, left_out),
    ]
    return numbers, "\n  ".join(lines)


def _captured(plan: Plan, recorder: Recorder) -> Iterator[str]:
    """What there is, a line each."""
    probed = f"{recorder.prober.rows:,} of probes, " if recorder.prober.rows else ""
    alerts = ", ".join(f"{count} {kind}" for kind, count in Counter(recorder.alerts).items()) or "none"
    size = recorder.row_bytes
    yield (
        f"diffhook: {words.plural(recorder.rows_written, 'row')}, {probed}"
        f"{words.plural(recorder.snapshots_written, 'snapshot')}; alerts: {alerts}"
    )
    yield f"{words.size(size)} of rows, {words.size(size / max(plan.captured_steps, 1))} a captured step"


def _lacking(recorder: Recorder, left_out: Mapping[str, int]) -> Iterator[str]:
    """What there is not, and why, a line each."""
    writer = recorder.writer
    if recorder.rows_without_loss:
        yield (
            f"{words.plural(recorder.rows_without_loss, 'row')} without the sample's own loss, of which "
            "alerts, rankings and the throttle see nothing there"
        )
    if not (recorder.rows_written or left_out or writer.dropped_rows):
        yield NO_BACKWARD
    if left_out:
        yield f"micro-batches left out, by reason: {_reasons(left_out)}"
    if writer.dropped_rows:
        yield (
            f"{writer.dropped_rows:,} rows of {writer.dropped_steps:,} training steps were left out: "
            "the disk could not take them in time"
        )
    if writer.dropped_snapshots:
        yield f"{writer.dropped_snapshots:,} snapshots were left out: the disk failed or hung"


def _reasons(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in left_out.items())


def why_nothing(left_out: Mapping[str, int], reason: str | None, models: int) -> str:
    """Why no row was captured.

    Args:
        left_out: reason → micro-batches that were not captured.
        reason: what is known besides.
        models: how many trained ones were seen.
    """
    if left_out:
        return f"every micro-batch was left out ({_reasons(left_out)})"
    if reason is not None:
        return reason
    if not models:
        return "no model with trainable parameters was seen"
    return (
        "no training batch with sample ids was seen: name the samples with "
        "hook.step(sample_ids=..., timesteps=...)"
    )
