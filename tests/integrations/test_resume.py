"""A run in several sittings, with us and without: one log without gaps or doubles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader, TensorDataset

import diffhook
from diffhook.capture import Alert, Detector
from diffhook.integrations.accelerate import DiffHook
from diffhook.integrations.torch import TorchHook
from diffhook.log import Rows
from tests.runs import TinyDenoiser, denoising_losses, identified
from tests.waiting import wait_until

PER_EPOCH = 3


class Sitting:
    """One process's life: trains until ``stop``, saving after the steps in ``save``."""

    def __init__(self, folder: Path, *, watched: bool, adam: bool = True, alerts: Any = None) -> None:
        self.folder = folder
        torch.manual_seed(7)
        # The order of an epoch follows from its number, so that it can be resumed in the middle.
        self.accelerator = Accelerator(
            cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True)
        )
        self.hook = DiffHook(
            self.accelerator, folder / "log", strict=True, projection_dim=16, enabled=watched, alerts=alerts
        )
        model = TinyDenoiser()
        kind = torch.optim.AdamW if adam else torch.optim.SGD
        loader = DataLoader(TensorDataset(identified()), 4, shuffle=True)
        prepared = self.accelerator.prepare(model, kind(model.parameters(), 1e-3), loader)
        self.model, self.optimizer, self.loader = prepared

    def train(self, *, resume: int = 0, stop: int, save: tuple[int, ...] = ()) -> Any:
        if resume:
            self.accelerator.load_state(str(self.folder / f"at-{resume}"))
        step = resume
        while step < stop:
            epoch, done = divmod(step, PER_EPOCH)
            loader = skip_first_batches(self.loader, done)
            loader.set_epoch(epoch)
            for (clean,) in loader:
                draws = torch.Generator().manual_seed(step)
                timesteps = torch.randint(0, 1000, (len(clean),), generator=draws)
                batch = (clean, torch.randn(clean.shape, generator=draws), timesteps)
                self.accelerator.backward(denoising_losses(self.model, batch).mean())
                self.optimizer.step()
                self.optimizer.zero_grad()
                step += 1
                if step in save:
                    self.accelerator.save_state(str(self.folder / f"at-{step}"))
                if step == stop:
                    break
        self.accelerator.end_training()
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


def test_detectors_of_a_resumed_run_know_the_steps_before(tmp_path: Path) -> None:
    class Notes(Detector):
        seen: ClassVar[list[int]] = []

        def look(self, rows: Rows) -> Iterator[Alert]:
            self.seen.append(int(rows["step"][0]))
            return iter(())

    Sitting(tmp_path, watched=True).train(stop=5, save=(4,))
    Sitting(tmp_path, watched=True, alerts=[Notes()]).train(resume=4, stop=6)
    assert Notes.seen == [0, 1, 2, 3, 4, 5], "step 4 of the first sitting is superseded"


def _steps(folder: Path) -> dict[int, int]:
    """Step → rows."""
    log = diffhook.open_log(folder / "log")
    assert log.verify() == []
    return dict(Counter(log.train["step"].tolist()))


def _samples(folder: Path) -> list[int]:
    table = diffhook.open_log(folder / "log").train
    return [s for _, s in sorted(zip(table["step"].tolist(), table["sample"].tolist(), strict=True))]


def test_resuming_in_the_middle_of_an_epoch_loses_and_doubles_nothing(tmp_path: Path) -> None:
    whole = Sitting(tmp_path / "whole", watched=True).train(stop=6)
    Sitting(tmp_path / "parts", watched=True).train(stop=4, save=(4,))
    parts = Sitting(tmp_path / "parts", watched=True).train(resume=4, stop=6)
    assert torch.equal(whole, parts)
    assert _steps(tmp_path / "parts") == dict.fromkeys(range(6), 4)
    assert _samples(tmp_path / "parts") == _samples(tmp_path / "whole")


def test_rows_after_an_older_checkpoint_are_superseded(tmp_path: Path) -> None:
    Sitting(tmp_path, watched=True).train(stop=6, save=(2, 4))
    Sitting(tmp_path, watched=True).train(resume=2, stop=5)
    assert _steps(tmp_path) == dict.fromkeys(range(5), 4)


