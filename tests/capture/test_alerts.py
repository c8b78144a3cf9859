"""Detectors name what misbehaves, and only that."""

from __future__ import annotations

import logging
import math
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import diffhook
from diffhook import Alerts
from diffhook.capture import (
    Alert,
    Detector,
    Dominating,
    Drift,
    LossOutlier,
    NonFinite,
    NormOutlier,
    RepeatedOffender,
)
from diffhook.capture.alerts import DETECTORS, Watch
from diffhook.capture.alerts.limit import Limit
from diffhook.capture.alerts.tail import Tail
from diffhook.capture.alerts.visits import VisitHistory
from diffhook.errors import ConfigurationError
from diffhook.log import Rows
from tests.runs import TinyDenoiser, identified, train


def make_rows(norms: Any, timesteps: Any, samples: Any = None, step: int = 7, lr: float = 1e-3) -> Rows:
    count = len(norms)
    return {
        "sample": np.arange(count) if samples is None else np.asarray(samples),
        "step": np.full(count, step),
        "timestep": np.asarray(timesteps, np.float32),
        "grad_norm": np.asarray(norms, np.float32),
        "loss": np.asarray(norms, np.float32),
        "lr": np.full(count, lr, np.float32),
    }


def clean_run(
    steps: int, rng: np.random.Generator, batch: int = 32, scale: float = 1000.0, count: int = 2000
) -> list[Rows]:
    """Norms that depend on the timestep, fall while the model learns, and have a skewed spread."""
    made = []
    for step in range(steps):
        timesteps = rng.random(batch) * scale
        usual = 2 * np.exp(-3 * timesteps / scale) * (1 + 5 * math.exp(-step / 20)) / (1 + step / 200)
        norms = usual * np.exp(0.4 * rng.gumbel(size=batch))
        made.append(make_rows(norms, timesteps, rng.integers(0, count, batch), step))
    return made


def alarms(detector: Detector, run: list[Rows]) -> list[Alert]:
    return [alert for rows in run for alert in detector.look(rows)]


# ── not finite ────────────────────────────────────────────────────────────────────────────────


def test_non_finite_gradients_are_named() -> None:
    found = alarms(NonFinite(), [make_rows([1, np.nan, 2, np.inf], [1, 2, 3, 4])])
    assert [(a.samples, a.level) for a in found] == [([1, 3], "error")]
    assert "2 samples (1, 3) have gradients that are not finite" in found[0].message
    assert found[0].to_json()["value"] == "nan"
    assert alarms(NonFinite(), [make_rows([1, 2], [1, 2])]) == []


def test_a_lost_model_is_told_once_with_the_sample_that_went_before() -> None:
    lost = [make_rows([np.nan] * 3, [1, 2, 3], [4, 5, 6], step) for step in (9, 10, 11)]
    found = alarms(NonFinite(), [make_rows([1, np.nan, 2], [1, 2, 3], step=8), *lost])
    assert [a.samples for a in found] == [[1], []], "the others of a lost model's batches are not to blame"
    assert "since step 8 trained on sample 1; go back to a snapshot before step 9" in found[1].message


def test_broken_samples_alone_in_their_steps_are_named_each_if_sound_steps_lie_between() -> None:
    def step(number: int, norm: float, lr: float = 1e-3) -> Rows:
        return make_rows([norm], [1.0], [number], number, lr)

    sound = [step(s, 1.0) for s in (8, 10, 12)]
    found = alarms(
        NonFinite(), [step(7, np.nan, 0.0), sound[0], step(9, np.nan, 0.0), sound[1], step(11, np.nan, 0.0)]
    )
    assert [a.samples for a in found] == [[7], [9], [11]]
    lost = alarms(
        NonFinite(), [step(7, np.nan), sound[0], step(9, np.nan), *map(step, (10, 11), [np.nan] * 2)]
    )
    assert [a.samples for a in lost] == [[7], [9], []]
    assert "probably since step 9 trained on sample 9" in lost[-1].message
    whole = make_rows([np.nan] * 3, [1, 2, 3], step=20)
    (_, late) = alarms(NonFinite(), [make_rows([1, np.nan], [1, 2], step=8), *sound, whole])
    assert "the model is lost; go back" in late.message, "a step of long ago is not to blame"


