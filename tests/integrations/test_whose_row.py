"""Whose row it is, in loops whose loaders do more than stack: every logged row is checked by its picture."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from diffhook import Alerts, Quarantine
from diffhook.integrations.accelerate import DiffHook
from diffhook.log.samples import name_id
from tests.integrations.watched_ids import Watched
from tests.runs import TinyDenoiser, denoising_losses, identified

COUNT = 12
Collate = Callable[[list[Any]], Any]


class Pictures(Dataset[Any]):
    """Pictures of random lengths besides; some may be corrupt."""

    def __init__(self, corrupt: tuple[int, ...] = ()) -> None:
        self.images, self.corrupt = identified(COUNT), corrupt

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Any:
        if index in self.corrupt:
            return None
        return {"image": self.images[index], "length": index * 5 % COUNT}


def _sorted_in_place(items: list[Any]) -> Any:
    items.sort(key=lambda item: -item["length"])
    return default_collate(items)


def _shuffled(items: list[Any]) -> Any:
    return default_collate(random.sample(items, len(items)))


def _without_bad(items: list[Any]) -> Any:
    return default_collate([item for item in items if item is not None])


def _refilled(items: list[Any]) -> Any:
    good = [item for item in items if item is not None]
    return default_collate([random.choice(good) if item is None else item for item in items])


COLLATIONS: dict[str, tuple[Collate, tuple[int, ...]]] = {
    "sorted in place": (_sorted_in_place, ()),
    "sorted": (lambda items: default_collate(sorted(items, key=lambda item: item["length"])), ()),
    "shuffled": (_shuffled, ()),
    "flipped": (lambda items: default_collate(items[::-1]), ()),
    "dropped": (_without_bad, (2, 7)),
    "refilled": (_refilled, (2, 7)),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", COLLATIONS)
def test_rows_follow_what_the_collation_does_to_its_items(tmp_path: Path, kind: str, workers: int) -> None:
    collate, corrupt = COLLATIONS[kind]
    if workers and kind not in ("shuffled", "dropped"):
        workers = 1
    loop = Watched(tmp_path / "log")
    data = DataLoader(Pictures(corrupt), 4, shuffle=True, collate_fn=collate, num_workers=workers)
    loader = loop.prepare(data)
    loop.epoch(loader).epoch(loader)
    assert loop.end() == loop.seen
    assert len(loop.seen) >= 2 * (COUNT - 2)


def test_rows_that_are_not_recognised_are_left_out_and_the_reason_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def augmented(items: list[Any]) -> Any:
        return {"image": torch.stack([item["image"] + torch.rand(1, 8, 8) for item in items])}

    loop = Watched(tmp_path / "log")
    loader = loop.prepare(DataLoader(Pictures(), 4, collate_fn=augmented))
    loop.epoch(loader).epoch(loader).accelerator.end_training()
    assert caplog.text.count("not recognised as the items that were collated") == 1
    assert "sample_ids=function" in caplog.text
    assert "captured nothing: every micro-batch was left out (6 unordered)" in caplog.text


class InItsOwnOrder(Pictures):
    """Fetches a batch at once, in the order of its file."""

    def __init__(self, order: Callable[[list[int]], list[int]], noise: bool = False) -> None:
        super().__init__()
        self.order, self.noise, self.calls = order, noise, 0
        self.rng = np.random.default_rng(0)

    def __getitem__(self, index: int) -> Any:
        self.calls += 1
        item = super().__getitem__(index)
        if self.noise:
            drawn = torch.rand(1, 8, 8) + float(np.random.rand()) + random.random() + float(self.rng.random())
            drawn[0, 0, 0] = 0
            item["image"] = item["image"] + 0.01 * drawn
        return item

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in self.order(indices)]


ORDERS: dict[str, Callable[[list[int]], list[int]]] = {
    "as asked": list,
    "sorted": sorted,
    "reversed": lambda indices: indices[::-1],
    "without the fifth": lambda indices: [index for index in indices if index != 5],
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_dataset_that_fetches_in_its_own_order_is_followed(
    tmp_path: Path, order: str, shuffle: bool
) -> None:
    loop = Watched(tmp_path / "log")
    loader = loop.prepare(DataLoader(InItsOwnOrder(ORDERS[order]), 4, shuffle=shuffle))
    for _ in range(4):
        loop.epoch(loader)
    assert loop.end() == loop.seen


def test_finding_the_order_out_changes_no_batch_and_no_random_number() -> None:
    def batches(watched: Path | None) -> list[Any]:
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        accelerator = Accelerator(cpu=True)
        if watched is not None:
            DiffHook(accelerator, watched, strict=True)
        data = InItsOwnOrder(list, noise=True)
        found = [batch["image"] for batch in accelerator.prepare(DataLoader(data, 4, shuffle=True))]
        end = (torch.rand(1), np.random.rand(), random.random(), data.rng.random(), data.calls)
        accelerator.end_training()
        return [*found, *end]

    for plain, watched in zip(batches(None), batches(Path("unused")), strict=True):
        assert torch.equal(torch.as_tensor(plain), torch.as_tensor(watched))


# ── several datasets ──────────────────────────────────────────────────────────────────────────────


class Folder(TensorDataset):
    def __init__(self, images: Tensor, root: str) -> None:
        super().__init__(images)
        self.root = root


def _first(batch: Any) -> Tensor:
    return batch[0]  # type: ignore[no-any-return]


def test_each_dataset_has_ids_of_its_own(tmp_path: Path) -> None:
    data = [TensorDataset(identified()), Folder(identified(), "/x/train/128px/"), TensorDataset(identified())]
    loop = Watched(tmp_path / "log")
    first, second = loop.prepare(*(DataLoader(d, 4, shuffle=True) for d in data[:2]))
    loop.epoch(second, _first).epoch(first, _first)
    third = loop.prepare(DataLoader(data[2], 4, shuffle=True))
    again = loop.prepare(DataLoader(data[0], 6, shuffle=True))
    loop.epoch(third, _first).epoch(again, _first)
    labels = ["128px/{}"] * 12 + [""] * 12 + ["dataset-3/{}"] * 12 + [""] * 12
    expected = [label.format(i) or i for label, i in zip(labels, loop.seen, strict=True)]
    assert loop.end() == expected


def test_of_datasets_prepared_before_the_first_batch_the_shuffled_one_is_called_by_index(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loop = Watched(tmp_path / "log")
    validation = loop.prepare(DataLoader(TensorDataset(identified()[:4]), 4))
    training = loop.prepare(DataLoader(TensorDataset(identified()), 4, shuffle=True))
    loop.epoch(validation, _first).epoch(training, _first)
    assert loop.end() == [f"dataset-2/{i}" for i in range(4)] + loop.seen[4:]
    assert " 12 rows, " in capsys.readouterr().out, "the plan is of the epochs of training"


def test_a_quarantined_sample_is_left_out_of_the_dataset_that_it_is_in(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    alerts = Alerts(quarantine=Quarantine(kinds=()))
    hook = DiffHook(accelerator, tmp_path / "log", projection_dim=0, strict=True, alerts=alerts)
    model = TinyDenoiser()
    first, second = (DataLoader(TensorDataset(identified()), 4, shuffle=True) for _ in range(2))
    model, first, second = accelerator.prepare(model, first, second)
    for _ in range(2):
        seen: list[list[int]] = []
        for loader in (first, second):
            seen.append([])
            for (clean,) in loader:
                seen[-1] += (clean[:, 0, 0, 0] * 16).round().int().tolist()
                triple = (clean, torch.randn_like(clean), torch.full((len(clean),), 100))
                accelerator.backward(denoising_losses(model, triple).mean())
        hook.quarantine.add([3, name_id("dataset-2/5")])
    accelerator.end_training()
    assert set(range(12)) - set(seen[0]) == {3}
    assert set(range(12)) - set(seen[1]) == {5}


# ── what the user says ────────────────────────────────────────────────────────────────────────────


def test_repeats_of_an_image_are_one_sample_where_a_function_of_the_indices_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Repeated(Pictures):
        def __len__(self) -> int:
            return 3 * COUNT

        def __getitem__(self, index: int) -> Any:
            return super().__getitem__(index % COUNT)

    loop = Watched(tmp_path / "log", sample_ids=lambda batch, indices: [f"{i % COUNT}.png" for i in indices])
    loader = loop.prepare(DataLoader(Repeated(), 4, shuffle=True, collate_fn=_sorted_in_place))
    loop.epoch(loader)
    found = loop.end()
    left_out = len(loop.seen) - len(found)
    assert left_out % 4 == 0
    assert left_out <= 8, "only batches of equal pictures before the order was known"
    seen = iter(f"{index}.png" for index in loop.seen)
    assert all(name in seen for name in found), "what was logged is what was seen, in order"
    assert "the same id" not in caplog.text


@pytest.mark.parametrize("batch", ["dict", "tuple"])
def test_a_key_that_no_batch_has_is_told_at_the_first_batch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, batch: str
) -> None:
    data: Any = Pictures() if batch == "dict" else TensorDataset(identified())
    loop = Watched(tmp_path / "log", sample_ids="lenght")
    loader = loop.prepare(DataLoader(data, 4))
    for found in loader:
        loop.step(found["image" if batch == "dict" else 0])
        break
    told = caplog.text
    loop.epoch(loader, lambda b: b["image"] if batch == "dict" else b[0]).accelerator.end_training()
    if batch == "dict":
        assert "no key 'lenght' (sample_ids); it has 'image', 'length'. Did you mean 'length'?" in told
    else:
        assert "sample_ids='lenght' is a key, but the batch is a list" in told
    assert caplog.text.count("(sample_ids)" if batch == "dict" else "is a key, but") <= 2


# ── loops that fetch ahead, and ends ──────────────────────────────────────────────────────────────


SCRIPT = """
import sys, torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset
from diffhook.integrations.accelerate import DiffHook
accelerator = Accelerator(cpu=True)
hook = DiffHook(accelerator, sys.argv[1])
loader = accelerator.prepare(DataLoader(TensorDataset(torch.rand(12, 1, 8, 8)), 4))
it = iter(loader)
next(it)
"""


def test_an_iterator_that_lives_until_the_interpreter_exits_prints_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "log")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert "Exception ignored" not in done.stderr
    assert "TypeError" not in done.stderr
