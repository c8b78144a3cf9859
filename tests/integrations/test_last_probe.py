"""Two plain lines have all samples on the grid, at the end of the training, as far as the budget goes."""

from __future__ import annotations

import copy
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import diffhook
from diffhook.analysis.defaults import best_source
from diffhook.capture.budget import Budget
from diffhook.capture.objective.noise import noise_bank
from diffhook.capture.probes.prober import Prober
from diffhook.cli.info import describe
from diffhook.integrations.accelerate import DiffHook
from tests.integrations.test_training_loss import IMAGES, odd, plain, train
from tests.runs import SCHEDULER, TinyDenoiser, denoising_losses


def rows(log: Path) -> dict[str, Any]:
    table = diffhook.open_log(log).probe
    order = np.lexsort([table[key] for key in ("replicate", "timestep", "sample")])
    return {
        name: table[name][order] for name in ("sample", "timestep", "noise_seed", "grad_norm", "projection")
    }


def test_two_plain_lines_have_the_rows_of_a_probe_of_all_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "plain", plain)
    told = capsys.readouterr().out
    assert "the training is over; probing all 48 samples, 20 rows each" in told
    train(tmp_path / "asked", plain, probe=diffhook.Probe(None))
    found, expected = rows(tmp_path / "plain"), rows(tmp_path / "asked")
    assert len(found["sample"]) == 48 * 20
    for name in found:
        np.testing.assert_array_equal(found[name], expected[name])
    log = diffhook.open_log(tmp_path / "plain")
    assert log.grid == diffhook.Grid(10, replicates=2).describe()
    assert best_source(log) == "probe"
    assert (log.probe["weight"] > 0).all()
    assert [snapshot.step for snapshot in log.snapshots] == np.unique(log.probe["step"]).tolist() == [12]


class Spare(TinyDenoiser):
    """Has a layer that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(3, 3)


def test_a_layer_that_is_never_called_costs_no_probe_and_no_query(tmp_path: Path) -> None:
    model = train(tmp_path / "log", plain, Spare())
    assert len(diffhook.open_log(tmp_path / "log").probe) == 48 * 20
    diffhook.query(tmp_path / "log", IMAGES[:8], "own", model=model)
    assert diffhook.influence(tmp_path / "log", "own").top(1).sample_ids[:, 0].tolist() == list(range(8))


def test_a_training_image_asked_as_a_query_finds_itself(tmp_path: Path) -> None:
    model = train(tmp_path / "log", plain)
    diffhook.query(tmp_path / "log", IMAGES[:8], "own", model=model)
    scores = diffhook.influence(tmp_path / "log", "own")
    assert scores.source == "probe"
    assert scores.top(1).sample_ids[:, 0].tolist() == list(range(8))
    assert scores.errors is not None
    assert np.isfinite(scores.errors).all()


@pytest.mark.parametrize("options", [{"probe": False}, {"projection_dim": 0}])
def test_no_probe_where_none_is_wanted(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "log", plain, **options)
    assert events_alone(tmp_path / "log")
    assert "probing" not in capsys.readouterr().out


def test_a_probe_that_the_budget_does_not_afford_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffhook.capture.settings.BUDGET", Budget(1e-6))
    train(tmp_path / "log", plain, every=1)
    assert events_alone(tmp_path / "log")
    assert "no probe at the end: of 48 samples it would take" in capsys.readouterr().out


def events_alone(log: Path) -> bool:
    found = diffhook.open_log(log)
    return found.grid is None and len(found.probe) == 0 < len(found.train)


def test_a_loss_that_is_not_recognised_is_not_probed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "log", odd)
    assert events_alone(tmp_path / "log")
    assert capsys.readouterr().out.count("no probe at the end: it takes the training loss") == 1


def test_inputs_that_have_no_room_are_not_kept_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffhook.capture.loop.probes.probe_inputs._BYTES", 10_000)
    train(tmp_path / "log", plain)
    assert events_alone(tmp_path / "log")
    assert capsys.readouterr().out.count("no probe at the end: the inputs of all 48 samples") == 1


def test_a_loss_that_was_given_is_probed_with_the_datasets_items(tmp_path: Path) -> None:
    train(tmp_path / "log", plain, objective=diffhook.DiffusionObjective(SCHEDULER))
    train(tmp_path / "plain", plain)
    found, expected = rows(tmp_path / "log"), rows(tmp_path / "plain")
    for name in found:
        atol = 5e-4 if name == "projection" else 0  # float16
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=atol)


def test_the_training_is_the_same(tmp_path: Path) -> None:
    watched = train(tmp_path / "log", plain)
    assert len(diffhook.open_log(tmp_path / "log").probe)
    for ours, theirs in zip(watched.parameters(), train(None, plain).parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]


LOOP = """
import sys, torch
from accelerate import Accelerator
from diffhook.integrations.accelerate import DiffHook
from tests.integrations.test_training_loss import IMAGES, plain
from tests.runs import TinyDenoiser