def test_overflows_of_a_loss_scale_are_no_alert_until_there_is_no_end_to_them() -> None:
    skipped = [make_rows([np.inf] * 4, [1] * 4, step=s, lr=0.0) for s in range(12)]
    assert alarms(NonFinite(), skipped[:9]) == []
    assert len(alarms(NonFinite(), skipped)) == 1


# ── outliers within a timestep bin ────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", [NormOutlier, LossOutlier])
@pytest.mark.parametrize("scale", [1000.0, 1.0], ids=["0-1000", "flow"])
def test_false_alarms_keep_to_the_rate_asked_for(kind: type[Detector], scale: float) -> None:
    run = clean_run(800, np.random.default_rng(1), scale=scale)
    for rate in (0.003, 0.02):
        raised = len(alarms(kind(rate), run))
        due = rate * 32 * len(run)
        assert due / 2 < raised < due * 2, f"{raised} false alarms where {due:.0f} were asked for"


def test_a_norm_is_judged_within_its_timestep_bin() -> None:
    rng = np.random.default_rng(0)
    detector = NormOutlier()
    alarms(detector, clean_run(200, rng))
    # At the end usual norms are 1.0 at timestep 0 and 0.05 at timestep 1000: 1.5 is usual early only.
    found = alarms(detector, [make_rows([1.5, 1.5], [20, 980], step=200)])
    assert [a.samples for a in found] == [[1]]
    assert found[0].timestep == 980
    assert found[0].value > found[0].threshold
    assert "sample 1 has" in found[0].message
    assert "near timestep 980" in found[0].message


def test_a_few_timesteps_only_are_bins_as_well() -> None:
    rng = np.random.default_rng(2)
    steps = rng.choice([249, 499, 749, 999], (300, 16))
    run = [make_rows(np.exp(-t / 300) * np.exp(0.2 * rng.standard_normal(16)), t) for t in steps]
    detector = NormOutlier()
    alarms(detector, run)
    usual = {t: math.exp(-t / 300) for t in (249, 999)}
    found = alarms(detector, [make_rows([usual[249], usual[249]], [249, 999])])
    assert [a.samples for a in found] == [[1]]


def test_nothing_alarms_before_enough_was_seen_and_unknown_values_never_do() -> None:
    rng = np.random.default_rng(0)
    assert alarms(NormOutlier(), [*clean_run(5, rng), make_rows([1e6], [5])]) == []
    detector = LossOutlier()
    unknown = [{**rows, "loss": np.full(32, np.nan)} for rows in clean_run(50, rng)]
    assert alarms(detector, unknown) == []
    assert alarms(NormOutlier(), [make_rows([0.0, np.nan, np.inf], [1, 2, np.nan])] * 300) == []


def test_the_level_of_a_tail_is_its_quantile() -> None:
    """Against the quantile that an exponential distribution has, with and without broken samples."""
    rng = np.random.default_rng(0)
    for broken in (0, 100):
        tail = Tail(1e-3)
        values = rng.exponential(size=20_000)
        values[rng.choice(20_000, broken, replace=False)] = 100.0
        for part in np.split(values, 625):
            tail.alarms(part)
        assert abs(tail.level - math.log(1000)) < 1.2, "a factor of three in the rate"
        surprise = tail.surprise(np.array([0.1, 1.0, 3.0, 8.0]))
        np.testing.assert_allclose(surprise, [0.1, 1.0, 3.0, 8.0], rtol=0.2)


# ── over visits, over a batch, over the run ───────────────────────────────────────────────────


def test_a_sample_that_is_a_bit_too_hard_every_time_is_found() -> None:
    run = clean_run(300, np.random.default_rng(3), count=300)
    for rows in run:
        rows["grad_norm"][rows["sample"] == 17] *= 3.0  # type: ignore[index]
    named = [a.samples[0] for a in alarms(RepeatedOffender(), run)]
    assert named.count(17) >= 3
    others = 0.003 * 32 * len(run)
    assert len(named) - named.count(17) < others, "samples of no fault are named"
    first = next(a for a in alarms(RepeatedOffender(), run) if a.samples == [17])
    assert re.search(r"sample 17 keeps having large gradients: on its last [2-8] visits only", first.message)


