"""Datasets whose index stands for another sample from one epoch to the next, and items that are batches."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import diffhook
from tests.integrations.watched_ids import Watched
from tests.runs import identified

COUNT = 12


class Bucket(Dataset[Any]):
    """Makes batches itself, with token ids in a list as text encoders want them; shuffled by the loop."""

    def __init__(self, size: int, *, named: bool) -> None:
        self.order = list(range(COUNT))
        self.size, self.named = size, named

    def __len__(self) -> int:
        return COUNT // self.size

    def __getitem__(self, index: int) -> Any:
        own = self.order[index * self.size : (index + 1) * self.size]
        tokens = [torch.randint(0, 50, (self.size, 6)) for _ in range(2)]
        names = {"image_keys": [f"{i}.png" for i in own]} if self.named else {}
        return {"latents": identified(COUNT)[own], "input_ids_list": tokens, **names}


def _train(log: Path, dataset: Any, items: list[Any], epochs: int = 3, **loading: Any) -> Watched:
    loop = Watched(log)
    loader = loop.prepare(DataLoader(dataset, shuffle=True, **loading))
    for epoch in range(epochs):
        loop.epoch(loader, lambda batch: batch if isinstance(batch, Tensor) else batch["latents"])
        random.Random(epoch).shuffle(items)
    return loop


@pytest.mark.parametrize("size", [2, 4])
def test_a_ready_made_batch_has_its_names_whatever_else_it_holds(tmp_path: Path, size: int) -> None:
    dataset = Bucket(size, named=True)
    loop = _train(tmp_path / "log", dataset, dataset.order, batch_size=1, collate_fn=lambda items: items[0])
    assert loop.end() == [f"{index}.png" for index in loop.seen]


@pytest.mark.parametrize("size", [2, 4])
def test_one_id_never_stands_for_several_rows_whatever_else_a_batch_holds(
    tmp_path: Path, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = Bucket(size, named=False)
    loop = _train(tmp_path / "log", dataset, dataset.order, batch_size=1, collate_fn=lambda items: items[0])
    loop.accelerator.end_training()
    assert caplog.text.count("one id cannot stand for its rows") == 1


class Pictures(Dataset[Any]):
    def __init__(self) -> None:
        self.items = list(identified(COUNT))

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Tensor:
        return self.items[index]


class TwinsFlipped(Pictures):
    """Two are the same picture, and all are flipped at random: an index keeps its sample all the same."""

    def __getitem__(self, index: int) -> Tensor:
        image = self.items[max(index, 1)]
        return image.flip(-1) if random.random() < 0.5 else image


def test_an_index_that_stands_for_another_sample_is_no_id(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows of the first epoch have it, others are left out but for some that stayed where they were."""
    pictures = Pictures()
    loop = _train(tmp_path / "log", pictures, pictures.items, batch_size=4)
    found = loop.end()
    assert found[:COUNT] == loop.seen[:COUNT]
    assert len(found) < 2 * COUNT
    steps = diffhook.open_log(tmp_path / "log").train["step"].tolist()
    size = COUNT * 3 // loop.hook.step_count
    assert all(one in loop.seen[size * at : size * at + size] for one, at in zip(found, steps, strict=True))
    assert caplog.text.count("other samples under the same indices") == 1


def test_an_index_that_keeps_its_sample_is_an_id_though_duplicates_are_flipped(
    tmp_path: Path,
) -> None:
    loop = _train(tmp_path / "log", TwinsFlipped(), [], epochs=8, batch_size=4)
    assert len(loop.end()) >= 7 * COUNT
