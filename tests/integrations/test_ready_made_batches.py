"""Items that are batches already, as bucketed datasets make them: rows have the ids they bring, or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import diffhook
from tests.integrations.watched_ids import Watched
from tests.runs import identified


class Buckets(Dataset[Any]):
    """Each item is a batch."""

    def __init__(self, keys: str | None, nested: bool = False, sizes: tuple[int, ...] = (4,) * 6) -> None:
        self.keys, self.nested = keys, nested
        self.batches = torch.arange(24).split(sizes)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Any:
        own = self.batches[index]
        names: list[Any] = [f"{image}.png" for image in own.tolist()]
        if self.nested:
            names = [names[:2], names[2:]]
        item = {"image": identified(24)[own], "tokens": [own[:, None].expand(-1, 9).sqrt()]}
        return item | ({} if self.keys is None else {self.keys: names})


LOADERS: dict[str, dict[str, Any]] = {
    "first item": {"batch_size": 1, "collate_fn": lambda items: items[0]},
    "no batch size": {"batch_size": None},
    "by default": {"batch_size": 1},
    "concatenated": {
        "batch_size": 2,
        "collate_fn": lambda items: {
            key: torch.cat([i[key] for i in items]) if key == "image" else [i[key] for i in items]
            for key in items[0]
        },
    },
}


def _squeezed(batch: Any) -> Tensor:
    image: Tensor = batch["image"]
    return image[0] if image.dim() == 5 else image


@pytest.mark.parametrize("keys", ["image_keys", "filepaths", "item_keys", "image_paths", "filenames"])
@pytest.mark.parametrize("kind", LOADERS)
def test_the_names_in_a_ready_made_batch_are_its_rows(tmp_path: Path, kind: str, keys: str) -> None:
    loop = Watched(tmp_path / "log")
    loader = loop.prepare(DataLoader(Buckets(keys), shuffle=True, **LOADERS[kind]))
    loop.epoch(loader, _squeezed)
    found = loop.end()
    assert found == [f"{index}.png" for index in loop.seen]
    assert len(set(found)) == 24


def test_nested_names_are_flattened_in_order(tmp_path: Path) -> None:
    loop = Watched(tmp_path / "log")
    loader = loop.prepare(
        DataLoader(Buckets("image_keys", nested=True), shuffle=True, **LOADERS["first item"])
    )
    loop.epoch(loader)
    assert loop.end() == [f"{index}.png" for index in loop.seen]


RAGGED = (1, 3, 2, 4, 1, 5, 8)
"""A bucket's last batch may hold one row, and come first."""


@pytest.mark.parametrize("workers", [0, 1])
def test_buckets_of_any_size_are_logged_by_name_whichever_comes_first(tmp_path: Path, workers: int) -> None:
    loop = Watched(tmp_path / "log")
    data = Buckets("image_keys", sizes=RAGGED)
    loader = loop.prepare(DataLoader(data, num_workers=workers, **LOADERS["first item"]))
    loop.epoch(loader).epoch(loader)
    seen = [f"{index}.png" for index in loop.seen]
    assert loop.end() == seen[:1] + seen[4:], (
        "the first batch of more than one row is checked anew, and left out"
    )


def test_no_row_of_a_ready_made_batch_is_called_by_the_number_of_the_batch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not even a single one: with the next epoch it may be in another batch."""
    loop = Watched(tmp_path / "log")
    loader = loop.prepare(DataLoader(Buckets(None, sizes=RAGGED), **LOADERS["first item"]))
    loop.epoch(loader).accelerator.end_training()
    assert not (tmp_path / "log").exists()
    assert caplog.text.count("one id cannot stand for its rows") == 1


def test_one_index_never_stands_for_the_rows_that_the_model_is_called_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loop = Watched(tmp_path / "log")
    loader = loop.prepare(DataLoader(Buckets(None), **LOADERS["by default"]))
    loop.epoch(loader, _squeezed).accelerator.end_training()
    assert not len(diffhook.open_log(tmp_path / "log").train)
    assert caplog.text.count("Whose rows they are is not known") == 1


@pytest.mark.parametrize("kind", ["first item", "no batch size", "concatenated"])
def test_one_id_never_stands_for_the_rows_of_a_ready_made_batch(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    loop = Watched(tmp_path / "log")
    loader = loop.prepare(DataLoader(Buckets(None), **LOADERS[kind]))
    loop.epoch(loader).accelerator.end_training()
    assert caplog.text.count("one id cannot stand for its rows: put an id of each row into the batch") == 1


def test_one_name_never_stands_for_several_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def collate(items: list[Any]) -> Any:
        return items[0] | {"path": ["bucket.pt"]}

    loop = Watched(tmp_path / "log")
    loader = loop.prepare(DataLoader(Buckets(None), batch_size=1, collate_fn=collate))
    loop.epoch(loader).accelerator.end_training()
    assert caplog.text.count("batch['path'] has one id for 4 rows of the batch") == 1