def test_visits_that_have_named_a_sample_do_not_name_it_again() -> None:
    detector = RepeatedOffender()
    rng = np.random.default_rng(6)
    alarms(detector, clean_run(300, rng, count=300))
    hard = [make_rows([9.0], [20], [17], step) for step in range(300, 304)]
    named = [[a.samples for a in detector.look(rows)] for rows in hard]
    assert [[17]] in named
    after = named.index([[17]]) + 1
    assert named[after] == [], "one visit alone is not a repetition"
    twice = make_rows([9.0] * 3, [20] * 3, [17] * 3, 305)
    assert [a.samples for a in detector.look(twice)] == [[17]], "a step names a sample once"


def test_last_visits_equal_those_of_a_loop() -> None:
    rng = np.random.default_rng(7)
    visits, twin = VisitHistory(last=3, most=50), dict[int, list[float]]()
    for sample, number in zip(rng.integers(0, 60, 2000).tolist(), rng.random(2000).tolist(), strict=True):
        if sample not in twin and len(twin) == 50:
            twin.pop(next(iter(twin)))
        twin[sample] = [*twin.get(sample, []), number][-3:]
        assert sorted(visits.add(sample, number)) == pytest.approx(sorted(twin[sample]))
        if number < 0.1:
            visits.forget(sample)
            twin[sample] = []
    assert all(sorted(visits.of(s)) == pytest.approx(sorted(twin.get(s, []))) for s in range(60))


def test_what_a_repeated_offender_is_known_by_takes_no_object_per_sample() -> None:
    detector = RepeatedOffender()
    rng = np.random.default_rng(0)
    alarms(detector, clean_run(50, rng))
    tracemalloc.start()
    try:
        alarms(detector, [make_rows(np.ones(20_000), rng.random(20_000) * 1000, np.arange(20_000))])
        kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert kept / 20_000 < 300, "bytes of a sample"


def test_one_sample_that_holds_most_of_a_batch_is_named() -> None:
    rng = np.random.default_rng(4)
    detector = Dominating()
    assert alarms(detector, clean_run(400, rng)) == []
    norms = np.ones(32)
    norms[5] = 60.0
    (alert,) = detector.look(make_rows(norms, rng.random(32) * 1000))
    assert alert.samples == [5]
    assert alert.value == pytest.approx(3600 / 3631)
    assert "sample 5 holds 99% of the squared gradient norm of a step of 32 samples" in alert.message


@pytest.mark.parametrize(("factor", "word"), [(4.0, "grown"), (0.2, "shrunk")])
def test_a_shift_of_all_gradients_is_told_of_the_run_and_not_of_samples(factor: float, word: str) -> None:
    rng = np.random.default_rng(5)
    run = clean_run(400, rng)
    detector = Drift()
    assert alarms(detector, run) == [], "learning is no news"
    shifted = [{**rows, "grad_norm": rows["grad_norm"] * factor} for rows in clean_run(420, rng)[400:]]
    (alert,) = alarms(detector, shifted)
    assert alert.samples == []
    assert math.isnan(alert.timestep)
    assert word in alert.message
    assert alert.value > alert.threshold


def test_detectors_that_share_deviations_find_what_each_finds_alone() -> None:
    run = clean_run(200, np.random.default_rng(8), count=300)
    kinds = (NormOutlier, RepeatedOffender, Drift)
    alone = [alarms(kind(0.01), run) for kind in kinds]
    together = [kind(0.01) for kind in kinds]
    Watch(Alerts(detectors=together, sinks=[]), lambda alert: None, list, rank=0)
    found: list[list[Alert]] = [[] for _ in kinds]
    for rows in run:
        for detector, alerts in zip(together, found, strict=True):
            alerts += detector.look(rows)
    assert len({id(detector.deviations) for detector in together}) == 1
    assert [len(alerts) for alerts in found] == [len(alerts) for alerts in alone]
    assert [a.value for a in found[0]] == [a.value for a in alone[0]]


# ── not too many ──────────────────────────────────────────────────────────────────────────────


def make_alert(step: int, samples: list[int], kind: str = "norm-outlier") -> Alert:
    return Alert(kind, "warning", samples, step, 1.0, 5.0, 4.0, "what it says")


