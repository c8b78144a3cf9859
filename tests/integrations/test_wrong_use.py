"""Wrong use is told where the hook is made, in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

import diffhook
from diffhook.capture import Alerts, Grid, Probe, Quarantine
from diffhook.errors import ConfigurationError, DiffHookError
from diffhook.integrations.accelerate import DiffHook
from diffhook.integrations.torch import TorchHook
from diffhook.report import write_page
from tests.report.logs import write_log
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
    "how many for a probe": (
        {"objective": OBJECTIVE, "probe": 512},
        r"probe is 512; expected a Probe, such as Probe\(samples=512\)",
    ),
    "a model for a list of them": (
        {"models": torch.nn.Linear(1, 1)},
        r"models is a Linear; expected a list of Modules: did you mean \[model\]\?",
    ),
    "a number for a layer": ({"layers": ["conv", 3]}, "layers holds 3; expected a list of strs"),
    "ids for where ids are": ({"sample_ids": [1, 2]}, "sample_ids is a list; expected a batch's key"),
    "snapshots never": ({"snapshot_every": 0}, "snapshot_every is 0; expected a whole number from 1 on"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_option_is_told_at_construction(tmp_path: Path, name: str) -> None:
    options, sentence = WRONG[name]
    with pytest.raises(ConfigurationError, match=sentence):
        DiffHook(Accelerator(cpu=True), tmp_path / "log", **options)


MISMADE: dict[str, tuple[Callable[[], Any], str]] = {
    "a grid in words": (lambda: Grid("10"), "timesteps is '10'; expected how many, or a list"),  # type: ignore[arg-type]
    "half a draw": (lambda: Grid(10, draws=1.5), "draws is 1.5; expected a whole number"),  # type: ignore[arg-type]
    "a number for a grid": (lambda: Probe(grid=20), "grid is 20; expected a Grid, such as Grid"),  # type: ignore[arg-type]
    "a share of the samples": (lambda: Probe(0.5), "samples is 0.5; expected how many"),  # type: ignore[arg-type]
    "no sample": (lambda: Probe(0), "samples is 0; expected how many, from 1 on"),
    "no batch": (lambda: Probe(batch_size=0), "batch_size is 0; expected a whole number from 1 on"),
    "one sink": (lambda: Alerts(sinks=print), "sinks is a builtin_function_or_method; expected a list"),  # type: ignore[arg-type]
    "a kind for a quarantine": (
        lambda: Alerts(quarantine="non-finite"),  # type: ignore[arg-type]
        r"quarantine is 'non-finite'; expected True, False or Quarantine",
    ),
}


@pytest.mark.parametrize("name", MISMADE)
def test_a_part_of_the_wrong_type_is_told_where_it_is_made(name: str) -> None:
    make, sentence = MISMADE[name]
    with pytest.raises(ConfigurationError, match=sentence):
        make()


def test_swapped_and_foreign_arguments_of_a_hook_are_told(tmp_path: Path) -> None:
    accelerator, model = Accelerator(cpu=True), torch.nn.Linear(1, 1)
    with pytest.raises(ConfigurationError, match=r"the accelerator is .*Are the two swapped"):
        DiffHook(tmp_path / "log", accelerator)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"the accelerator is a Linear; .* TorchHook"):
        DiffHook(model, tmp_path / "log")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="the log's place is a Linear; expected a folder"):
        TorchHook(model, tmp_path / "log")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"no option 'overheads'; .* Did you mean 'overhead'\?"):
        TorchHook(tmp_path / "log", model, overheads=0.1)


def test_swapped_arguments_of_a_function_are_told(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", 16, 1)
    wrong: list[tuple[Callable[[], Any], str]] = [
        (lambda: diffhook.influence("held-out", log), "the query set's name is a RunLog; expected text"),  # type: ignore[arg-type]
        (lambda: diffhook.influence(log, "heldout"), "Did you mean 'held-out'"),
        (lambda: diffhook.influence(log, "held-out", "retrak"), "Did you mean 'retrac'"),
        (lambda: diffhook.outliers(log, "trian"), "Did you mean 'train'"),
        (
            lambda: diffhook.outliers(log, signals="loss"),
            r"signals is 'loss'; .* such as \['loss'\]",
        ),
        (lambda: diffhook.outliers(log, signals=["los"]), "Did you mean 'loss'"),
        (lambda: diffhook.outliers(7), "the log is 7; expected its folder, URL or store"),  # type: ignore[arg-type]
        (lambda: diffhook.query(log, "new", torch.zeros(1, 1, 8, 8)), "the query set's name is a Tensor"),  # type: ignore[arg-type]
        (lambda: diffhook.without("exclude.txt", [1, 2]), r"expected without\(dataset, .exclude.txt.\)"),  # type: ignore[arg-type]
        (lambda: write_page(log, "page.html"), "the page's path is a RunLog; expected write_page"),  # type: ignore[arg-type]
    ]
    for call, sentence in wrong:
        with pytest.raises(DiffHookError, match=sentence):
            call()


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
