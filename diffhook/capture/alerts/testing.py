"""What holds of every detector and of every sink: tests for a class of your own to inherit.

    class TestMine(DetectorContract):
        detector = Mine

pytest runs them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from diffhook.capture.alerts.alert import Alert
from diffhook.capture.alerts.delivery import Delivery, Sink
from diffhook.capture.alerts.detector import Detector

_LEVELS = ("info", "warning", "error")
_SAMPLES, _BATCH = 2000, 32


class DetectorContract:
    """Set ``detector``; and ``make`` where it takes arguments.

    Attributes:
        detector: the class.
    """

    detector: ClassVar[type[Detector]]

    def make(self) -> Detector:
        return self.detector()

    def test_a_sound_run_is_quiet(self) -> None:
        """Norms that depend on the timestep and fall as the model learns: no more alarms than its rate says,
        within three standard deviations."""
        detector, steps = self.make(), 200
        alarms = [alert for step in range(steps) for alert in detector.look(sound_rows(step))]
        expected = detector.rate * steps * _BATCH
        assert len(alarms) <= expected + 3 * expected**0.5, alarms[0].message

    def test_rows_stay_as_they_are(self) -> None:
        detector, rows = self.make(), sound_rows(0)
        for values in rows.values():
            values.flags.writeable = False
        list(detector.look(rows))

    def test_it_lives_through_odd_rows(self) -> None:
        """None at all, a single one, norms that are not finite or zero, a step that was skipped."""
        detector = self.make()
        for step in range(40):
            list(detector.look(sound_rows(step)))
        for count, norm, rate in (
            (0, 1.0, 1e-3),
            (1, 1.0, 1e-3),
            (4, np.nan, 1e-3),
            (4, 0.0, 1e-3),
            (4, np.inf, 0.0),
        ):
            odd = {name: values[:count].copy() for name, values in sound_rows(40).items()}
            odd["grad_norm"][:], odd["loss"][:], odd["lr"][:] = norm, norm, rate
            self._check(list(detector.look(odd)), odd)

    def test_its_alerts_are_whole_and_name_samples_of_their_step(self) -> None:
        """Rows a thousand times too large, of one sample again and again."""
        detector = self.make()
        for step in range(80):
            rows = sound_rows(step)
            if step >= 40:
                rows["sample"][0] = 7
                rows["grad_norm"][0] *= 1000
                rows["loss"][0] *= 1000
            self._check(list(detector.look(rows)), rows)

    def _check(self, alerts: list[Alert], rows: dict[str, Any]) -> None:
        for alert in alerts:
            assert alert.kind == self.detector.kind
            assert alert.level in _LEVELS
            assert alert.message
            assert set(alert.samples) <= set(rows["sample"].tolist()), alert.message
            assert alert.step == int(rows["step"][0])


def sound_rows(step: int) -> dict[str, Any]:
    """The rows of a step in which nothing is wrong, with a skewed spread; the same for the same step."""
    rng = np.random.default_rng(step)
    timestep = rng.random(_BATCH) * 1000
    usual = 2 * np.exp(-3 * timestep / 1000) * (1 + 5 * np.exp(-step / 20)) / (1 + step / 200)
    norm = usual * np.exp(0.4 * rng.gumbel(size=_BATCH))
    return {
        "sample": rng.integers(0, _SAMPLES, _BATCH),
        "step": np.full(_BATCH, step),
        "timestep": timestep.astype(np.float32),
        "grad_norm": norm.astype(np.float32),
        "loss": norm.astype(np.float32),
        "lr": np.full(_BATCH, 1e-3, np.float32),
    }


class SinkContract(ABC):
    """Give your sink by :meth:`make`, and what reached its other end by :meth:`arrived`."""

    @abstractmethod
    def make(self, folder: Path) -> Sink:
        """The sink, into something that the test can look into; ``folder`` is empty."""

    @abstractmethod
    def arrived(self) -> list[str]:
        """What has arrived, as text, in the order of its arrival."""

    def test_every_alert_arrives_once_in_order_with_its_sentence(self, tmp_path: Path) -> None:
        alerts = [some_alert(step, level) for step, level in enumerate(_LEVELS)]
        sink = self.make(tmp_path)
        for alert in alerts:
            sink(alert)
        self._assert_arrived(alerts)

    def test_it_serves_in_a_thread_of_its_own(self, tmp_path: Path) -> None:
        delivery = Delivery([self.make(tmp_path)], timeout=10)
        alerts = [some_alert(step) for step in range(3)]
        for alert in alerts:
            delivery.send(alert)
        delivery.close()
        self._assert_arrived(alerts)

    def test_odd_alerts_arrive(self, tmp_path: Path) -> None:
        """Of no sample and no timestep, of many samples, with numbers that JSON lacks, in any script."""
        odd = [
            replace(some_alert(0), samples=[], timestep=math.nan, value=math.inf),
            replace(some_alert(1), samples=list(range(1000)), layer="mid.weight"),
            replace(some_alert(2), message="sample 7 (“猫.png”) pulls hard – 4.1 ×"),
        ]
        sink = self.make(tmp_path)
        for alert in odd:
            sink(alert)
        self._assert_arrived(odd)

    def _assert_arrived(self, alerts: list[Alert]) -> None:
        arrived = self.arrived()
        assert len(arrived) == len(alerts), arrived
        for alert, text in zip(alerts, arrived, strict=True):
            assert alert.message in text, text


def some_alert(step: int, level: str = "warning") -> Alert:
    """An alert about sample 7."""
    return Alert("norm-outlier", level, [7], step, 500.0, 9.0, 4.0, f"sample 7 pulls hard at step {step}")
