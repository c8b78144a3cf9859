"""TracIn and ReTrac of Adam's own step, against a batch-1 loop beside a real AdamW, in float64."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.torch
import torch
from torch import Tensor

import diffhook
from diffhook.analysis.tables import loss_queries
from diffhook.capture.objective.noise import noise_bank, noise_seed
from diffhook.cli import main
from diffhook.errors import ConfigurationError, LogError
from diffhook.integrations.torch import TorchHook
from tests.analysis.synthetic import Synthetic, synthetic, write_queries
from tests.runs import SCHEDULER, Run, TinyDenoiser, denoising_losses, train
from tests.twins import sample_gradients

OBJECTIVE = diffhook.DiffusionObjective(SCHEDULER)
TIMES, DRAWS = (20, 700), 2
IMAGES = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, diffhook.RunLog]:
    path = tmp_path_factory.mktemp("adam") / "log"
    run = train(path, twin=True, projection_dim="full", snapshot_every=4, keep_preconditioner=True)
    log = diffhook.open_log(path)
    for name, preconditioned in (("plain", False), ("adam", True)):
        grid = diffhook.Grid(TIMES, draws=DRAWS)
        diffhook.query(
            log, (IMAGES,), name, OBJECTIVE, model=TinyDenoiser(), grid=grid, preconditioned=preconditioned
        )
    return run, log


def factors(run: Run, step: int) -> Tensor:
    """(P,) 1/(√v̂ + ε) of AdamW with torch's defaults after so many steps, from the samples' gradients."""
    moment = torch.zeros_like(run.events[0].gradient)
    for past in range(step):
        mean = sum(e.weight * e.gradient for e in run.events if e.step == past)
        moment = 0.999 * moment + 0.001 * mean**2
    return 1 / ((moment / (1 - 0.999**step)).sqrt() + 1e-8)


def query_gradients(snapshot: diffhook.log.Snapshot, query: int) -> list[Tensor]:
    """Of each timestep (P,), the mean over noise draws."""
    model = TinyDenoiser()
    model.load_state_dict(safetensors.torch.load(snapshot.parameters()))
    clean = IMAGES[query].expand(DRAWS, -1, -1, -1)
    seeds = {t: torch.tensor([noise_seed(0, t, m, query) for m in range(DRAWS)]) for t in TIMES}
    return [
        sample_gradients(
            model, denoising_losses, (clean, noise_bank(seeds[t], clean), torch.full((DRAWS,), t))
        ).mean(0)
        for t in TIMES
    ]


def direct(run: Run, log: diffhook.RunLog, method: str) -> npt.NDArray[np.float64]:
    """(Q, N): the sum over events, written out."""
    scores = np.zeros((len(IMAGES), len(run.data)))
    unit = method == "adam-retrac"
    for snapshot in log.snapshots:
        mine = [e for e in run.events if nearest(log, e.step) == snapshot.step]
        divisor = factors(run, snapshot.step)
        for query in range(len(IMAGES)):
            pushed = [divisor * g for g in query_gradients(snapshot, query)]
            asked = torch.stack([p / p.norm() if unit else p for p in pushed]).mean(0)
            for event in mine:
                gradient = event.gradient / event.gradient.norm() if unit else event.gradient
                scores[query, event.sample] += event.lr * event.weight * float(gradient @ asked)
    return scores


def nearest(log: diffhook.RunLog, step: int) -> int:
    return min((s.step for s in log.snapshots), key=lambda k: (abs(k - step), k))


@pytest.mark.parametrize("method", ["adam-tracin", "adam-retrac"])
def test_scores_equal_the_batch_1_loop(trained: tuple[Run, diffhook.RunLog], method: str) -> None:
    run, log = trained
    assert [s.step for s in log.snapshots] == [4, 8, 9]
    expected = direct(run, log, method)
    found = diffhook.influence(log, "adam", method).values
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    plain = diffhook.influence(log, "plain", method.removeprefix("adam-")).values
    correlation = np.corrcoef(plain.ravel(), found.ravel())[0, 1]
    assert correlation < 0.99, "dividing changed nothing: the test cannot see whether it was done"


@pytest.mark.parametrize("method", ["tracin", "adam-tracin"])
def test_the_root_on_both_sides_gives_the_products_of_one_side_divided(
    trained: tuple[Run, diffhook.RunLog], method: str
) -> None:
    """⟨√P g, √P g'⟩ = ⟨g, P g'⟩ for whole gradients; projections keep more of the order of the former."""
    run, log = trained
    kinds: dict[str, Any] = {"-plain": False, "-full": True, "-root": "root"}
    for kind, preconditioned in kinds.items():
        for name, images in (("samples", run.data), ("asked", IMAGES)):
            diffhook.query(
                log, (images,), name + kind, OBJECTIVE, model=TinyDenoiser(), against="probe",
                grid=diffhook.Grid([20, 700]), preconditioned=preconditioned, overwrite=True,
            )  # fmt: skip
    expected = diffhook.influence(log, "asked-full", "adam-tracin", "samples-plain").values
    found = diffhook.influence(log, "asked-root", method, "samples-root").values
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    assert diffhook.influence(log, "asked-root", source="samples-root").values.any()
    for queries, source in (("asked-root", "samples-plain"), ("asked-plain", "samples-root")):
        with pytest.raises(ConfigurationError, match=r"divided by the root of Adam's .* make both"):
            diffhook.influence(log, queries, "tracin", source)


def test_a_step_of_adam_lowers_the_querys_loss_by_the_score() -> None:
    """What the score is for: without momentum, one small step on one sample, nothing approximated but
    the loss's curvature."""
    torch.manual_seed(0)
    model = TinyDenoiser().double()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6, betas=(0.0, 0.9))
    noise = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    batch = (torch.randn(4, 1, 8, 8, dtype=torch.float64), noise, torch.tensor([5, 50, 500, 900]))
    for _ in range(3):
        optimizer.zero_grad()
        denoising_losses(model, batch).mean().backward()
        optimizer.step()
    gradients = sample_gradients(model, denoising_losses, batch)
    before = denoising_losses(model, batch)
    model.zero_grad()
    denoising_losses(model, batch)[0].backward()
    optimizer.step()
    from diffhook.capture.recording.preconditioner import adam_preconditioner

    divisors = adam_preconditioner(optimizer, dict(model.named_parameters()))
    pushed = torch.cat([d.double().flatten() for d in divisors.values()]) * gradients
    lowered = before - denoising_losses(model, batch)
    torch.testing.assert_close(1e-6 * pushed @ gradients[0], lowered.detach(), rtol=1e-2, atol=1e-9)


