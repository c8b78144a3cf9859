"""Not the same thing twice, and not too many things at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from diffhook.capture.alerts.alert import Alert

_WINDOW = 100  # steps


class Limit:
    """Lets each detector name a sample once, and raise at most ``most`` alerts in 100 steps.

    What is held back is counted, and told with the next alert of its kind that passes. A sample held
    back by the rate is not forgotten: its next visit can name it.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.held_back: Counter[str] = Counter()  # by kind, since the last alert of that kind
        self._named: set[tuple[str, int]] = set()
        self._passed: dict[str, list[int]] = {}  # kind → steps of the alerts in the last 100

    def remember(self, kind: str, samples: Sequence[int], step: int) -> None:
        """An alert of before: as if it had passed here."""
        self._passed[kind] = [*self._passed.get(kind, ()), step]
        self._named.update((kind, sample) for sample in samples)

    def admit(self, alert: Alert) -> Alert | None:
        """The alert without samples that were named before; None if nothing is left to say."""
        samples = [s for s in alert.samples if (alert.kind, s) not in self._named]
        if alert.samples and not samples:
            return None
        passed = [step for step in self._passed.get(alert.kind, ()) if step > alert.step - _WINDOW]
        if len(passed) >= self.most:
            self.held_back[alert.kind] += 1
            return None
        self._passed[alert.kind] = passed
        self.remember(alert.kind, samples, alert.step)
        held = self.held_back.pop(alert.kind, 0)
        more = f" (and {held} more of this kind were held back before)" if held else ""
        return replace(alert, samples=samples, message=alert.message + more)
