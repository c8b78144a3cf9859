"""Whether another label fits a sample better, against losses taken one sample and one label at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import diffhook
from diffhook.analysis.execution import Execution
from diffhook.analysis.fisher import log10_tail
from diffhook.analysis.label_neighbours import label_neighbours
from diffhook.capture.objective.noise import noise_bank, noise_seed
from diffhook.capture.probes import label_contrast
from diffhook.capture.probes.label_contrast import LabelContrasts
from diffhook.errors import ConfigurationError
from diffhook.integrations.torch import TorchHook
from tests.runs import SCHEDULER, TinyDenoiser

OBJECTIVE = diffhook.DiffusionObjective(SCHEDULER)
IMAGES = torch.randn(7, 1, 8, 8, generator=torch.Generator().manual_seed(3))
LABELS = torch.tensor([0, 1, 2, 4, 0, 1, 2])
GRID = diffhook.Grid([50, 400, 800], seed=2)


class Told(TinyDenoiser):
    """A denoiser that is told the class."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Embedding(5, 1)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None, **_: Any) -> Any:
        assert class_labels is not None
        return super().forward(sample + self.classes(class_labels)[:, :, None, None], timestep)


def batches(size: int = 3, labels: Tensor = LABELS) -> Any:
    for start in range(0, len(IMAGES), size):
        part = slice(start, start + size)
        batch = {"images": IMAGES[part], "class_labels": labels[part]}
        yield [100 + i for i in range(len(IMAGES))[part]], batch


def label_contrasts(model: nn.Module, objective: Any, of: Any, grid: diffhook.Grid) -> dict[int, Any]:
    """Of all samples, which are the reference as well."""
    contrasts = LabelContrasts.learn(model, objective, of, grid)
    if contrasts is None:
        return {}
    return {i: c for ids, batch in of() for i, c in zip(ids, contrasts.of(batch, len(ids)), strict=True)}


def loss(model: nn.Module, index: int, timestep: int, label: int) -> float:
    clean = IMAGES[index : index + 1]
    noise = noise_bank(torch.tensor([noise_seed(2, timestep, 0)]), clean)
    at = torch.tensor([timestep])
    with torch.no_grad():
        predicted = model(SCHEDULER.add_noise(clean, noise, at), at, class_labels=torch.tensor([label]))[0]
    return float((predicted - noise).double().square().mean())


def test_contrasts_are_those_of_one_sample_and_label_at_a_time() -> None:
    torch.manual_seed(0)
    model = Told()
    found = label_contrasts(model, OBJECTIVE, batches, GRID)
    times = (50, 400, 800)
    mean = {t: np.mean([loss(model, i, t, int(label)) for i, label in enumerate(LABELS)]) for t in times}
    for i, own in enumerate(LABELS.tolist()):
        under = {c: sum(loss(model, i, t, c) / mean[t] for t in times) for c in (0, 1, 2, 4)}
        least = min(value for c, value in under.items() if c != own)
        assert found[100 + i].contrast == pytest.approx(np.log(under[own]) - np.log(least), abs=1e-5)
        assert found[100 + i].own == own
        assert under[found[100 + i].better] == least


def test_of_many_classes_some_are_tried_beside_the_samples_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_contrast, "CLASSES", 2)
    torch.manual_seed(0)
    model = Told()
    found = label_contrasts(model, OBJECTIVE, batches, diffhook.Grid([400], seed=2))
    for i, own in enumerate(LABELS.tolist()):
        least = min(loss(model, i, 400, c) for c in (0, 4) if c != own)
        assert found[100 + i].contrast == pytest.approx(np.log(loss(model, i, 400, own) / least), abs=1e-5)


class Read(TinyDenoiser):
    """A denoiser that reads a caption of three words."""

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Any:
        assert encoder_hidden_states is not None
        return super().forward(sample + encoder_hidden_states.mean((1, 2))[:, None, None, None], timestep)


CAPTIONS = torch.randn(7, 3, 5, generator=torch.Generator().manual_seed(4))
CAPTIONS[6] = CAPTIONS[0]


def captioned(size: int = 3) -> Any:
    for start in range(0, len(IMAGES), size):
        part = slice(start, start + size)
        batch = {"images": IMAGES[part], "encoder_hidden_states": CAPTIONS[part]}
        yield [100 + i for i in range(len(IMAGES))[part]], batch


def test_captions_are_set_against_those_of_other_samples() -> None:
    torch.manual_seed(0)
    model = Read()
    found = label_contrasts(model, OBJECTIVE, captioned, diffhook.Grid([400], seed=2))

    def under(index: int, caption: int) -> float:
        clean, at = IMAGES[index : index + 1], torch.tensor([400])
        noise = noise_bank(torch.tensor([noise_seed(2, 400, 0)]), clean)
        with torch.no_grad():
            told = CAPTIONS[caption : caption + 1]
            predicted = model(SCHEDULER.add_noise(clean, noise, at), at, encoder_hidden_states=told)[0]
        return float((predicted - noise).double().square().mean())

    for i in range(7):
        least = min(
            under(i, other) for other in (0, 2, 4, 6) if not torch.equal(CAPTIONS[other], CAPTIONS[i])
        )
        assert found[100 + i].contrast == pytest.approx(np.log(under(i, i) / least), abs=1e-5)
        assert (found[100 + i].own, found[100 + i].better) == (-1, -1), "captions have no number"


