"""Samples that look unlike the others are named at once; images are kept only for those who ask."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import diffhook
from diffhook.appearance import COLUMNS
from diffhook.capture import InputOutlier
from diffhook.capture.samples.appearance import appearance, images_of
from diffhook.errors import ConfigurationError
from diffhook.log import Rows
from tests.capture.test_alerts import alarms, make_rows
from tests.runs import identified, train


def test_appearance_equals_numpy_in_double_precision() -> None:
    rng = np.random.default_rng(0)
    for shape in ((5, 3, 8, 6), (4, 1, 1, 7), (2, 4, 3, 8, 8), (3, 9, 1)):
        clean = rng.standard_normal(shape)
        steps = [np.diff(clean, axis=a).reshape(len(clean), -1) for a in (-1, -2)]
        expected = [
            clean.reshape(len(clean), -1).mean(1),
            clean.reshape(len(clean), -1).std(1),
            np.sqrt((np.concatenate(steps, 1) ** 2).mean(1)),
        ]
        found = appearance(torch.from_numpy(clean))
        np.testing.assert_allclose(found, np.stack(expected, 1), rtol=1e-5, atol=1e-6)  # sums in float32


def test_no_images_in_a_batch_is_no_error() -> None:
    assert images_of({"input_ids": torch.zeros(3, 7)}) is None
    assert images_of([torch.zeros(3, 7)]) is None
    shown = images_of({"pixel_values": torch.zeros(3, 1, 4, 4), "input_ids": torch.zeros(3, 7)})
    assert shown is not None
    assert shown.shape == (3, 1, 4, 4)


def test_images_are_found_under_names_of_the_loops_own() -> None:
    images, labels = torch.zeros(3, 1, 4, 4), torch.zeros(3, 7)
    for batch in (
        {"x": images, "y": labels},
        [[images, images + 1, labels], labels],
        ({"x": images}, labels),
    ):
        shown = images_of(batch)
        assert shown is not None
        assert torch.equal(shown, images)
    assert images_of({"x": images, "mask": images}) is None, "it may be either"


def looking(images: np.ndarray, samples: Any = None, step: int = 7) -> Rows:
    rows = make_rows(np.ones(len(images)), np.full(len(images), 5.0), samples, step)
    return {**rows, **dict(zip(COLUMNS, appearance(torch.from_numpy(images)).numpy().T, strict=True))}


def some_images(count: int, rng: np.random.Generator) -> np.ndarray:
    """Bright spots on black: like digits, far from normally distributed."""
    spots = rng.random((count, 1, 12, 12)) < rng.uniform(0.1, 0.3, (count, 1, 1, 1))
    return np.where(spots, rng.random((count, 1, 12, 12)), -1.0).astype(np.float32)


def test_an_input_unlike_the_others_is_named_at_its_first_visit_with_what_is_unlike() -> None:
    rng = np.random.default_rng(0)
    detector = InputOutlier()
    run = [looking(some_images(16, rng)) for _ in range(40)]
    alarms(detector, run)
    odd = some_images(16, rng)
    odd[3] *= -1  # inverted
    odd[5] = 0.01 * odd[5] - 0.7  # flat, about as bright as the others
    smooth = np.sort(odd[9].ravel()).reshape(12, 12)  # the same pixels
    odd[9, 0] = smooth
    found = {a.samples[0]: a for a in alarms(detector, [looking(odd)])}
    assert set(found) == {3, 5, 9}
    assert re.search(r"sample 3 .*: its mean is 0\.\d+, that of 98% of them -0\.\d+ to", found[3].message)
    assert "its contrast is 0.0" in found[5].message or "its roughness is 0.0" in found[5].message
    assert all(a.value > a.threshold for a in found.values())


def test_false_alarms_on_inputs_keep_to_the_rate_though_some_are_broken() -> None:
    rng = np.random.default_rng(1)
    run = []
    for step in range(600):
        images = some_images(32, rng)
        if step % 8 == 0:
            images[0] = rng.standard_normal((1, 12, 12))
        run.append(looking(images, np.arange(32), step))
    for rate in (0.003, 0.02):
        found = [a.samples[0] for a in alarms(InputOutlier(rate), run)]
        due = rate * 32 * len(run)
        assert due / 2 < sum(sample > 0 for sample in found) < due * 2
        assert found.count(0) >= 73, "of 75"


def test_inputs_that_are_unknown_not_finite_or_all_alike_never_alarm() -> None:
    rng = np.random.default_rng(2)
    detector = InputOutlier()
    alarms(detector, [looking(some_images(16, rng)) for _ in range(40)])
    images = some_images(4, rng)
    images[1, 0, 2, 2] = np.nan
    assert alarms(detector, [looking(images)]) == []
    unknown = {**looking(images), **dict.fromkeys(COLUMNS, np.full(4, np.nan))}
    assert alarms(detector, [unknown, make_rows([1.0], [5.0])]) == []
    assert alarms(InputOutlier(), [looking(np.zeros((16, 1, 4, 4), np.float32))] * 40) == []


def test_an_image_unlike_the_others_is_named_in_a_run(tmp_path: Path) -> None:
    data = identified(48)
    data[6] = 40.0
    train(tmp_path / "log", data=data, epochs=8, batch_size=12, alerts=[InputOutlier(1e-2)])
    named = [a["samples"] for a in diffhook.open_log(tmp_path / "log").alerts()]
    assert [6] in named
    table = diffhook.open_log(tmp_path / "log").train
    expected = appearance(data)[table["sample"]]
    for column, values in zip(COLUMNS, expected.T, strict=True):
        np.testing.assert_array_equal(table[column], values)


def test_thumbnails_are_kept_only_if_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path / "without", epochs=1)
    assert not diffhook.open_log(tmp_path / "without").thumbnails
    train(tmp_path / "with", data=identified(20, 32), epochs=2, thumbnails=16)
    kept = diffhook.open_log(tmp_path / "with").thumbnails
    assert list(kept) == list(range(20))
    with Image.open(io.BytesIO(kept[3])) as image:
        assert image.size == (16, 16)
    with pytest.raises(ConfigurationError, match="thumbnails is -1; expected a whole number from 0 to 512"):
        train(tmp_path / "none", thumbnails=-1)
