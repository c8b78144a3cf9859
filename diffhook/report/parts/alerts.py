"""Alerts along the training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from diffhook import words
from diffhook.report import charts
from diffhook.report.rendering import Part, part
from diffhook.report.thumbnails import PictureCache, Thumbnail

_LISTED = 500
_PICTURES = 3  # of an alert that names many samples


def alerts_part(
    alerts: list[dict[str, Any]],
    last_step: int,
    thumbnails: PictureCache,
    names: Mapping[int, str] | None = None,
) -> Part:
    """A time line with a lane per kind, and the list.

    Args:
        alerts: as in the log, by step.
        last_step: where the time line ends.
        names: id → name, of samples that have one.
    """
    kinds = Counter(str(alert["kind"]) for alert in alerts)
    lanes = [kind for kind, _ in kinds.most_common()]
    drawn = (
        charts.chart(
            lambda axes: _draw(axes, alerts, lanes, last_step),
            f"{len(alerts)} alerts by training step",
            height=0.85 + 0.3 * len(lanes),
        )
        if alerts
        else None
    )
    listed = [(alert, _pictures(alert, thumbnails)) for alert in alerts[:_LISTED]]
    repeated = Counter(int(s) for alert in alerts for s in alert.get("samples", []))
    return part(
        "alerts",
        "Alerts while it trained",
        "Alerts",
        chart=drawn,
        names=names,
        total=len(alerts),
        listed=listed,
        repeated=[(sample, times) for sample, times in repeated.most_common(5) if times > 1],
    )


def _pictures(alert: dict[str, Any], thumbnails: PictureCache) -> list[tuple[int, Thumbnail | None]]:
    return [(int(sample), thumbnails(int(sample))) for sample in alert.get("samples", [])[:_PICTURES]]


def _draw(axes: charts.Axes, alerts: list[dict[str, Any]], lanes: list[str], last_step: int) -> None:
    for level, color in (("warning", charts.ACCENT), ("error", charts.WARM)):
        chosen = [alert for alert in alerts if (alert.get("level") == "error") == (level == "error")]
        steps = sorted({(int(alert["step"]), lanes.index(str(alert["kind"]))) for alert in chosen})
        axes.plot(
            [step for step, _ in steps],
            [lane for _, lane in steps],
            color=color,
            linestyle="",
            marker="|",
            markersize=13,
            markeredgewidth=1.6,
            alpha=0.75,
        )
    axes.set_ylim(len(lanes) - 0.4, -0.6)
    axes.set_xlim(-0.01 * max(last_step, 1), 1.01 * max(last_step, 1))
    axes.set_yticks(range(len(lanes)), [words.one_line(lane) for lane in lanes])
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0, labelcolor=charts.INK)
    axes.set_xlabel("training step")
