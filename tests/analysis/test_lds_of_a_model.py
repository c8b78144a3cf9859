"""The linear datamodeling score of a real, tiny diffusion model, from training to the number."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import diffhook
from diffhook.cli import main
from tests.runs import SCHEDULER, TinyDenoiser, train

COUNT, QUERIES = 12, 3

SCRIPT = '''
import numpy as np
import torch

import diffhook
from tests.runs import SCHEDULER, TinyDenoiser, denoising_losses

IMAGES = torch.load({images!r})
QUERIES = IMAGES[:{queries}]


def train(ids):
    model = TinyDenoiser()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(4):
        for batch in torch.tensor(ids).split(3):
            clean = IMAGES[batch]
            noise, timesteps = torch.randn_like(clean), torch.randint(0, 1000, (len(clean),))
            denoising_losses(model, (clean, noise, timesteps)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


@torch.no_grad()
def losses(model):
    """Of each query over a grid of timesteps and noise that is the same for all models."""
    objective = diffhook.DiffusionObjective(SCHEDULER)
    found = []
    for query in QUERIES:
        timesteps = torch.linspace(1, 999, 16).long()
        clean = query.expand(len(timesteps), -1, -1, -1)
        found.append(float(objective(model, (clean,), timesteps, torch.arange(16)).mean()))
    return found
'''


def test_scores_of_a_run_are_judged_by_models_trained_on_its_halves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.randn(COUNT, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    images *= torch.linspace(0.2, 2.0, COUNT)[:, None, None, None]  # so that it counts which are left out
    torch.save(images, tmp_path / "images.pt")
    train(tmp_path / "log", data=images, snapshot_every=4, keep_preconditioner=True, projection_dim="full")
    log = diffhook.open_log(tmp_path / "log")
    objective, grid = diffhook.DiffusionObjective(SCHEDULER), diffhook.Grid(4, draws=2)
    for name, divided in (("plain", False), ("adam", True)):
        diffhook.query(
            log, (images[:QUERIES],), name, objective, model=TinyDenoiser(), grid=grid, preconditioned=divided
        )
    script = tmp_path / "lds_training.py"
    script.write_text(SCRIPT.format(images=str(tmp_path / "images.pt"), queries=QUERIES))
    monkeypatch.setattr(sys, "path", [*sys.path])
    record = tmp_path / "retrained.jsonl"
    functions = ["--train", f"{script}:train", "--measure", f"{script}:losses"]
    trained = [*functions, "--subsets", "10", "--seeds", "2"]
    judged = ["evaluate", str(log.location), "--record", str(record), "--json"]
    capsys.readouterr()  # the hook's plan and summary

    assert main([*judged, "--queries", "plain", "--methods", "tracin", "retrac", *trained]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["scores"] for row in rows] == ["tracin", "retrac"]
    runs = [json.loads(line) for line in record.read_text().splitlines()]
    assert len(runs) == 20
    assert all(len(run["subset"]) == COUNT // 2 and len(run["losses"]) == QUERIES for run in runs)
    assert np.ptp([run["losses"] for run in runs], axis=0).min() > 0, "halves must differ in what they teach"

    for row in rows:
        values = diffhook.influence(log, "plain", row["scores"]).values
        assert row["value"] == pytest.approx(by_hand(values, runs))
        assert row["beside"].startswith("another seed ")

    # The record is enough for other scores: nothing is trained again.
    assert main([*judged, "--queries", "adam", "--methods", "adam-tracin"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["value"] == pytest.approx(by_hand(diffhook.influence(log, "adam", "adam-tracin").values, runs))


def by_hand(scores: np.ndarray, runs: list[dict]) -> float:
    """Mean over queries of Pearson's correlation of ranks: no two sums or losses are equal here."""
    subsets = sorted({tuple(run["subset"]) for run in runs})
    found = []
    for query in range(QUERIES):
        predicted = [scores[query, list(subset)].sum() for subset in subsets]
        served = [
            -np.mean([run["losses"][query] for run in runs if tuple(run["subset"]) == subset])
            for subset in subsets
        ]
        ranks = [np.argsort(np.argsort(side)) for side in (predicted, served)]
        found.append(np.corrcoef(ranks)[0, 1])
    return float(np.mean(found))
