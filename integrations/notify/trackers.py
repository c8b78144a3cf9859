"""A sink for the experiment trackers that an Accelerator writes to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffhook.capture import Alert

_Tell = Callable[[Any, Alert], None]
_TELL: dict[str, _Tell] = {}
_LEVELS = {"info": "INFO", "warning": "WARN", "error": "ERROR"}


class Trackers:
    """Shows alerts in TensorBoard (text), Weights & Biases and Trackio (alerts of their own).

    Other trackers have nowhere to put a sentence. Like all that trackers get through accelerate, these
    are the alerts of the main process; the log has those of every process.

    Args:
        accelerator: its trackers, whenever they are begun.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def __call__(self, alert: Alert) -> None:
        if not self._accelerator.is_main_process:
            return
        for tracker in getattr(self._accelerator, "trackers", ()):
            tell = _TELL.get(tracker.name)
            if tell is not None:
                tell(tracker.tracker, alert)


def _tells(name: str) -> Callable[[_Tell], _Tell]:
    def add(tell: _Tell) -> _Tell:
        _TELL[name] = tell
        return tell

    return add


@_tells("tensorboard")
def _tensorboard(writer: Any, alert: Alert) -> None:
    writer.add_text(f"diffhook/{alert.kind}", alert.message, global_step=alert.step)
    writer.flush()


@_tells("wandb")
def _wandb(run: Any, alert: Alert) -> None:
    # Not run.log: by now the loop may have logged a later step, and wandb drops what goes back.
    run.alert(title=f"diffhook: {alert.kind}", text=_text(alert), level=_LEVELS[alert.level])


@_tells("trackio")
def _trackio(run: Any, alert: Alert) -> None:
    from trackio import AlertLevel

    level = AlertLevel[_LEVELS[alert.level]]
    run.alert(title=f"diffhook: {alert.kind}", text=_text(alert), level=level, step=alert.step)


def _text(alert: Alert) -> str:
    return f"step {alert.step}: {alert.message}"
