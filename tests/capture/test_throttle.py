"""The throttle finds samples whose losses stay high, and leaves the others alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import diffhook
from diffhook import Alerts, Throttle
from diffhook.capture.alerts import Factors
from diffhook.capture.alerts.deviation import Deviations
from diffhook.errors import ConfigurationError
from diffhook.log import Rows
from tests.capture.test_alerts import clean_run, make_rows

BROKEN = 17


def factors(rate: float = 1e-3) -> Factors:
    return Factors(Throttle(rate), Deviations())


def throttled_visits(learned: Factors, run: list[Rows]) -> list[int]:
    """The samples of visits that count less than in full."""
    found = []
    for rows in run:
        found += [sample for sample in rows["sample"].tolist() if sample in learned.below]
        for _ in learned.look(rows):
            pass
    return found


@pytest.mark.parametrize("rate", [0.003, 0.02])
def test_of_ordinary_samples_the_asked_share_of_visits_is_throttled(rate: float) -> None:
    run = clean_run(800, np.random.default_rng(1), count=500)
    found = len(throttled_visits(factors(rate), run))
    assert found < 2 * rate * 32 * len(run)


@pytest.mark.parametrize("count", [24, 500], ids=["a user's few images", "many"])
def test_a_planted_image_is_throttled_by_the_multiple_of_its_loss_and_others_are_not(count: int) -> None:
    run = clean_run(800 if count == 500 else 60, np.random.default_rng(2), count=count)
    for rows in run:
        rows["loss"][rows["sample"] == BROKEN] *= 4.0  # type: ignore[index]
    learned = factors()
    found = throttled_visits(learned, run)
    assert learned.below[BROKEN] == 0.25
    assert len([sample for sample in found if sample != BROKEN]) <= 2e-3 * 32 * len(run)
    (first, *_) = (i for i, rows in enumerate(run) if BROKEN in rows["sample"])
    assert found.count(BROKEN) > 0.5 * sum((rows["sample"] == BROKEN).sum() for rows in run[first:])


def test_a_single_noisy_visit_throttles_nobody() -> None:
    learned = factors()
    run = clean_run(300, np.random.default_rng(3), count=200)
    throttled_visits(learned, run)
    for visit in range(2):
        noisy = make_rows([1e3 if visit else 0.1], [500.0], [9999], step=300 + visit)
        assert list(learned.look(noisy)) == []
    assert 9999 not in learned.below


def test_a_sample_that_has_become_ordinary_counts_in_full_again() -> None:
    learned = factors()
    rng = np.random.default_rng(4)
    told = []
    for step, rows in enumerate(clean_run(500, rng, count=64)):
        if step < 250:
            rows["loss"][rows["sample"] == BROKEN] *= 6.0  # type: ignore[index]
        told += [(step, record) for record in learned.look(rows) if record.samples == [BROKEN]]
    assert told[0][0] < 250 < told[-1][0]
    assert (told[-1][1].kind, told[-1][1].value) == ("throttle", 1.0)
    assert "counts in full again" in told[-1][1].message
    assert "is multiplied by" in told[0][1].message
    assert learned.of(torch.tensor([BROKEN])) is None


def test_records_stand_in_for_rows_that_are_no_longer_looked_at() -> None:
    learned = factors()
    for rows in clean_run(5, np.random.default_rng(5), count=8):
        list(learned.look(rows))  # too few to judge; from then on visits are remembered
    record: dict[str, Any] = {"kind": "throttle", "samples": [BROKEN], "value": 0.5}
    learned.restore([record, {**record, "value": 0.25}, {**record, "kind": "loss-outlier", "value": 9.0}])
    assert learned.of(torch.tensor([1, BROKEN])).tolist() == [1.0, 0.25]  # type: ignore[union-attr]


def test_rows_without_losses_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    learned = factors()
    for rows in clean_run(6, np.random.default_rng(6)):
        list(learned.look({**rows, "loss": np.full(32, np.nan)}))
    assert caplog.text.count("the throttle throttles nobody") == 1
    seeing = factors()
    for rows in clean_run(6, np.random.default_rng(6)):
        list(seeing.look(rows))
    assert caplog.text.count("the throttle throttles nobody") == 1


def test_wrong_wishes_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="floor is 0; expected a factor above 0 and at most 1"):
        diffhook.Throttle(floor=0)
    with pytest.raises(ConfigurationError, match=r"rate is 0\.5"):
        Throttle(rate=0.5)
    with pytest.raises(ConfigurationError, match=r"throttle is 'yes'; expected True, False or Throttle\("):
        Alerts(throttle="yes")  # type: ignore[arg-type]