hook = DiffHook(accelerator := Accelerator(cpu=True), sys.argv[1], projection_dim=64)
model = TinyDenoiser()
optimizer = torch.optim.SGD(model.parameters(), 0.01)
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(IMAGES), 8)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
def epoch():
    for (clean,) in loader:
        accelerator.backward(plain(model, clean))
        optimizer.step()
        optimizer.zero_grad()
epoch()
epoch()
"""


@pytest.mark.parametrize(
    ("end", "probed"),
    [("", True), ("raise KeyboardInterrupt", False), ("raise ValueError('mine')", False)],
    ids=["exit", "ctrl-c", "error"],
)
def test_a_process_that_ends_in_an_error_is_not_made_to_wait(end: str, probed: bool, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOOP + end, str(tmp_path / "log")], capture_output=True, text=True, timeout=300
    )
    assert ("Error" in done.stderr or "Interrupt" in done.stderr) == ("raise" in end)
    _assert_ended(tmp_path / "log", done.stdout, probed)


@pytest.mark.parametrize(
    ("end", "probed"),
    [
        ("try:\n    1 / 0\nfinally:\n    accelerator.end_training()", False),
        ("try:\n    1 / 0\nexcept ZeroDivisionError:\n    pass\naccelerator.end_training()", True),
        ("try:\n    next(iter([]))\nexcept StopIteration:\n    accelerator.end_training()", True),
    ],
    ids=["finally", "mended", "stop-iteration"],
)
def test_a_training_that_is_ended_in_an_error_is_not_made_to_wait(
    end: str,
    probed: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["loop.py", str(tmp_path / "log")])
    with pytest.raises(ZeroDivisionError) if "finally" in end else nullcontext():
        exec(compile(LOOP + end, "loop.py", "exec"), {})
    _assert_ended(tmp_path / "log", capsys.readouterr().out, probed)


def _assert_ended(path: Path, told: str, probed: bool) -> None:
    log = diffhook.open_log(path)
    assert (len(log.train), len(log.probe) > 0) == (96, probed)
    assert "1 snapshot; " in told
    assert ("of probes" in told) == probed


def test_ctrl_c_ends_the_probe_and_keeps_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Prober._run

    def interrupted(prober: Prober, *args: Any) -> None:
        monkeypatch.setattr(Prober, "_run", run)
        raise KeyboardInterrupt

    monkeypatch.setattr(Prober, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "log", plain)
    log = diffhook.open_log(tmp_path / "log")
    assert (len(log.train), len(log.probe)) == (96, 0)
    assert log.verify() == []
    assert "diffhook: 96 rows, 1 snapshot; " in capsys.readouterr().out


def train_averaged(folder: Path, *, save: bool = False) -> TinyDenoiser:
    accelerator = Accelerator(cpu=True)
    hook = DiffHook(accelerator, folder / "log", strict=True, alerts=(), projection_dim=64)
    model = TinyDenoiser()
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    prepared, optimizer, loader = accelerator.prepare(
        model, optimizer, DataLoader(TensorDataset(IMAGES), 8, shuffle=True)
    )
    averaged = EMAModel(model.parameters(), decay=0.5)
    for (clean,) in [batch for _ in range(2) for batch in loader]:
        accelerator.backward(plain(prepared, clean))
        optimizer.step()
        optimizer.zero_grad()
        averaged.step(model.parameters())
    last = [parameter.detach().clone() for parameter in model.parameters()]
    if save:
        accelerator.save_state(str(folder / "state"))
    averaged.copy_to(model.parameters())
    own = [parameter.detach().clone() for parameter in model.parameters()]
    assert not all(torch.equal(one, two) for one, two in zip(own, last, strict=True))
    hook.close()
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), own, strict=True))
    return model


def test_the_weights_that_the_log_has_of_the_step_are_probed(tmp_path: Path) -> None:
    """The last step is one at which the script saves, and queries take the weights of that moment."""
    model = train_averaged(tmp_path, save=True)
    averaged = copy.deepcopy(model.state_dict())
    log = diffhook.open_log(tmp_path / "log")
    assert describe(log)["snapshots of weights loaded after the step"] == []
    kept = safetensors.torch.load(log.snapshots[-1].parameters())
    assert not all(torch.equal(kept[name], value) for name, value in averaged.items())
    model.load_state_dict(kept)
    assert_probes_are_of(model, log)


def test_the_weights_that_a_script_saves_are_probed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Scripts put averaged weights into the model before they save it and end the training."""
    model = train_averaged(tmp_path)
    assert caplog.text.count("the weights are not those that step 12 has left") == 1

    log = diffhook.open_log(tmp_path / "log")
    assert describe(log)["snapshots of weights loaded after the step"] == [12]
    kept = safetensors.torch.load(log.snapshots[-1].parameters())
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())
    assert_probes_are_of(model, log)


