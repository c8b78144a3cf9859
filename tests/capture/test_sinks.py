"""What the terminal says of many alerts: each kind once in words, then how many."""

from __future__ import annotations

import logging

import pytest

from diffhook.capture.alerts import Alert, Alerts, Brief


def alert(kind: str, step: int, level: str = "warning") -> Alert:
    return Alert(kind, level, [step], step, 10.0, 5.0, 4.0, f"sample {step} pulls hard")


def test_the_first_of_each_kind_is_told_in_words_and_the_others_are_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    told = Brief()
    with caplog.at_level(logging.DEBUG, "diffhook"):
        for step in range(187):
            told(alert("norm-outlier", step))
        told(alert("non-finite", 187, "error"))
    lines = [(record.levelname, record.getMessage()) for record in caplog.records]
    more = "others of this kind are counted, and listed by `diffhook alerts`"
    assert lines == [
        ("WARNING", f"step 0: sample 0 pulls hard; {more}"),
        ("WARNING", "step 9: norm-outlier: 10 alerts so far"),
        ("WARNING", "step 99: norm-outlier: 100 alerts so far"),
        ("ERROR", f"step 187: sample 187 pulls hard; {more}"),
    ]


def test_each_run_tells_its_own_first(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        (sink,) = Alerts.of(None).sinks or ()
        sink(alert("drift", 3))
    assert caplog.text.count("sample 3 pulls hard") == 2