def test_rows_and_weights_are_the_same_with_and_without(tmp_path: Path) -> None:
    kept = train(tmp_path / "kept", keep_preconditioner=True, projection_dim=32, snapshot_every=4)
    bare = train(tmp_path / "bare", projection_dim=32, snapshot_every=4)
    for one, other in zip(kept.model.parameters(), bare.model.parameters(), strict=True):
        assert torch.equal(one, other)
    one, other = (diffhook.open_log(tmp_path / name) for name in ("kept", "bare"))
    for column in one.train.columns:
        np.testing.assert_array_equal(one.train[column], other.train[column])


def test_a_run_without_adam_says_why_it_keeps_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = TinyDenoiser()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hook = TorchHook(
        tmp_path / "log", model, optimizer, keep_preconditioner=True, snapshot_every=1, projection_dim=8
    )
    for _ in range(2):
        with hook.step(sample_ids=[0, 1]):
            noise = torch.randn(2, 1, 8, 8)
            denoising_losses(model, (noise, noise, torch.tensor([5, 50]))).mean().backward()
        optimizer.step()
    hook.close()
    told = [r.getMessage() for r in caplog.records if "preconditioner" in r.getMessage()]
    assert told == [
        "snapshots keep no preconditioner (from step 1 on), because SGD is not Adam, AdamW or NAdam of "
        "torch.optim"
    ]
    log = diffhook.open_log(tmp_path / "log")
    with pytest.raises(LogError, match=r"keeps a preconditioner: train with DiffHook\(.*keep_preconditioner"):
        diffhook.query(log, (IMAGES,), "q", OBJECTIVE, model=TinyDenoiser(), preconditioned=True)


