"""Examples in docstrings run as they stand."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path
from typing import Any
from unittest import mock

import accelerate
import diffusers
import pytest
import torch
from torch import Tensor, nn

import diffhook
from diffhook.integrations.accelerate import DiffHook

ROOT = Path(__file__).parents[1]


class Denoiser(nn.Linear):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(x) * timestep[:, None]


def denoiser_and_loop() -> dict[str, Any]:
    model = Denoiser(3, 3)
    batches = [{"id": torch.arange(2) + 2 * k, "x": torch.randn(2, 3)} for k in range(2)]
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), 0.1),
        "loader": batches,
        "loss": lambda model, batch: model(batch["x"], torch.ones(2)).square().mean(),
    }


def elsewhere(*names: str) -> dict[str, Any]:
    """Stand-ins for what only a user has: the example is run for its syntax and its names."""
    return {name: mock.MagicMock(name=name) for name in names}


HOST = {"Accelerator": lambda: accelerate.Accelerator(cpu=True), "DiffHook": DiffHook}
SETTINGS: dict[str, dict[str, Any]] = {
    "diffhook.gradients.engine": {},
    "diffhook.analysis.evaluation.lds": {},
    "diffhook.capture.objective.diffusion": {
        "DDPMScheduler": diffusers.DDPMScheduler,
        "MinSNR": diffhook.MinSNR,
    },
    "diffhook.capture.model.trajectory": elsewhere("pipe", "log", "diffhook"),
    "diffhook.log.icechunk": elsewhere("DiffHook", "IcechunkStore", "open_log", "accelerator", "repository"),
    "diffhook.integrations.accelerate.hook": HOST,
    "diffhook.integrations.torch.hook": denoiser_and_loop(),
    "diffhook.integrations.notify.tables": elsewhere("DiffHook", "accelerator"),
    "diffhook.integrations.lightning.callback": elsewhere("Trainer", "DiffHookCallback", "module", "loader"),
    "diffhook.integrations.transformers.callback": elsewhere("Trainer", "DiffHookCallback"),
}


class WhatIsShown(doctest.OutputChecker):
    """An example that shows no output may have some."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


def modules_with_examples() -> set[str]:
    packages = {"diffhook": ROOT / "diffhook", "diffhook.integrations": ROOT / "integrations"}
    found = set()
    for package, folder in packages.items():
        for path in folder.rglob("*.py"):
            seen = "diffhook/integrations" in path.as_posix()  # through the link
            if not seen and re.search(r"^\s*>>> ", path.read_text(), re.MULTILINE):
                parts = path.relative_to(folder).with_suffix("").parts
                found.add(".".join([package, *(part for part in parts if part != "__init__")]))
    return found


def test_every_example_is_run() -> None:
    assert modules_with_examples() == set(SETTINGS)


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    runner, examples = doctest.DocTestRunner(WhatIsShown()), 0
    for test in doctest.DocTestFinder(exclude_empty=True).find(module):
        test.globs |= SETTINGS[name]
        examples += len(test.examples)
        runner.run(test)
    assert examples
    assert runner.summarize(verbose=False).failed == 0