def test_models_without_classes_have_no_contrast() -> None:
    def plain() -> Any:
        yield [0, 1], (IMAGES[:2],)

    def one_class() -> Any:
        yield from batches(labels=torch.zeros_like(LABELS))

    for of in (plain, one_class):
        assert label_contrasts(Told(), OBJECTIVE, of, GRID) == {}


def test_labels_are_tried_between_the_ends_of_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """At either end all labels fit alike."""
    grids: list[diffhook.Grid] = []
    monkeypatch.setattr(LabelContrasts, "learn", lambda *given: grids.append(given[-1]))
    diffhook.Probe(label_timesteps=4, dataset=IMAGES).contrasts(Told(), OBJECTIVE)
    assert grids[0].timesteps_of(OBJECTIVE) == [201, 400, 600, 799]


class Means(nn.Module):
    """Takes every sample of a class for its mean, and so is best under the true one."""

    def __init__(self) -> None:
        super().__init__()
        self.means = nn.Embedding.from_pretrained(torch.tensor([[-0.8], [0.8]]), freeze=False)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None, **_: Any) -> Any:
        assert class_labels is not None
        kept = SCHEDULER.alphas_cumprod[timestep][:, None, None, None]
        clean = self.means(class_labels)[:, :, None, None]
        return ((sample - kept.sqrt() * clean) / (1 - kept).sqrt(),)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> diffhook.RunLog:
    """Bright and dark images, of which number 5 is told to be dark."""
    path = tmp_path_factory.mktemp("labels") / "log"
    torch.manual_seed(0)
    labels = torch.arange(24) % 2
    images = 0.1 * torch.randn(24, 1, 8, 8) + (2.0 * labels - 1)[:, None, None, None]
    labels[5] = 0
    data = [{"images": image, "class_labels": label} for image, label in zip(images, labels, strict=True)]
    model = Means()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    probe = diffhook.Probe(samples=None, grid=diffhook.Grid(3), dataset=data)
    hook = TorchHook(
        path, model, optimizer, objective=OBJECTIVE, probe=probe, snapshot_every=20, projection_dim=64
    )
    for _ in range(20):
        ids = torch.randint(0, 24, (8,))
        noise, times = torch.randn(8, 1, 8, 8), torch.randint(0, 1000, (8,))
        with hook.step(sample_ids=ids, timesteps=times):
            noisy = SCHEDULER.add_noise(images[ids], noise, times)
            (model(noisy, times, class_labels=labels[ids])[0] - noise).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    hook.close()
    return diffhook.open_log(path)


def test_a_wrong_label_is_ranked_first_and_flagged(log: diffhook.RunLog) -> None:
    assert np.isfinite(log.probe["label_contrast"]).all()
    ranking = diffhook.outliers(log, signals=["label"])
    assert ranking.sample_ids[0] == 5
    assert ranking.reasons[0][0].startswith("labelled class 0; the model fits class 1 better (loss ")
    named = {i: ("dark", "bright")[i % 2] for i in range(24)} | {5: "dark"}
    told = diffhook.outliers(log, signals=["label"], labels=named).reasons[0][0]
    assert told.startswith("labelled 'dark'; the model fits 'bright' better (loss ")
    assert not any("label" in flag for flags in ranking.reasons[3:] for flag in flags)
    whole = diffhook.outliers(log)
    at = whole.sample_ids.tolist().index(5)
    assert "fits class 1 better" in "; ".join(whole.reasons[at]), "the flag stands in every ranking"
    assert "label" not in whole.title, "it does not count there"


def test_losses_and_neighbours_count_as_often_as_they_find_the_own_label_right(
    log: diffhook.RunLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample, contrast = log.probe["sample"], log.probe["label_contrast"].astype(float)
    losses = np.array([contrast[sample == i].mean() for i in range(24)])
    told = dict(zip(sample.tolist(), log.probe["label"].tolist(), strict=True))
    ids, nearer, _ = label_neighbours(log.probe, told, Execution())
    assert ids.tolist() == list(range(24))
    right = np.array([(np.sum(each < 0) + 1) / 26 for each in (losses, nearer)])
    odds = np.log(right / (1 - right))
    expected = -2 * (odds / odds.sum()) @ [log10_tail(losses), log10_tail(nearer)]
    ranking = diffhook.outliers(log, signals=["label"])
    np.testing.assert_allclose(ranking.signals["label"], expected[ranking.sample_ids], rtol=1e-5)
    assert ranking.labels is not None
    assert (ranking.labels.own[0], ranking.labels.better[0]) == ("class 0", "class 1")
    monkeypatch.setattr("diffhook.analysis.signals.label.PAIRWISE", 10)
    alone = diffhook.outliers(log, signals=["label"])
    np.testing.assert_allclose(alone.signals["label"], -log10_tail(losses)[alone.sample_ids], rtol=1e-5)


def test_probes_may_leave_labels_alone(tmp_path: Path) -> None:
    from tests.analysis.synthetic import synthetic

    made = synthetic(tmp_path / "log")
    assert "label" not in diffhook.outliers(made.log, "probe").signals
    with pytest.raises(ConfigurationError, match="nothing to rank by from label"):
        diffhook.outliers(made.log, "probe", ["label"])
