"""Whose row it is: ids through every kind of loader and batch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

import diffhook
from diffhook.capture import Alert, Detector
from diffhook.capture.alerts.alert import about_row
from diffhook.errors import ConfigurationError
from diffhook.integrations.accelerate import DiffHook
from diffhook.log import Rows
from diffhook.log.samples import name_id
from tests.runs import SCHEDULER, TinyDenoiser, denoising_losses, identified


class Loop:
    """A loop over any loader whose batches hold images somewhere."""

    def __init__(self, log: Path, loader: Any, accelerator: Any = None, **options: Any) -> None:
        torch.manual_seed(0)
        self.accelerator = accelerator or Accelerator(cpu=True)
        self.hook = DiffHook(self.accelerator, log, strict=True, projection_dim=0, **options)
        model = TinyDenoiser()
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, optimizer, loader)
        self.seen: list[int] = []

    def run(self, loader: Any = None) -> Loop:
        for batch in self.loader if loader is None else loader:
            clean = batch["image"] if isinstance(batch, Mapping) else batch[0]
            self.seen += (clean[:, 0, 0, 0] * 16).round().int().tolist()
            timesteps = torch.full((len(clean),), 100)
            loss = denoising_losses(self.model, (clean, torch.randn_like(clean), timesteps)).mean()
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def end(self, log: Path) -> list[int]:
        self.accelerator.end_training()
        found: list[int] = diffhook.open_log(log).train["sample"].tolist()
        return found


class Dicts(Dataset[Any]):
    """Items with an id of their own under some key."""

    def __init__(self, key: str, ids: Any) -> None:
        self.key, self.ids = key, ids

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": identified()[index], self.key: self.ids(index)}


class Stream(IterableDataset[Any]):
    def __init__(self, key: str, ids: Any) -> None:
        self.items = Dicts(key, ids)

    def __iter__(self) -> Any:
        return (self.items[index] for index in range(12))


@pytest.mark.parametrize("key", ["indices", "ids", "index", "sample_id"])
def test_numbers_in_the_batch_name_its_samples(tmp_path: Path, key: str) -> None:
    loop = Loop(tmp_path / "log", DataLoader(Dicts(key, lambda i: 1000 + i), 4, shuffle=True)).run()
    assert loop.end(tmp_path / "log") == [1000 + i for i in loop.seen]


@pytest.mark.parametrize("key", ["filenames", "path", "__key__"])
def test_strings_in_the_batch_get_stable_ids_and_their_names_are_kept(tmp_path: Path, key: str) -> None:
    loop = Loop(tmp_path / "log", DataLoader(Dicts(key, lambda i: f"a/{i}.png"), 4, shuffle=True)).run()
    names = [f"a/{i}.png" for i in loop.seen]
    assert loop.end(tmp_path / "log") == [name_id(name) for name in names]
    assert diffhook.open_log(tmp_path / "log").names() == {name_id(name): name for name in names}


def test_alerts_call_samples_by_their_names(tmp_path: Path) -> None:
    class Every(Detector):
        kind = "every"

        def look(self, rows: Rows) -> Iterator[Alert]:
            yield about_row(self.kind, rows, 0, 1.0, 0.0, f"{self.who(rows['sample'][0])} was seen")

    names = [os.fsdecode(b"caf\xe9-%d.png" % i) for i in range(12)]
    data = DataLoader(Dicts("path", names.__getitem__), 4)
    Loop(tmp_path / "log", data, alerts=[Every()]).run().end(tmp_path / "log")
    found = [alert["message"] for alert in diffhook.open_log(tmp_path / "log").alerts()]
    assert found == [f"sample caf\ufffd-{i}.png was seen" for i in (0, 4, 8)]


def test_file_names_that_are_no_utf_8_are_names(tmp_path: Path) -> None:
    names = [os.fsdecode(b"caf\xe9-%d.png" % i) for i in range(11)] + ["\ud800"]
    loop = Loop(tmp_path / "log", DataLoader(Dicts("path", names.__getitem__), 4)).run()
    assert loop.end(tmp_path / "log") == [name_id(name) for name in names]
    assert len(set(map(name_id, names))) == 12
    assert sorted(diffhook.open_log(tmp_path / "log").names().values()) == sorted(names)
    for file in (tmp_path / "log/names").iterdir():
        json.loads(file.read_bytes().decode("utf-8"))


def test_names_survive_a_second_run_that_sees_others(tmp_path: Path) -> None:
    for start in (0, 6):
        loader = DataLoader(Dicts("path", str), 3, sampler=range(start, start + 6))
        Loop(tmp_path / "log", loader).run().end(tmp_path / "log")
    assert sorted(diffhook.open_log(tmp_path / "log").names().values()) == sorted(map(str, range(12)))


def test_a_key_of_the_users_own_or_a_function_names_samples(tmp_path: Path) -> None:
    loader = DataLoader(Dicts("record", lambda i: 500 + i), 4)
    assert Loop(tmp_path / "a", loader, sample_ids="record").run().end(tmp_path / "a")[0] == 500
    ids = lambda batch: (batch["image"][:, 0, 0, 0] * 16).round().long() + 7  # noqa: E731
    assert Loop(tmp_path / "b", loader, sample_ids=ids).run().end(tmp_path / "b")[:2] == [7, 8]


def test_sample_ids_false_is_the_dataset_index_whatever_the_batch_holds(tmp_path: Path) -> None:
    loader = DataLoader(Dicts("index", lambda i: 0), 4)  # a class index, say
    loop = Loop(tmp_path / "log", loader, sample_ids=False).run()
    assert loop.end(tmp_path / "log") == list(range(12))


@pytest.mark.parametrize("value", [0.5, -1, [1, 2]], ids=str)
def test_what_is_no_id_under_a_well_known_key_is_passed_over(tmp_path: Path, value: Any) -> None:
    loader = DataLoader(Dicts("ids", lambda i: torch.tensor(value)), 4)
    assert Loop(tmp_path / "log", loader).run().end(tmp_path / "log") == list(range(12))


@pytest.mark.parametrize(
    ("key", "of"), [("index", lambda i: i % 3), ("filename", lambda i: "")], ids=["classes", "empty names"]
)
def test_samples_that_share_an_id_are_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, key: str, of: Any
) -> None:
    Loop(tmp_path / "log", DataLoader(Dicts(key, of), 4)).run().run().end(tmp_path / "log")
    (told,) = [r.getMessage() for r in caplog.records if "the same id" in r.getMessage()]
    assert f"(batch['{key}'])" in told
    assert "sample_ids=False" in told


def test_a_sample_seen_twice_in_a_batch_shares_its_id_with_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loader = DataLoader(Dicts("path", str), 4, sampler=[0, 1, 1, 2])
    Loop(tmp_path / "log", loader).run().end(tmp_path / "log")
    assert "the same id" not in caplog.text


def _mixed(items: list[Any]) -> dict[str, Any]:
    names = [item["path"] for item in items]
    return {"image": torch.stack([i["image"] for i in items])} | ({} if None in names else {"path": names})


@pytest.mark.parametrize("asked", [None, "path"], ids=["well-known", "asked for"])
def test_a_batch_whose_names_are_none_is_left_out_and_not_logged_by_its_indices(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, asked: Any
) -> None:
    data = Dicts("path", lambda i: None if i in (5, 6) else f"{i}.png")
    loop = Loop(tmp_path / "log", DataLoader(data, 3, collate_fn=_mixed), sample_ids=asked).run()
    assert loop.end(tmp_path / "log") == [name_id(f"{i}.png") for i in (0, 1, 2, 9, 10, 11)]
    assert caplog.text.count("where earlier batches had ids") == 1


def test_a_run_that_begins_by_index_stays_there(tmp_path: Path) -> None:
    data = Dicts("path", lambda i: None if i == 0 else f"{i}.png")
    loop = Loop(tmp_path / "log", DataLoader(data, 4, collate_fn=_mixed)).run()
    assert loop.end(tmp_path / "log") == list(range(12))


def test_another_dataset_has_ids_of_its_own_kind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop(tmp_path / "log", DataLoader(Dicts("path", str), 4))
    validation = loop.accelerator.prepare(DataLoader(TensorDataset(identified()), 4))
    for _ in range(2):
        loop.run()
        with torch.no_grad():
            for (clean,) in validation:
                denoising_losses(loop.model, (clean, clean, torch.zeros(len(clean), dtype=torch.long)))
    assert loop.end(tmp_path / "log") == [name_id(str(i)) for i in range(12)] * 2
    assert not caplog.records


def test_what_is_no_id_under_a_key_that_was_asked_for_is_an_error(tmp_path: Path) -> None:
    loop = Loop(tmp_path / "log", DataLoader(Dicts("ids", float), 4), sample_ids="ids")
    with pytest.raises(ConfigurationError, match=r"batch\['ids'\] is a tensor of .* torch.float"):
        loop.run()


@pytest.mark.parametrize("dispatch", [False, True], ids=["own", "dispatched"])
@pytest.mark.parametrize("dropped", [False, True], ids=["in the batch", "dropped by collation"])
def test_a_stream_with_a_key_names_its_samples(tmp_path: Path, dispatch: bool, dropped: bool) -> None:
    def collate(items: list[Any]) -> Any:
        return {"image": torch.stack([item["image"] for item in items])}

    stream: Any = Stream("id", lambda i: 70 + i)
    loader: Any = DataLoader(stream, 4, collate_fn=collate) if dropped else DataLoader(stream, 4)
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=dispatch))
    loop = Loop(tmp_path / "log", loader, accelerator).run()
    assert loop.end(tmp_path / "log") == list(range(70, 82))


def _transform(columns: dict[str, list[Any]]) -> dict[str, list[Tensor]]:
    return {"image": [identified()[row] for row in columns["row"]]}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_hugging_face_dataset_with_a_transform_keeps_its_indices(tmp_path: Path, workers: int) -> None:
    """As training scripts have it: columns are fetched and transformed batch by batch."""
    rows = datasets.Dataset.from_dict({"row": list(range(12))}).with_transform(_transform)
    loader: Any = DataLoader(rows, 4, shuffle=True, num_workers=workers)  # type: ignore[arg-type]
    loop = Loop(tmp_path / "log", loader).run()
    assert loop.end(tmp_path / "log") == loop.seen
    assert sorted(loop.seen) == list(range(12))


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(identified())


def test_a_stream_without_a_length_may_be_prepared_first(tmp_path: Path) -> None:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    DiffHook(accelerator, tmp_path / "log", strict=True, projection_dim=0)
    loaders = accelerator.prepare(DataLoader(Endless(), 4), DataLoader(TensorDataset(identified()), 4))
    assert len(loaders) == 2
    accelerator.end_training()


def test_of_batches_of_two_loaders_the_one_that_the_model_is_called_on_is_logged(tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(identified()), 4, shuffle=True)
    loop = Loop(tmp_path / "log", loader)
    other = loop.accelerator.prepare(DataLoader(TensorDataset(identified()), 4, shuffle=True))
    loop.run(both[0] for both in zip(loop.loader, other, strict=True))
    with torch.no_grad():
        for (clean,) in other:  # a validation
            denoising_losses(loop.model, (clean, clean, torch.zeros(len(clean), dtype=torch.long)))
    loop.run()
    assert loop.end(tmp_path / "log") == loop.seen
    assert sorted(loop.seen) == sorted([*range(12), *range(12)])


def test_batches_skipped_by_accelerate_are_not_mistaken(tmp_path: Path) -> None:
    loop = Loop(tmp_path / "log", DataLoader(TensorDataset(identified()), 4, shuffle=True))
    loop.run(skip_first_batches(loop.loader, 1)).run()
    assert len(loop.seen) == 8 + 12
    assert loop.end(tmp_path / "log") == loop.seen


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
def test_an_epoch_that_a_stateful_loader_goes_on_with_keeps_its_samples(
    tmp_path: Path, kind: Any, workers: int
) -> None:
    def sitting() -> Loop:
        settings = DataLoaderConfiguration(use_stateful_dataloader=True)
        accelerator = Accelerator(cpu=True, dataloader_config=settings)
        shuffle = kind is StatefulDataLoader  # whose sampler keeps its state; torch's own does not
        loader = kind(TensorDataset(identified()), 4, shuffle=shuffle, num_workers=workers)
        return Loop(tmp_path / "log", loader, accelerator)

    before = sitting()
    for batch in before.loader:
        before.run([batch])
        break
    before.accelerator.save_state(str(tmp_path / "state"))
    assert before.end(tmp_path / "log") == before.seen
    after = sitting()
    after.accelerator.load_state(str(tmp_path / "state"))
    found = after.run().end(tmp_path / "log")
    assert found == before.seen + after.seen
    assert sorted(found) == list(range(12)), "the epoch was gone on with, not begun anew"


def test_probes_have_the_ids_that_the_batches_have(tmp_path: Path) -> None:
    def inputs(batch: Any) -> Any:
        return batch["image"], {}

    objective = diffhook.DiffusionObjective(SCHEDULER, inputs)
    loader = DataLoader(Dicts("path", str), 4)
    probe = diffhook.Probe(3, diffhook.Grid(1))
    Loop(tmp_path / "log", loader, objective=objective, probe=probe).run().end(tmp_path / "log")
    log = diffhook.open_log(tmp_path / "log")
    assert sorted({log.names()[i] for i in log.probe["sample"].tolist()}, key=int) == ["0", "6", "11"]
