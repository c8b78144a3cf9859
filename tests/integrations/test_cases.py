"""Every kind of loop that real scripts run: rows equal the batch-size-1 loop's."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import diffhook
from diffhook.integrations.accelerate import DiffHook
from tests.integrations.cases import CASES, Batch, Case
from tests.twins import double, rows

COUNT, BATCH = 5, 2  # so that the last batch is ragged


class _Samples(Dataset[Any]):
    def __init__(self, case: Case) -> None:
        self._clean = torch.randn(COUNT, *case.image, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"clean": self._clean[index], "number": index}


def _run(
    log: Path,
    case: Case,
    optimizer_of: Callable[[Any], torch.optim.Optimizer] = lambda p: torch.optim.AdamW(p, 1e-3),
    *,
    precision: str = "no",
    accumulation: int = 1,
    **options: Any,
) -> dict[tuple[int, int], tuple[float, Tensor, float, float]]:
    """Trains watched; between steps, an average of the weights is swapped in and looked at.

    Returns (step, sample) → (timestep, gradient, loss, weight) of the twin.
    """
    torch.manual_seed(0)
    AcceleratorState._reset_state(reset_partial_state=True)  # another precision than the test before
    models = case.models()
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulation)
    hook = DiffHook(accelerator, log, projection_dim="full", strict=True, alerts=(), **options)
    parameters = [p for m in models.values() for p in m.parameters() if p.requires_grad]
    loader = DataLoader(_Samples(case), BATCH, shuffle=True)
    *prepared, optimizer, loader = accelerator.prepare(*models.values(), optimizer_of(parameters), loader)
    joined = _joined(dict(zip(models, prepared, strict=True)))
    average = EMAModel(parameters)
    expected = {}
    for item in loader:
        count = len(item["clean"])
        batch = {"clean": item["clean"], **case.extra(count), "noise": torch.randn(count, *case.image)}
        batch["timesteps"] = torch.randint(0, 1000, (count,))
        step = hook.step_count
        with accelerator.accumulate(*prepared):
            for number, twin in zip(
                item["number"].tolist(), _twins(case, prepared, batch, precision), strict=True
            ):
                expected[step, number] = (*twin, 1 / (count * accumulation))
            accelerator.backward(case.losses(joined, batch).mean())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(parameters, 0.5)
            optimizer.step()
            optimizer.zero_grad()
        average.step(parameters)
        average.store(parameters)
        average.copy_to(parameters)
        with torch.no_grad():
            case.losses(joined, batch)
        average.restore(parameters)
    accelerator.end_training()
    return expected


def _joined(models: dict[str, nn.Module]) -> Any:
    return nn.ModuleDict(models) if len(models) > 1 else next(iter(models.values()))


def _twins(case: Case, prepared: list[Any], batch: Batch, precision: str) -> list[tuple[Any, ...]]:
    """(timestep, gradient, loss) of every sample alone, on fresh copies of the models."""
    twins = case.models()
    for twin, model in zip(twins.values(), prepared, strict=True):
        twin.load_state_dict(model.state_dict())
        twin.train(model.training)
    exact = precision == "no"
    joined = _joined(twins).double() if exact else _joined(twins)
    parameters = [p for p in joined.parameters() if p.requires_grad]
    found = []
    for sample in range(len(batch["timesteps"])):
        alone = rows(double(batch) if exact else batch, slice(sample, sample + 1))
        with torch.autocast("cpu", torch.bfloat16, enabled=not exact):
            loss = case.losses(joined, alone).sum()
        joined.zero_grad()
        loss.backward()
        gradient = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
        found.append((float(batch["timesteps"][sample]), torch.cat(gradient).double(), loss.item()))
    return found


def _compare(log: Path, expected: dict[Any, Any], case: Case, tolerance: float = 2e-5) -> None:
    table = diffhook.open_log(log).train
    assert len(table) == len(expected)
    assert diffhook.open_log(log).verify() == []
    found = {name: table[name] for name in table.columns}
    for row in range(len(table)):
        key = int(found["step"][row]), int(found["sample"][row])
        timestep, gradient, loss, weight = expected[key]
        if case is CASES["flow"]:
            timestep = (timestep + 1) / 1000
        np.testing.assert_allclose(found["timestep"][row], timestep, rtol=1e-6)
        np.testing.assert_allclose(found["weight"][row], weight, rtol=1e-6)
        norm = float(gradient.norm())
        np.testing.assert_allclose(found["grad_norm"][row], norm, rtol=tolerance)
        error = np.linalg.norm(found["projection"][row] - (gradient / norm).numpy())
        assert error < tolerance, f"row {row}: the direction is off by {error}"
        # A weighted loss cannot be read off the gradient, unless all its weights are one.
        if case.plain or not np.isnan(found["loss"][row]):
            np.testing.assert_allclose(found["loss"][row], loss, rtol=max(tolerance, 1e-4))


@pytest.mark.parametrize("name", CASES)
def test_rows_equal_the_batch_1_loop(tmp_path: Path, name: str) -> None:
    _compare(tmp_path / "log", _run(tmp_path / "log", CASES[name]), CASES[name])


@pytest.mark.parametrize("name", ["text-keyword", "lora", "unet-and-text-encoder"])
def test_rows_equal_the_batch_1_loop_while_accumulating(tmp_path: Path, name: str) -> None:
    _compare(tmp_path / "log", _run(tmp_path / "log", CASES[name], accumulation=2), CASES[name])


@pytest.mark.parametrize("name", ["text-positional", "lora"])
def test_rows_in_bfloat16_equal_the_batch_1_loop_in_bfloat16(tmp_path: Path, name: str) -> None:
    """As far as the precision goes: batching changes the order of its roundings."""
    expected = _run(tmp_path / "log", CASES[name], precision="bf16")
    _compare(tmp_path / "log", expected, CASES[name], tolerance=0.05)


OPTIMISERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9),
    "foreach": lambda p: torch.optim.AdamW(p, 1e-3, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, 1e-3, fused=True),
    "8-bit": lambda p: import_module("bitsandbytes.optim").AdamW8bit(p, 1e-3, min_8bit_size=1),
}


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("reuse", [False, True], ids=["", "reuse"])
def test_every_optimiser_counts_its_steps(tmp_path: Path, name: str, reuse: bool) -> None:
    expected = _run(tmp_path / "log", CASES["epsilon"], OPTIMISERS[name], reuse_products=reuse)
    _compare(tmp_path / "log", expected, CASES["epsilon"])
    assert {step for step, _ in expected} == {0, 1, 2}