def assert_probes_are_of(model: TinyDenoiser, log: diffhook.RunLog, images: torch.Tensor = IMAGES) -> None:
    table = log.probe
    for row in range(0, len(table), len(table) // 7):
        sample, timestep = int(table["sample"][row]), torch.tensor([int(table["timestep"][row])])
        clean = images[sample : sample + 1]
        noise = noise_bank(torch.tensor([int(table["noise_seed"][row])]), clean)
        twin = copy.deepcopy(model).double()
        losses = denoising_losses(twin, (clean.double(), noise.double(), timestep))
        norm = torch.cat(
            [g.flatten() for g in torch.autograd.grad(losses[0], list(twin.parameters()))]
        ).norm()
        assert table["grad_norm"][row] == pytest.approx(float(norm), rel=1e-5)


def session(
    log: Path,
    images: torch.Tensor,
    steps: int,
    saved: Path | None = None,
    resumed: Path | None = None,
    shuffle: bool = False,
) -> TinyDenoiser:
    """A loop that skips losses that are not finite."""
    accelerator = Accelerator(cpu=True)
    hook = DiffHook(accelerator, log, strict=True, alerts=(), projection_dim=64)
    torch.manual_seed(0)
    model = TinyDenoiser()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    loader = DataLoader(TensorDataset(images), 8, shuffle, drop_last=True)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if resumed is not None:
        accelerator.load_state(str(resumed))
    batches = iter([batch for _ in range(1 + steps // len(loader)) for batch in loader])
    for _ in range(steps):
        accelerator.backward(plain(prepared, next(batches)[0]))
        if all(p.grad is None or p.grad.isfinite().all() for p in model.parameters()):
            optimizer.step()
        optimizer.zero_grad()
    if saved is not None:
        accelerator.save_state(str(saved))
    hook.close()
    return model


def test_a_session_that_is_too_short_to_recognise_the_loss_takes_what_was_known(tmp_path: Path) -> None:
    session(tmp_path / "log", IMAGES, 10, saved=tmp_path / "saved")
    grid = diffhook.open_log(tmp_path / "log").grid
    session(tmp_path / "log", IMAGES, 6, resumed=tmp_path / "saved")
    log = diffhook.open_log(tmp_path / "log")
    assert log.grid == grid
    assert np.unique(log.probe["step"], return_counts=True)[0].tolist() == [10, 16]
    assert len(log.probe) == 2 * 48 * diffhook.Grid(**grid or {}).rows


def test_samples_that_were_never_seen_do_not_cost_the_others_their_probe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session(tmp_path / "log", IMAGES[:45], 10)
    assert "probing the 40 of 45 samples whose inputs are known" in capsys.readouterr().out
    log = diffhook.open_log(tmp_path / "log")
    assert np.unique(log.probe["sample"]).tolist() == list(range(40))
    assert best_source(log) == "probe"


def test_a_broken_image_does_not_cost_the_others_their_probe(tmp_path: Path) -> None:
    images = IMAGES.clone()
    images[17, 0, 3, 3] = torch.nan
    session(tmp_path / "log", images, 36, shuffle=True)
    log = diffhook.open_log(tmp_path / "log")
    assert 17 in log.train["sample"]
    assert sorted({*range(48)} - {*log.probe["sample"].tolist()}) == [17]
    assert best_source(log) == "probe"


def test_a_model_that_was_frozen_for_sampling_is_probed_all_the_same(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    hook = DiffHook(accelerator, tmp_path / "log", strict=True, alerts=(), projection_dim=64)
    model = TinyDenoiser()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(TensorDataset(IMAGES), 8))
    for (clean,) in [batch for _ in range(2) for batch in loader]:
        accelerator.backward(plain(prepared, clean))
        optimizer.step()
        optimizer.zero_grad()
    model.requires_grad_(False).eval()
    hook.close()
    assert len(np.unique(diffhook.open_log(tmp_path / "log").probe["sample"])) == 48
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