def test_snapshots_without_one_are_left_out_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As of a run that was resumed with the option."""
    train(tmp_path / "log", keep_preconditioner=True, projection_dim=8, snapshot_every=4)
    described = tmp_path / "log/snapshots/step-00000008/snapshot.json"
    from diffhook.log.checksum import with_checksum

    fields = {k: v for k, v in json.loads(described.read_text()).items() if k != "crc32"}
    del fields["preconditioner_sha256"]
    described.write_text(json.dumps(with_checksum(fields)))
    log = diffhook.open_log(tmp_path / "log")
    with caplog.at_level(logging.WARNING, "diffhook"):
        table = diffhook.query(
            log, (IMAGES,), "q", OBJECTIVE, model=TinyDenoiser(), grid=diffhook.Grid(2), preconditioned=True
        )
    assert set(table["step"].tolist()) == {4, 9}
    assert "the snapshots of steps 8 keep no preconditioner and are left out" in caplog.text


# ── one kind of gradients is not taken for the other ──────────────────────────────────────────────


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Synthetic:
    made = synthetic(tmp_path_factory.mktemp("mixed") / "log", replicates=1)
    path = Path(made.log.location)
    write_queries(path, "divided", made.queries["new"], preconditioned=True)
    write_queries(path, "train-divided", made.queries["train-squared"], preconditioned=True)
    return made


@pytest.mark.parametrize(
    ("method", "source", "queries", "wrong"),
    [
        ("adam-tracin", "train", "new", r"needs preconditioned gradients; queries 'new' holds plain ones"),
        ("adam-retrac", "probe", "new", r"query\(log, samples, name, preconditioned=True\)"),
        ("tracin", "train", "divided", r"needs plain gradients; queries 'divided' holds preconditioned"),
        ("trak", "probe", "divided", "needs plain gradients"),
        ("adam-tracin", "train-divided", "divided", "which serve as queries only"),
        ("tracin", "train-divided", "new", "source 'train-divided' holds preconditioned gradients"),
        ("adam-tracin", "train-squared", "divided", "those of the squared-output"),
    ],
)
def test_plain_and_divided_gradients_are_not_mixed(
    mixed: Synthetic, method: str, source: str, queries: str, wrong: str
) -> None:
    with pytest.raises(ConfigurationError, match=wrong):
        diffhook.influence(mixed.log, queries, method, source)


def test_diagnostics_of_plain_gradients_leave_divided_queries_alone(mixed: Synthetic) -> None:
    assert loss_queries(mixed.log) == ["new", "twins"]
    assert {g.queries for g in diffhook.bias(mixed.log).generality} == {"new", "twins"}
    with pytest.raises(ConfigurationError, match="that of tracin or retrac, not of 'adam-tracin'"):
        diffhook.self_influence(mixed.log, "adam-tracin")


def test_asking_again_with_the_other_kind_is_another_question(
    trained: tuple[Run, diffhook.RunLog],
) -> None:
    _, log = trained
    options = {"model": TinyDenoiser(), "grid": diffhook.Grid(TIMES, draws=DRAWS)}
    with pytest.raises(LogError, match="has queries 'adam' already, from other"):
        diffhook.query(log, (IMAGES,), "adam", OBJECTIVE, **options)


def test_the_command_line_asks_with_and_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.models import unet

    probe = diffhook.Probe(1, diffhook.Grid(1))
    train(
        tmp_path / "log", make_model=lambda: unet().model, data=torch.randn(4, 1, 16, 16), epochs=1,
        objective=OBJECTIVE, probe=probe, projection_dim=64, keep_preconditioner=True,
    )  # fmt: skip
    np.save(tmp_path / "images.npy", np.zeros((2, 16, 16), np.uint8))
    asked = ["query", str(tmp_path / "log"), "--name", "q", "--images", str(tmp_path / "images.npy")]
    assert main([*asked, "--timesteps", "2", "--draws", "1", "--preconditioned"]) == 0
    assert "--queries q --method adam-retrac" in capsys.readouterr().out.replace("\n", " ")
    scored = ["influence", str(tmp_path / "log"), "--queries", "q", "--method", "adam-tracin", "--json"]
    assert main(scored) == 0
    assert len(json.loads(capsys.readouterr().out)["queries"]) == 2
    assert main(["influence", str(tmp_path / "log"), "--queries", "q", "--method", "retrac"]) == 2
    assert "needs plain gradients" in capsys.readouterr().err