@pytest.mark.parametrize("adam", [True, False], ids=["adam", "sgd"])
def test_sittings_with_and_without_us_make_one_log(tmp_path: Path, adam: bool) -> None:
    """Adam knows how many steps it has taken; with SGD the log goes on after its last row."""
    Sitting(tmp_path, watched=True, adam=adam).train(stop=2, save=(2,))
    Sitting(tmp_path, watched=False, adam=adam).train(resume=2, stop=4, save=(4,))
    Sitting(tmp_path, watched=True, adam=adam).train(resume=4, stop=6)
    gap = [4, 5] if adam else [2, 3]
    assert _steps(tmp_path) == dict.fromkeys([0, 1, *gap], 4)


def test_a_run_first_trained_without_us_counts_its_own_steps(tmp_path: Path) -> None:
    plain = Sitting(tmp_path / "plain", watched=False).train(stop=5)
    Sitting(tmp_path, watched=False).train(stop=3, save=(3,))
    resumed = Sitting(tmp_path, watched=True).train(resume=3, stop=5)
    assert torch.equal(plain, resumed)
    assert _steps(tmp_path) == {3: 4, 4: 4}


def test_a_checkpoint_is_on_disk_with_all_rows_before_it_counts(tmp_path: Path) -> None:
    """As after a kill: nothing is closed."""
    sitting = Sitting(tmp_path, watched=True)
    for (clean,) in sitting.loader:
        batch = (clean, torch.randn_like(clean), torch.zeros(4).long())
        sitting.accelerator.backward(denoising_losses(sitting.model, batch).mean())
        sitting.optimizer.step()
    sitting.accelerator.save_state(str(tmp_path / "state"))
    assert _steps(tmp_path) == {0: 4, 1: 4, 2: 4}
    sitting.hook.close()


@pytest.mark.parametrize("prepared", [True, False], ids=["prepared", "plain"])
@pytest.mark.parametrize("often", [False, True], ids=["", "often"])
def test_a_checkpoint_of_the_loops_own_is_on_disk_with_all_rows_before_it(
    tmp_path: Path, prepared: bool, often: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scripts that save what they need by torch.save and are killed later, as U-ViT's: nothing is closed."""
    if often:  # then it is not waited for
        monkeypatch.setattr("diffhook.capture.loop.session.settling._BETWEEN", float("inf"))
    sitting = Sitting(tmp_path, watched=True)
    sitting.train(stop=2)
    saved = sitting.optimizer.state_dict()
    another = Sitting(tmp_path, watched=True)
    optimizer = another.optimizer if prepared else another.optimizer.optimizer
    optimizer.load_state_dict(saved)
    for (clean,) in another.loader:
        batch = (clean, torch.randn_like(clean), torch.zeros(4).long())
        another.accelerator.backward(denoising_losses(another.model, batch).mean())
        optimizer.step()
    optimizer.state_dict()
    if often:
        wait_until(lambda: len(_steps(tmp_path)) > 2)
    assert _steps(tmp_path) == dict.fromkeys(range(2 + len(another.loader)), 4)
    another.hook.close()


def test_a_plain_loop_carries_its_state_in_its_own_checkpoint(tmp_path: Path) -> None:
    def sit(state: Any, steps: int) -> Any:
        model = TinyDenoiser()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        hook = TorchHook(tmp_path / "log", model, optimizer, strict=True, projection_dim=16)
        if state is not None:
            hook.load_state_dict(state)
        for step in range(steps):
            clean = identified()[:2]
            with hook.step(sample_ids=["a", "b"]):
                batch = (clean, torch.randn_like(clean), torch.tensor([5, 10 * step]))
                denoising_losses(model, batch).mean().backward()
            optimizer.step()
        saved = hook.state_dict()
        hook.close()
        return saved

    assert sit(sit(None, 2), 3)["step"] == 5
    assert _steps(tmp_path) == dict.fromkeys(range(5), 2)
    assert sorted(diffhook.open_log(tmp_path / "log").names().values()) == ["a", "b"]
