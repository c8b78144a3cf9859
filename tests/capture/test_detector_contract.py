"""Every detector keeps the contract that we give to others; a wrong one breaks it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from diffhook.capture.alerts import DETECTORS, Alert, Detector
from diffhook.capture.alerts.testing import DetectorContract
from diffhook.log import Rows

TESTS = [name for name in vars(DetectorContract) if name.startswith("test_")]


@pytest.mark.parametrize("test", TESTS)
@pytest.mark.parametrize("kind", sorted(DETECTORS))
def test_detectors(kind: str, test: str) -> None:
    getattr(type("Contract", (DetectorContract,), {"detector": DETECTORS[kind]})(), test)()


def test_one_that_cries_at_every_row_breaks_it() -> None:
    class Nervous(Detector):
        kind = "nervous"

        def look(self, rows: Rows) -> Iterator[Alert]:
            for sample, step in zip(rows["sample"].tolist(), rows["step"].tolist(), strict=True):
                yield Alert("nervous", "warning", [sample], step, 0.0, 1.0, 0.0, "so it is")

    contract = type("Contract", (DetectorContract,), {"detector": Nervous})()
    with pytest.raises(AssertionError, match="so it is"):
        contract.test_a_sound_run_is_quiet()
    contract.test_its_alerts_are_whole_and_name_samples_of_their_step()
