"""Wrong use is told where the hook is made, in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

import diffhook
from diffhook.capture import Alerts, Grid, Probe, Quarantine
from diffhook.errors import ConfigurationError
from diffhook.integrations.accelerate import DiffHook
from tests.runs import SCHEDULER

OBJECTIVE = diffhook.DiffusionObjective(SCHEDULER)
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "every as text": ({"every": "2"}, "every is '2'; expected a whole number from 1 on"),
    "every as a bool": ({"every": True}, "every is True; expected a whole number"),
    "thumbnails as a bool": (
        {"thumbnails": True},
        "thumbnails is True; expected a whole number from 0 to 512",
    ),
    "alerts as a bool": ({"alerts": True}, r"alerts is True; expected Alerts\(\.\.\.\)"),
    "a scheduler": (
        {"objective": SCHEDULER},
        r"objective is a DDPMScheduler; .* DiffusionObjective\(scheduler\)",
    ),
    "a misspelt kind": (
        {"alerts": Alerts(quarantine=Quarantine(kinds=["nonfinite"]))},
        "Did you mean 'non-finite'",
    ),
    "too fine a grid": (
        {"objective": OBJECTIVE, "probe": Probe(grid=Grid(5000))},
        "a grid of 5000 timesteps; the schedule has 1000",
    ),
    "another reduction": ({"reduction": "average"}, "reduction is 'average'; expected one of mean, sum"),
    "snapshots never": ({"snapshot_every": 0}, "snapshot_every is 0; expected a whole number from 1 on"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_option_is_told_at_construction(tmp_path: Path, name: str) -> None:
    options, sentence = WRONG[name]
    with pytest.raises(ConfigurationError, match=sentence):
        DiffHook(Accelerator(cpu=True), tmp_path / "log", **options)


def test_a_place_that_is_none_is_told_at_construction() -> None:
    with pytest.raises(ConfigurationError, match="the log's place is None; expected a folder"):
        DiffHook(Accelerator(cpu=True), None)  # type: ignore[arg-type]


def test_a_file_in_the_logs_place_is_told_at_construction(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("mine")
    with pytest.raises(ConfigurationError, match="log is a file; expected a folder"):
        DiffHook(Accelerator(cpu=True), tmp_path / "log")


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    hook = DiffHook(Accelerator(cpu=True), "~/runs/log")
    assert hook.capture.path == str(tmp_path / "runs/log")
    hook.close()
