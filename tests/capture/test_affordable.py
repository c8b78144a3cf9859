"""What a budget affords of a probe: what is chosen fits, and the next larger one would not have."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import default_collate

from diffhook.capture import DiffusionObjective, Grid, Probe
from diffhook.capture.probes.affordable import affordable
from diffhook.capture.probes.last_probe import AT_END
from diffhook.gradients import PerSampleGradients
from tests.capture.test_label_contrast import Told
from tests.runs import SCHEDULER, TinyDenoiser

SAMPLES, BATCH = 40, 8
TRIAL, OF_LABELS = 3, 11  # forwards that the trials take, which the budget pays for


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A forward takes a second, and nothing else takes any time."""
    now = [0.0]
    fake = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr("diffhook.capture.probes.affordable.time", fake)
    return now


def ticking(model: torch.nn.Module, clock: list[float]) -> torch.nn.Module:
    model.register_forward_hook(lambda *_: clock.__setitem__(0, clock[0] + 1.0))
    return model


@pytest.mark.parametrize(
    ("seconds", "rows", "needed"), [(100, 20, 100), (99, 10, 50), (49, 5, 25), (25, 5, 25), (24, None, 25)]
)
def test_the_richest_grid_that_fits_is_chosen(
    seconds: float, rows: int | None, needed: float, clock: list[float]
) -> None:
    engine = PerSampleGradients(ticking(TinyDenoiser(), clock), projection_dim=16)
    probe = Probe(None, AT_END.grid, dataset=torch.randn(SAMPLES, 1, 8, 8), batch_size=BATCH)
    objective = DiffusionObjective(SCHEDULER)
    before = torch.get_rng_state()
    sibling = engine.sibling(engine.model)
    found = affordable(probe, sibling, objective, seconds + TRIAL)
    assert torch.equal(before, torch.get_rng_state())
    assert (None if found.probe is None else found.probe.grid.rows) == rows
    assert found.seconds == needed + (TRIAL if found.probe is None else 0)
    if found.probe is not None:
        began = clock[0]
        run = found.probe.run(sibling, objective, range(SAMPLES), None, step=0, lr_sum=1.0, batch_per_step=1)
        assert sum(len(part["sample"]) for part in run) == SAMPLES * found.probe.grid.rows
        assert clock[0] - began == needed


@pytest.mark.parametrize(
    ("seconds", "rows", "labels", "needed"),
    [(250, 20, 6, 250), (249, 10, 6, 200), (199, 5, 6, 175), (174, 5, 0, 25)],
)
def test_labels_are_left_out_where_they_do_not_fit(
    seconds: float, rows: int, labels: int, needed: float, clock: list[float]
) -> None:
    model = ticking(Told(), clock)
    data = [{"image": torch.randn(1, 8, 8), "class_labels": index % 3} for index in range(SAMPLES)]
    probe = Probe(None, AT_END.grid, dataset=data, collate=default_collate, batch_size=BATCH)
    engine = PerSampleGradients(model, projection_dim=16)
    found = affordable(
        probe, engine.sibling(model), DiffusionObjective(SCHEDULER), seconds + TRIAL + OF_LABELS
    )
    assert found.probe is not None
    assert (found.probe.grid.rows, found.probe.label_timesteps, found.seconds) == (rows, labels, needed)


def test_rows_of_before_decide_the_grid_and_processes_share_the_work(clock: list[float]) -> None:
    engine = PerSampleGradients(ticking(TinyDenoiser(), clock), projection_dim=16)
    probe = Probe(None, Grid(4, replicates=2), dataset=torch.randn(SAMPLES, 1, 8, 8), batch_size=BATCH)
    objective, sibling = DiffusionObjective(SCHEDULER), engine.sibling(engine.model)
    assert affordable(probe, sibling, objective, 39 + TRIAL, same_grid=True).probe is None
    assert affordable(probe, sibling, objective, 40 + TRIAL, same_grid=True) == (probe, 40)
    assert affordable(probe, sibling, objective, 20 + TRIAL, same_grid=True, processes=2) == (probe, 20)
