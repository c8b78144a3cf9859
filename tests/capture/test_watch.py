"""Detectors go on whatever the run becomes, and one that breaks does not take the others along."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import pytest

from diffhook import Alerts
from diffhook.capture import Alert, Detector
from diffhook.capture.alerts import DETECTORS, Dominating, Watch
from diffhook.capture.alerts.tail import Tail
from diffhook.log import Rows
from tests.capture.test_alerts import alarms, make_rows


def test_what_has_become_usual_is_learned_anew() -> None:
    rng = np.random.default_rng(0)
    tail = Tail(0.01)
    tail.alarms(rng.normal(0, 1, 1000))
    assert tail.alarms(rng.normal(50, 1, 100)).all()
    tail.alarms(rng.normal(50, 1, 20_000))
    shares = [tail.alarms(rng.normal(50, 1, 1000)).mean() for _ in range(10)]
    assert 0.002 < np.mean(shares) < 0.05
    assert tail.alarms(np.array([100.0])).all()


def test_a_run_in_which_one_sample_has_come_to_dominate_every_step_goes_on() -> None:
    rng, detector = np.random.default_rng(0), Dominating()
    alarms(detector, [make_rows(rng.uniform(0.9, 1.1, 8), rng.random(8) * 1000) for _ in range(300)])
    uneven = [np.append(rng.uniform(0.9, 1.1, 7), 20.0) for _ in range(3000)]
    found = alarms(
        detector, [make_rows(norms, rng.random(8) * 1000, step=i) for i, norms in enumerate(uneven)]
    )
    assert found


class Breaks(Detector):
    kind = "breaks"

    def look(self, rows: Rows) -> Iterator[Alert]:
        raise ZeroDivisionError("no rows today")
        yield


@pytest.mark.parametrize("strict", [True, False])
def test_a_detector_that_fails_is_left_out_and_told_once(
    strict: bool, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[str] = []
    detectors = [Breaks(), DETECTORS["non-finite"]()]
    watch = Watch(
        Alerts(detectors=detectors, sinks=[]), lambda a: told.append(a["kind"]), list, 0, strict=strict
    )
    broken = make_rows([np.nan, 1.0], [1, 2])
    if strict:
        with pytest.raises(ZeroDivisionError):
            watch.look(broken)
        return
    for _ in range(2):
        watch.look(broken)
    assert "non-finite" in told
    (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert "the detector breaks failed and is left out from now on: ZeroDivisionError" in record.message
