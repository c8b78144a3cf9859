"""Batches that hold several rows of a sample: frames, views, the class images of prior preservation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import diffhook
from diffhook.capture.loop.identity.matching import Items
from diffhook.integrations.accelerate import DiffHook
from diffhook.log.samples import ROLE_STRIDE, split_id
from tests.runs import TinyDenoiser, denoising_losses, identified
from tests.twins import sample_gradients

FRAMES = 3


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_prior_preservation_keeps_the_role_of_either_half(tmp_path: Path, weight: float) -> None:
    """B instance images and their B class images in one batch; the loss adds both means."""
    data, other = identified(), identified() + 3
    accelerator = Accelerator(cpu=True)
    DiffHook(accelerator, tmp_path / "log", strict=True, projection_dim="full")
    model = TinyDenoiser()
    twin = TinyDenoiser()
    twin.load_state_dict(model.state_dict())
    loader = DataLoader(
        [{"image": data[i], "class": other[i], "timestep": 50 * i} for i in range(4)],  # type: ignore[arg-type]
        2,
        collate_fn=lambda items: {
            "pixels": torch.stack([i["image"] for i in items] + [i["class"] for i in items]),
            "timesteps": torch.tensor([i["timestep"] for i in items] * 2),
        },
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    expected, losses_of = {}, {}
    for number, batch in enumerate(loader):
        triple = (batch["pixels"], torch.ones_like(batch["pixels"]), batch["timesteps"])
        instance, prior = denoising_losses(model, triple).chunk(2)
        accelerator.backward(instance.mean() + weight * prior.mean())
        optimizer.step()
        for row, gradient in enumerate(sample_gradients(twin, denoising_losses, triple)):
            sample, role = 2 * number + row % 2, row // 2
            expected[sample, role] = gradient * (weight if role else 1.0)
            losses_of[sample, role] = (prior if role else instance)[row % 2].item()
    accelerator.end_training()
    table = diffhook.open_log(tmp_path / "log").train
    assert len(table) == 8
    for row, sample in enumerate(table["sample"].tolist()):
        key = split_id(sample)
        assert table["role"][row] == key[1]
        norm = float(expected[key].norm())
        np.testing.assert_allclose(table["grad_norm"][row], norm, rtol=1e-5)
        assert table["timestep"][row] == 50 * key[0]
        if weight == 1.0:
            np.testing.assert_allclose(table["loss"][row], losses_of[key], rtol=1e-4)
    np.testing.assert_allclose(table["weight"], 1 / 2, rtol=1e-6)


class Folding:
    """A loop that trains on every frame of its samples as a row: (b f) c h w."""

    def __init__(self, log: Path, size: int = 4, **options: Any) -> None:
        torch.manual_seed(0)
        videos = identified(8)[:, None] + 0.01 * torch.randn(8, FRAMES, 1, 8, 8)
        self.accelerator = Accelerator(cpu=True)
        self.hook = DiffHook(self.accelerator, log, strict=True, projection_dim=0, alerts=(), **options)
        model = TinyDenoiser()
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        loader = DataLoader(TensorDataset(videos), size, shuffle=True)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, optimizer, loader)

    def step(self, frames: Tensor) -> Tensor:
        """Returns the norms of the rows' gradients."""
        triple = (frames, torch.randn_like(frames), torch.randint(0, 1000, (len(frames),)))
        self.accelerator.backward(denoising_losses(self.model, triple).mean())
        self.optimizer.step()
        self.optimizer.zero_grad()
        plain = TinyDenoiser()
        plain.load_state_dict(self.model.state_dict())
        return sample_gradients(plain, denoising_losses, triple).norm(dim=1)

    def end(self, log: Path) -> Any:
        self.accelerator.end_training()
        return diffhook.open_log(log).train


def _indices(videos: Tensor) -> Tensor:
    return (videos[:, 0, 0, 0, 0] * 16).round().long()


def test_rows_that_a_batch_is_folded_into_are_their_samples(tmp_path: Path) -> None:
    loop = Folding(tmp_path / "log")
    samples: list[int] = []
    for (videos,) in loop.loader:
        samples += _indices(videos).repeat_interleave(FRAMES).tolist()
        loop.step(videos.flatten(0, 1))
    assert loop.end(tmp_path / "log")["sample"].tolist() == samples


def test_rows_whose_order_is_not_known_are_not_captured_and_it_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loop = Folding(tmp_path / "log")
    for (videos,) in loop.loader:
        loop.step(videos.transpose(0, 1).flatten(0, 1))
    assert len(loop.end(tmp_path / "log")) == 0
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert told[0].startswith("what the model is called on was not made of a batch of the loader")


@pytest.mark.parametrize("frames_first", [False, True], ids=["(b f)", "(f b)"])
def test_rows_named_one_by_one_are_their_samples(tmp_path: Path, frames_first: bool) -> None:
    loop = Folding(tmp_path / "log")
    samples, norms = [], []
    for (videos,) in loop.loader:
        ids = _indices(videos)
        rows = ids.repeat(FRAMES) if frames_first else ids.repeat_interleave(FRAMES)
        samples += rows.tolist()
        with loop.hook.step(sample_ids=rows):
            frames = (videos.transpose(0, 1) if frames_first else videos).flatten(0, 1)
            norms.append(loop.step(frames))
    table = loop.end(tmp_path / "log")
    assert table["sample"].tolist() == samples
    np.testing.assert_allclose(table["grad_norm"], torch.cat(norms), rtol=1e-5)
    np.testing.assert_allclose(table["weight"], 1 / 12, rtol=1e-6)
    assert np.isfinite(table["loss"]).all()
    assert set(table["role"]) == {0}


