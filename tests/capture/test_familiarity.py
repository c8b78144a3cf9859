"""Another dataset of equal length under the same log is found out by what its samples look like."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from diffhook.capture.familiarity import Familiarity
from diffhook.errors import LogError
from diffhook.log import open_log
from tests.runs import identified, train

RNG = np.random.default_rng(0)
IDS = np.arange(64)


def looks(count: int = 64) -> np.ndarray:
    return np.stack([RNG.normal(0, 0.3, count), *RNG.uniform(0.2, 0.6, (2, count))], 1)


def visits(looked: np.ndarray, noise: float, times: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """What a log says of so many epochs of augmented samples."""
    seen = np.concatenate([looked * (1 + noise * RNG.normal(size=looked.shape)) for _ in range(times)])
    return np.tile(IDS, times), seen


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.3])
def test_the_same_samples_are_the_same_dataset_however_they_are_augmented(noise: float) -> None:
    own = looks()
    known = Familiarity(*visits(own, noise), "here")
    for start in range(0, 64, 8):
        known.see(IDS[start : start + 8], own[start : start + 8] * (1 + noise * RNG.normal(size=(8, 3))))


@pytest.mark.parametrize("change", ["resized", "brightened"])
def test_samples_that_were_resized_or_brightened_are_the_same_samples(change: str) -> None:
    own = looks()
    known = Familiarity(*visits(own, 0.0), "here")
    factor, offset = ([1, 0.9, 0.5], [0, 0, 0]) if change == "resized" else ([1, 1, 1], [0.2, 0, 0])
    known.see(IDS[:8], own[:8] * factor + offset)


def test_other_samples_are_another_dataset_and_nothing_is_concluded_from_one_visit() -> None:
    own, other = looks(), looks()
    with pytest.raises(LogError, match=r"another dataset, or .* of 8 samples .* look as they did"):
        Familiarity(*visits(own, 0.0), "here").see(IDS[:8], other[:8])
    Familiarity(IDS, own, "here").see(IDS[:8], other[:8])


def test_samples_that_the_log_has_not_seen_are_new_ones() -> None:
    """Named samples may come in slices, each of which is trained on in a run of its own."""
    own = looks()
    Familiarity(*visits(own, 0.0), "here").see(IDS[:8] + 100, own[8:16])


def test_a_run_on_another_dataset_ends_before_its_first_step_and_supersedes_nothing(tmp_path: Path) -> None:
    train(tmp_path / "log", epochs=3)
    before = open_log(tmp_path / "log").train["grad_norm"].tolist()
    other = torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(9)) * 0.3 + 0.5
    with pytest.raises(LogError, match=r"another dataset, or .* of 4 samples"):
        train(tmp_path / "log", data=other, strict=False)
    assert open_log(tmp_path / "log").train["grad_norm"].tolist() == before
    train(tmp_path / "log", data=identified(), strict=False)
    assert len(open_log(tmp_path / "log").sessions) == 2


def test_a_dataset_of_another_class_is_named(tmp_path: Path) -> None:
    class Renamed(torch.utils.data.TensorDataset):
        pass

    train(tmp_path / "log", epochs=1)
    with pytest.raises(LogError, match=r"dataset\.class: the log has 'TensorDataset', this run 'Renamed'"):
        train(tmp_path / "log", epochs=1, make_dataset=Renamed)
