"""Factors of the throttle that are given, not learned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from unittest import mock

from diffhook.capture.alerts import Alert, Factors
from diffhook.capture.alerts.deviation import Deviations
from diffhook.capture.alerts.throttle import Throttle
from diffhook.log import Rows


@contextmanager
def given_factors(below: Mapping[int, float]) -> Iterator[None]:
    """Whatever the rows say, from the first on: sample → factor."""
    made = Factors.__init__

    def begin(factors: Factors, throttle: Throttle, deviations: Deviations) -> None:
        made(factors, throttle, deviations)
        factors.below = dict(below)

    def unmoved(factors: Factors, rows: Rows) -> Iterator[Alert]:
        return iter(())

    with mock.patch.object(Factors, "__init__", begin), mock.patch.object(Factors, "look", unmoved):
        yield
