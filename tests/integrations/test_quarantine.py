"""Quarantined samples stay out of the following epochs, and nothing else changes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from diffhook import Alerts, Quarantine
from diffhook.capture import Alert, Detector
from diffhook.errors import ConfigurationError, LogError
from diffhook.integrations.accelerate import DiffHook
from diffhook.log import Rows, open_log
from diffhook.log.samples import name_id
from tests.integrations.torchrun import torchrun
from tests.runs import TinyDenoiser, denoising_losses, identified, train
from tests.waiting import wait_until


class Names(Detector):
    """Accuses the given samples whenever they come by."""

    kind = "accused"

    def __init__(self, *samples: int) -> None:
        super().__init__()
        self.samples = samples

    def look(self, rows: Rows) -> Iterator[Alert]:
        for sample in np.intersect1d(rows["sample"], self.samples):
            yield Alert(self.kind, "warning", [int(sample)], int(rows["step"][0]), 0.0, 1.0, 0.0, "it was")


def accusing(*samples: int, **options: Any) -> Alerts:
    return Alerts([Names(*samples)], (), quarantine=Quarantine(["accused"], **{"share": 1.0, **options}))


def visits(log: Path) -> list[list[int]]:
    """The samples of each epoch of three steps."""
    table = open_log(log).train
    return [
        sorted(table["sample"][table["step"] // 3 == e]) for e in range(int(table["step"].max()) // 3 + 1)
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_accused_samples_are_replaced_from_the_next_epoch_on(tmp_path: Path, workers: int) -> None:
    train(tmp_path / "log", alerts=accusing(3, 8), workers=workers)
    first, *later = visits(tmp_path / "log")
    assert first == list(range(12))
    for epoch in later:
        assert len(epoch) == 12, "batches keep their number and size"
        assert set(epoch) == set(range(12)) - {3, 8}
    records = [a for a in open_log(tmp_path / "log").alerts() if a["kind"] == "quarantine"]
    assert sorted(s for r in records for s in r["samples"]) == [3, 8]
    assert "is left out from the next epoch on (accused)" in records[0]["message"]


@pytest.mark.parametrize("quarantine", [False, True, Quarantine(kinds=())], ids=["off", "on", "by-hand"])
def test_without_an_alert_training_is_bit_identical(tmp_path: Path, quarantine: Any) -> None:
    plain = train(None)
    state = torch.random.get_rng_state()
    watched = train(tmp_path / "log", alerts=Alerts((), (), quarantine=quarantine))
    assert torch.equal(torch.random.get_rng_state(), state), "random numbers were consumed"
    for before, after in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(before, after)


def loop(log: Path, epochs: int, alerts: Any, each_epoch: Any = lambda hook, epoch: None) -> list[list[int]]:
    """A loop that has its hook at hand; the samples of each epoch."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    hook = DiffHook(accelerator, log, alerts=alerts, strict=True)
    model = TinyDenoiser()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    loader = DataLoader(TensorDataset(identified()), 4, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    seen = []
    for epoch in range(epochs):
        each_epoch(hook, epoch)
        seen.append([])
        for (clean,) in skip_first_batches(loader, 1) if epoch == 0 else loader:
            seen[-1] += (clean[:, 0, 0, 0] * 16).round().int().tolist()
            batch = (clean, torch.randn_like(clean), torch.randint(0, 1000, (len(clean),)))
            accelerator.backward(denoising_losses(model, batch).mean())
            optimizer.step()
            optimizer.zero_grad()
    accelerator.end_training()
    return [sorted(samples) for samples in seen]


def test_by_hand_samples_go_out_and_come_back(tmp_path: Path) -> None:
    def each_epoch(hook: DiffHook, epoch: int) -> None:
        if epoch == 0:
            hook.quarantine.add(5, "blurred")
        if epoch == 2:
            assert hook.quarantine.samples == {5}
            hook.quarantine.remove([5])

    seen = loop(tmp_path / "log", 3, Alerts(quarantine=Quarantine(kinds=())), each_epoch)
    assert len(seen[0]) == 8, "the first batch was skipped"
    assert 5 not in seen[0] + seen[1]
    assert seen[2] == list(range(12))
    records = open_log(tmp_path / "log").alerts()
    assert [(r["kind"], r["samples"]) for r in records] == [("quarantine", [5]), ("release", [5])]
    assert "(blurred)" in records[0]["message"]


def test_a_run_that_continues_a_log_keeps_its_quarantine(tmp_path: Path) -> None:
    loop(tmp_path / "log", 2, accusing(3, 8))
    held: list[frozenset[int]] = []
    quarantine = Quarantine(kinds=())
    quarantine.bind(lambda alert: None, open_log(tmp_path / "log").alerts, rank=0)
    held.append(quarantine.samples)
    quarantine.begin_pass(12)
    assert held[0] == quarantine.samples
    assert held[0] == {3, 8}


class Named(Dataset[Any]):
    """Samples whose ids are not their indices."""

    def __init__(self, first: int) -> None:
        self.first = first

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": identified()[index], "id": f"{self.first + index}.png"}


def test_samples_with_ids_of_their_own_are_left_out_and_validation_sees_all(tmp_path: Path) -> None:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    hook = DiffHook(
        accelerator, tmp_path / "log", alerts=Alerts(quarantine=Quarantine(kinds=())), strict=True
    )
    model = TinyDenoiser()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    validation, loader = DataLoader(Named(0), 4), DataLoader(Named(100), 4, shuffle=True)
    model, validation, optimizer, loader = accelerator.prepare(model, validation, optimizer, loader)
    seen: dict[str, list[list[str]]] = {"training": [], "validation": []}
    for _ in range(2):
        seen["training"].append([])
        for batch in loader:
            seen["training"][-1] += batch["id"]
            clean, noise = batch["image"], torch.randn_like(batch["image"])
            timesteps = torch.randint(0, 1000, (len(clean),))
            accelerator.backward(denoising_losses(model, (clean, noise, timesteps)).mean())
            optimizer.step()
            optimizer.zero_grad()
        seen["validation"].append([name for batch in validation for name in batch["id"]])
        hook.quarantine.add([name_id("103.png"), name_id("3.png")])
    accelerator.end_training()
    every = [f"{100 + index}.png" for index in range(12)]
    assert sorted(seen["training"][0]) == every
    assert set(every) - set(seen["training"][1]) == {"103.png"}
    assert seen["validation"] == [[f"{index}.png" for index in range(12)]] * 2


def test_a_quarantine_says_that_it_leaves_nothing_out_of_a_stream(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(identified())

    accelerator = Accelerator(cpu=True)
    DiffHook(accelerator, tmp_path / "log", alerts=Alerts(quarantine=True), strict=True)
    accelerator.prepare(DataLoader(Stream(), 4))
    accelerator.end_training()
    assert any("leaves nothing out of a stream" in r.message for r in caplog.records)


def test_no_more_than_the_given_share_is_left_out_on_account_of_alerts(tmp_path: Path) -> None:
    train(tmp_path / "log", alerts=accusing(*range(12), share=0.25))
    alerts = open_log(tmp_path / "log").alerts()
    assert sum(a["kind"] == "quarantine" for a in alerts) == 3
    (full,) = [a for a in alerts if a["kind"] == "full"]
    assert "has reached 25.0% of the dataset" in full["message"]


def test_the_share_is_that_of_all_processes_and_runs_together() -> None:
    log: list[dict[str, Any]] = []

    def process(rank: int, size: int = 12) -> Quarantine:
        quarantine = Quarantine(["accused"], share=0.25)

        def tell(alert: Alert) -> None:
            log.append({**alert.to_json(), "rank": rank, "time": float(len(log) + 1)})

        quarantine.bind(tell, log.copy, rank)
        quarantine.begin_pass(size)
        return quarantine

    def accuse(quarantine: Quarantine, *samples: int) -> None:
        for sample in samples:
            quarantine.hear(Alert("accused", "warning", [sample], 0, 0.0, 1.0, 0.0, "it was"))

    first, second = process(0), process(1)
    first.add([11])  # by hand: does not count
    accuse(first, 0, 1)
    second.begin_pass(12)
    accuse(second, 2, 3)
    assert second.samples == {0, 1, 2, 11}, "two of another process, one of its own"
    first.begin_pass(12)
    accuse(first, 4)
    assert first.samples == second.samples
    resumed = process(0)
    accuse(resumed, 5)
    assert resumed.samples == {0, 1, 2, 11}, "earlier runs have used the share up"
    resumed.remove(1)
    accuse(resumed, 6, 7)
    assert resumed.samples == {0, 2, 6, 11}, "what was let in again makes room"
    assert [record["kind"] for record in log if record["kind"] == "full"] == ["full"] * 4


def test_records_of_one_moment_all_count() -> None:
    """A clock may be coarse."""
    record = {"kind": "quarantine", "rank": 1, "time": 5.0, "cause": None}
    quarantine = Quarantine()
    quarantine.bind(lambda alert: None, lambda: [{**record, "samples": [s]} for s in (1, 2)], rank=0)
    assert quarantine.begin_pass(100) == {1, 2}
    quarantine.remove(1)
    assert quarantine.begin_pass(100) == {2}, "and each of them once"


def test_a_whole_batch_in_quarantine_still_trains(tmp_path: Path) -> None:
    train(tmp_path / "log", alerts=accusing(*range(12)))
    assert [len(epoch) for epoch in visits(tmp_path / "log")] == [12, 12, 12]


def test_ranks_keep_step_and_learn_of_each_other_from_the_log(tmp_path: Path) -> None:
    torchrun(__file__, tmp_path / "log")
    table = open_log(tmp_path / "log").train
    epochs = [sorted(table["sample"][table["step"] // 2 == e]) for e in range(4)]
    assert [len(epoch) for epoch in epochs] == [12] * 4, "every rank took every step"
    assert epochs[0] == list(range(12))
    assert all(0 not in epoch for epoch in epochs[1:]), "one rank accused it; both know"


def test_what_is_off_says_how_to_turn_it_on(tmp_path: Path) -> None:
    hook = DiffHook(Accelerator(cpu=True), tmp_path / "log")
    with pytest.raises(ConfigurationError, match=r"quarantine is off: pass alerts=Alerts\(quarantine=True\)"):
        hook.quarantine  # noqa: B018
    with pytest.raises(ConfigurationError, match="share is 2; expected a part"):
        Quarantine(share=2)
    with pytest.raises(ConfigurationError, match="kinds is 'non-finite'; expected a sequence"):
        Quarantine("non-finite")
    with pytest.raises(ConfigurationError, match="sample id -1 is negative"):
        Quarantine().add([-1])
    hook.close()


def _two_ranks(log: str) -> None:
    """What torchrun starts twice: four epochs of two steps on each of two ranks."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    DiffHook(accelerator, log, projection_dim=0, alerts=accusing(0), strict=True)
    model = TinyDenoiser()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    loader = DataLoader(TensorDataset(identified()), 3, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for _ in range(4):
        for (clean,) in loader:
            batch = (clean, torch.randn_like(clean), torch.randint(0, 1000, (len(clean),)))
            accelerator.backward(denoising_losses(model, batch).mean())
            optimizer.step()
            optimizer.zero_grad()
        _wait_for_a_record(log)
    accelerator.end_training()


def _wait_for_a_record(log: str) -> None:
    """Until the accusing rank's writer has got to the disk, however busy the machine is."""

    def recorded() -> bool:
        try:
            return any(alert["kind"] == "quarantine" for alert in open_log(log).alerts())
        except LogError:  # the other rank is just making its part of the log
            return False

    wait_until(recorded)


if __name__ == "__main__":
    _two_ranks(sys.argv[1])