def test_a_sample_is_named_once_by_each_kind() -> None:
    limit = Limit(most=10)
    assert limit.admit(make_alert(1, [3])) is not None
    assert limit.admit(make_alert(2, [3])) is None
    assert limit.admit(make_alert(2, [3], "loss-outlier")) is not None
    again = limit.admit(make_alert(3, [3, 4]))
    assert again is not None
    assert again.samples == [4]


def test_a_flood_is_held_back_counted_and_told() -> None:
    limit = Limit(most=2)
    passed = [limit.admit(make_alert(step, [step])) for step in range(100)]
    assert [i for i, alert in enumerate(passed) if alert] == [0, 1]
    later = limit.admit(make_alert(200, [50]))
    assert later is not None, "a sample that was held back can still be named"
    assert later.message == "what it says (and 98 more of this kind were held back before)"


# ── as a user meets them ──────────────────────────────────────────────────────────────────────


def test_a_nan_image_is_named_in_the_log_and_on_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = identified()
    data[6, 0, 3, 3] = torch.nan
    with caplog.at_level(logging.WARNING, "diffhook"):
        train(tmp_path / "log", data=data, epochs=3, batch_size=12, projection_dim=16)
    alerts = diffhook.open_log(tmp_path / "log").alerts()
    assert [(a["samples"], a["step"]) for a in alerts] == [([6], 0), ([], 1)]
    assert any("sample 6 has a gradient that is not finite" in r.message for r in caplog.records)
    assert "the model is lost, probably since step 0 trained on sample 6" in alerts[1]["message"]
    assert all(a["time"] > 1e9 and a["rank"] == 0 for a in alerts)
    lines = (tmp_path / "log/alerts/rank-0000.jsonl").read_text().splitlines()
    assert len(lines) == len(alerts) + 1, "and the mark of a run that has ended"


def test_a_detector_sees_whole_steps_with_their_learning_rate(tmp_path: Path) -> None:
    class Notes(Detector):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[tuple[int, int, float]] = []

        def look(self, rows: Rows) -> Any:
            assert len(np.unique(rows["step"])) == 1
            self.seen.append((int(rows["step"][0]), len(rows["sample"]), round(float(rows["lr"][0]), 6)))
            return iter(())

    notes = Notes()
    train(tmp_path / "log", accumulation=3, epochs=2, alerts=[notes])
    assert notes.seen == [(0, 12, 0.01), (1, 12, 0.005)]


def test_the_layer_where_the_backward_met_it_is_told(tmp_path: Path) -> None:
    def broken(gradient: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.arange(12)[:, None, None, None] == 4, torch.nan, gradient)

    class Breaks(TinyDenoiser):
        """Gradients of the batch's fifth sample overflow on their way from the last layer to the norm."""

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            handle = self.norm.register_forward_hook(lambda *call: call[2].register_hook(broken) and None)
            try:
                return super().forward(*args, **kwargs)
            finally:
                handle.remove()

    train(tmp_path / "log", make_model=Breaks, epochs=1, batch_size=12)
    (alert,) = diffhook.open_log(tmp_path / "log").alerts()
    assert len(alert["samples"]) == 1
    assert alert["layer"] == "inward.weight", "the gradients of layers behind it are finite"
    assert alert["message"].endswith(f"(first in backward order: {alert['layer']})")


def test_every_registered_detector_is_asked_unless_the_user_chooses() -> None:
    assert [type(d) for d in Alerts.of(None).detectors or ()] == list(DETECTORS.values())
    assert {d.rate for d in Alerts.of(Alerts(rate=0.01)).detectors or ()} == {0.01}
    assert Alerts.of(()).detectors == []
    assert set(DETECTORS) == {
        "non-finite",
        "norm-outlier",
        "loss-outlier",
        "input-outlier",
        "repeated-offender",
        "dominating",
        "drift",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0.0}, "rate is 0.0; expected a share of false alarms below 0.1"),
        ({"most": 0}, "most is 0"),
        ({"timeout": 0}, "timeout 0; expected"),
        ({"detectors": ["norm-outlier"]}, "'norm-outlier' is no detector; expected objects such as"),
        ({"sinks": ["http://x"]}, "the sink 'http://x' cannot be called"),
        ({"detectors": [NormOutlier]}, "is no detector"),
    ],
)
def test_bad_wishes_say_what_was_expected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Alerts(**options)