def test_a_batch_of_one_sample_has_rows_of_no_other(tmp_path: Path) -> None:
    loop, seen = Folding(tmp_path / "log", size=1), []
    for (videos,) in loop.loader:
        seen += _indices(videos).repeat(FRAMES).tolist()
        loop.step(videos.flatten(0, 1))
    table = loop.end(tmp_path / "log")
    assert table["sample"].tolist() == seen
    np.testing.assert_allclose(table["weight"], 1 / FRAMES, rtol=1e-6)


def test_a_sum_of_means_over_named_rows_is_told_by_the_loss(tmp_path: Path) -> None:
    loop = Folding(tmp_path / "log")
    (videos,) = next(iter(loop.loader))
    ids = _indices(videos)
    frames = videos[:, :2].transpose(0, 1).flatten(0, 1)
    triple = (frames, torch.randn_like(frames), torch.randint(0, 1000, (len(frames),)))
    with loop.hook.step(sample_ids=ids.repeat(2)):
        first, second = denoising_losses(loop.model, triple).chunk(2)
        loop.accelerator.backward(first.mean() + second.mean())
    norms = sample_gradients(loop.accelerator.unwrap_model(loop.model), denoising_losses, triple).norm(dim=1)
    table = loop.end(tmp_path / "log")
    np.testing.assert_allclose(table["grad_norm"], norms, rtol=1e-5)
    np.testing.assert_allclose(table["weight"], 1 / 4, rtol=1e-6)


def _pair(number: float) -> dict[str, Tensor]:
    return {"image": torch.full((1, 2, 2), number), "class": torch.full((1, 2, 2), 10 + number)}


def _views(number: float) -> dict[str, Tensor]:
    return {"views": number + 0.1 * torch.arange(2.0)[:, None, None, None].expand(2, 1, 2, 2)}


ITEMS = [_pair(0), _pair(1), _pair(2)]
COLLATIONS = {
    "block after block": (ITEMS, [i["image"] for i in ITEMS] + [i["class"] for i in ITEMS], "0 1 2 0c 1c 2c"),
    "sample after sample": (ITEMS, [x for i in ITEMS for x in (i["image"], i["class"])], "0 0c 1 1c 2 2c"),
    "views": ([_views(0), _views(1)], [*_views(0)["views"], *_views(1)["views"]], "ready-made-batch"),
    "one row each": (ITEMS, [i["image"] for i in ITEMS], "0 1 2"),
    "equal rows": ([_pair(5)] * 2, [x for _ in range(2) for x in (_pair(5)["image"],) * 2], "ambiguous"),
    "in another order": (
        ITEMS,
        [i["image"] for i in ITEMS] + [i["class"] for i in reversed(ITEMS)],
        "0 1 2 2c 1c 0c",
    ),
    "one sample": (ITEMS[:1], [ITEMS[0]["image"], ITEMS[0]["class"]], "0 0c"),
}


@pytest.mark.parametrize("kind", COLLATIONS)
def test_every_row_is_the_item_whose_value_it_holds_in_the_role_of_that_value(kind: str) -> None:
    items, rows, expected = COLLATIONS[kind]
    for batch in ({"caption": ["a"], "pixels": torch.stack(rows)}, torch.stack(rows).double()):
        match = Items(items).match(batch)
        words = (
            []
            if match.rows is None
            else [f"{r % ROLE_STRIDE}{'c' * (r // ROLE_STRIDE)}" for r in match.rows.tolist()]
        )
        assert (" ".join(words) or match.kind) == expected


def test_the_class_rows_of_samples_with_names_have_their_role(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    DiffHook(accelerator, tmp_path / "log", strict=True, projection_dim=0)
    images = identified()
    loader: Any = DataLoader(
        [{"image": images[i], "class": images[i] + 3} for i in range(4)],  # type: ignore[arg-type]
        2,
        collate_fn=lambda items: {
            "pixels": torch.stack([i["image"] for i in items] + [i["class"] for i in items]),
            "ids": [100 + round(float(i["image"][0, 0, 0]) * 16) for i in items],
        },
    )
    model, loader = accelerator.prepare(TinyDenoiser(), loader)
    for batch in loader:
        triple = (batch["pixels"], torch.ones_like(batch["pixels"]), torch.arange(4))
        accelerator.backward(denoising_losses(model, triple).mean())
    accelerator.end_training()
    found = diffhook.open_log(tmp_path / "log").train["sample"].tolist()
    assert found == [
        100,
        101,
        ROLE_STRIDE + 100,
        ROLE_STRIDE + 101,
        102,
        103,
        ROLE_STRIDE + 102,
        ROLE_STRIDE + 103,
    ]
