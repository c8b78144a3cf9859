"""Another dataset of equal length under the same log is found out by what its samples look like."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from diffhook.capture.samples.familiarity import Familiarity
from diffhook.errors import LogError
from diffhook.integrations.accelerate import DiffHook
from diffhook.log import open_log
from tests.runs import TinyDenoiser, denoising_losses, identified, train

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


class Named(torch.utils.data.Dataset[dict[str, Any]]):
    """Twelve images that are called something, or nothing."""

    def __init__(self, name: str | None) -> None:
        self._name = name

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = {"image": identified()[index]}
        return image if self._name is None else {**image, "file_name": self._name.format(index)}


def train_named(log: Path, name: str | None, steps: int = 6, other: str | None = None) -> None:
    """Of batches of four, with a second dataset beside it perhaps."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    hook = DiffHook(accelerator, log, projection_dim=0)
    model = TinyDenoiser()
    loaders = [DataLoader(Named(n), 4, shuffle=True) for n in ([name] if other is None else [name, other])]
    model, optimizer, *loaders = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), 0.01), *loaders
    )
    for _, batch in zip(range(steps), itertools.cycle(itertools.chain(*loaders))):
        clean, timesteps = batch["image"], torch.full((4,), 100)
        accelerator.backward(denoising_losses(model, (clean, torch.randn_like(clean), timesteps)).mean())
        optimizer.step()
        optimizer.zero_grad()
    accelerator.end_training()
    assert hook.closed


def test_samples_of_other_names_are_another_dataset_however_they_look(tmp_path: Path) -> None:
    """As many, of the same class, with the same pixels."""
    train_named(tmp_path / "log", "cats/{}.png")
    before = open_log(tmp_path / "log").train["sample"].tolist()
    with pytest.raises(
        LogError, match=r"another dataset of 12 samples: it has 'cats/.*, this run has 'dogs/"
    ):
        train_named(tmp_path / "log", "dogs/{}.png")
    assert open_log(tmp_path / "log").train["sample"].tolist() == before
    assert {name[:4] for name in open_log(tmp_path / "log").names().values()} == {"cats"}
    train_named(tmp_path / "log", "cats/{}.png")
    assert len(open_log(tmp_path / "log").sessions) == 2


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        (None, "cats/{}.png", r"by position, without names, and .* by name \('cats/.*\(sample_ids=False\)"),
        ("cats/{}.png", None, r"by name \('cats/.*, and .* by position, without names: .*\(sample_ids=\)"),
    ],
)
def test_names_where_there_were_none_are_told_as_such(
    before: str | None, now: str | None, told: str, tmp_path: Path
) -> None:
    train_named(tmp_path / "log", before)
    with pytest.raises(LogError, match=told) as raised:
        train_named(tmp_path / "log", now)
    assert "another dataset" not in str(raised.value)


def test_a_log_that_has_seen_a_part_is_another_datasets_once_there_are_too_many_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train_named(tmp_path / "log", "cats/{}.png", steps=2)
    train_named(tmp_path / "log", "dogs/{}.png")
    assert "training goes on. LogError: the log at" in caplog.text
    assert "this run has 'dogs/" in caplog.text


def test_samples_of_several_datasets_may_come_one_after_the_other(tmp_path: Path) -> None:
    for steps in (3, 6):
        train_named(tmp_path / "log", "cats/{}.png", steps, other="dogs/{}.png")
    assert len(open_log(tmp_path / "log").names()) == 24


def test_a_few_new_names_are_a_changed_dataset() -> None:
    names = {sample: f"{sample}.png" for sample in range(100, 108)}
    known = Familiarity(np.array(list(names)), np.full((8, 3), np.nan), "here", names, size=8)
    known.meet(np.array([100, 101, 102, 900]), {**names, 900: "new.png"})
    with pytest.raises(LogError, match=r"it has '100\.png', '101\.png', '102\.png' …, this run has 'new"):
        Familiarity(np.array(list(names)), np.full((8, 3), np.nan), "here", names, size=8).meet(
            np.array([900, 901, 902]), {900: "new0.png", 901: "new1.png", 902: "new2.png"}
        )


# ── a file was added, removed or renamed ──────────────────────────────────────────────────────────


def moved(places: np.ndarray, first: int, last: int) -> np.ndarray:
    """Item ``first`` has come after ``last``: those between are one place before."""
    return np.r_[places[:first], places[first + 1 : last + 1], places[first], places[last + 1 :]]


def see_epoch(known: Familiarity, looked: np.ndarray) -> None:
    for ids in np.split(RNG.permutation(IDS), 8):
        known.see(ids, looked[ids])


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize(("first", "last"), [(24, 63), (50, 60), (0, 63)])
def test_samples_that_stand_beside_their_place_are_refused(first: int, last: int, times: int) -> None:
    own = looks()
    known = Familiarity(*visits(own, 0.0, times), "here")
    with pytest.raises(LogError, match=r"another order: \d+ of \d+ look like others beside them .*renamed"):
        see_epoch(known, own[moved(IDS, first, last)])


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.3])
def test_samples_that_stay_where_they_are_are_not_taken_for_others(noise: float) -> None:
    """Nor where neighbours look alike, as frames of a film do."""
    own = looks()
    own[1::2] = own[::2] * 1.001
    known = Familiarity(*visits(own, noise), "here")
    for ids in np.split(RNG.permutation(IDS), 8):
        known.see(ids, own[ids] * (1 + noise * RNG.normal(size=(8, 3))))


def test_names_stay_with_their_samples_wherever_those_stand() -> None:
    own = looks()
    known = Familiarity(*visits(own, 0.0, 1), "here", names={i: f"{i}.png" for i in range(64)})
    known.see(IDS, own[moved(IDS, 24, 63)])


def test_changed_samples_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    own = looks()
    changed = own.copy()
    changed[::4] = looks()[::4]
    known = Familiarity(*visits(own, 0.0), "here")
    for ids in np.split(IDS, 8):
        known.see(ids, changed[ids])
    told = [record.message for record in caplog.records if "do not look as they did" in record.message]
    assert len(told) == 1
    assert "rows of both stand under it" in told[0]


def test_a_resume_after_a_file_was_renamed_writes_no_row(tmp_path: Path) -> None:
    """Pictures that no one has named: half of the indices mean another one."""
    images = torch.from_numpy(RNG.normal(0, 0.3, (64, 1, 1, 1)) + RNG.normal(0, 0.2, (64, 1, 4, 4))).float()
    train_on(images, tmp_path)
    before = len(open_log(tmp_path / "log").train)
    places = torch.from_numpy(moved(IDS, 24, 63))
    with pytest.raises(LogError, match="another order"):
        train_on(images[places], tmp_path, epochs=2)
    assert len(open_log(tmp_path / "log").train) == before


def train_on(images: torch.Tensor, folder: Path, epochs: int = 1) -> None:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    hook = DiffHook(accelerator, folder / "log", projection_dim=8, every=1, probe=False, strict=True)
    model, data = TinyDenoiser(), DataLoader(list(images), batch_size=4, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    if (folder / "saved").exists():
        accelerator.load_state(str(folder / "saved"))
    for _ in range(epochs):
        for clean in data:
            batch = (clean, torch.randn_like(clean), torch.randint(0, 100, (len(clean),)))
            loss = denoising_losses(model, batch).mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.save_state(str(folder / "saved"))
    accelerator.end_training()
    assert hook is not None
