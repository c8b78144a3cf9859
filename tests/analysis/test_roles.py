"""Regularisation images are told apart wherever samples are listed, and each kind can be had alone."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

import diffhook
from diffhook.analysis.execution import Execution
from diffhook.analysis.roles import regularisation_images
from diffhook.analysis.sample_table import sample_table
from diffhook.cli import main
from diffhook.errors import ConfigurationError
from diffhook.log import LogWriter
from diffhook.log.samples import ROLE_STRIDE, name_id
from diffhook.log.testing import CONFIG, some_rows
from diffhook.report.facets import facets_of

NAMES = [f"{folder}/{i}.png" for folder in ("cat", "animal") for i in range(6)]
IDS = np.array([name_id(name) for name in NAMES])
REGULARISATION = {int(i) for i, name in zip(IDS, NAMES, strict=True) if name.startswith("animal")}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Four visits of each sample; a sample has its role in the rows that its trainer told it for."""
    writer = LogWriter(tmp_path / "log", CONFIG)
    writer.keep_names({int(i): name for i, name in zip(IDS, NAMES, strict=True)})
    for step in range(4):
        role = np.isin(IDS, list(REGULARISATION)).astype(np.int8)
        writer.put("train", {**some_rows(12, 12 * step, step), "sample": IDS, "role": role})
    writer.close()
    return tmp_path / "log"


def test_every_list_of_samples_tells_and_divides_them(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = diffhook.open_log(log)
    assert regularisation_images(opened) == REGULARISATION
    ranking = diffhook.outliers(opened)
    for found in (ranking, sample_table(opened), diffhook.self_influence(opened)):
        assert {r["sample"] for r in found.records() if r["role"] == "regularisation"} == REGULARISATION
        assert set(found.of_role("regularisation").sample_ids.tolist()) == REGULARISATION
        assert set(found.of_role("training").sample_ids.tolist()) == set(IDS.tolist()) - REGULARISATION
        with pytest.raises(ConfigurationError, match="expected one of training, regularisation"):
            found.of_role("class")
    (facet,) = (f for f in facets_of(opened, ranking, None, Execution()) if f.name == "role")
    assert dict(zip(facet.values, facet.counts, strict=True)) == {"training": 6, "regularisation": 6}
    for command in ("outliers", "watch"):
        file = tmp_path / f"{command}.csv"
        assert main([command, str(log), "--role", "training", "--csv", str(file), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)["samples"]
        assert {record["role"] for record in told} == {"training"}
        with file.open() as lines:
            assert {row["name"].split("/")[0] for row in csv.DictReader(lines)} == {"cat"}
    assert main(["info", str(log), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["samples"], facts["regularisation images"], facts["class images"]) == (12, 6, 0)


def test_a_log_without_them_lists_samples_as_it_did(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path, CONFIG)
    writer.put("train", {**some_rows(12), "role": np.zeros(12, np.int8)})
    writer.close()
    ranking = diffhook.outliers(tmp_path)
    assert all("role" not in record for record in ranking.records())
    assert len(ranking.of_role("training")) == 12


def test_class_images_of_prior_preservation_are_among_them(tmp_path: Path) -> None:
    rows = some_rows(12)
    ids = np.concatenate([rows["sample"][:6], rows["sample"][:6] + ROLE_STRIDE])
    writer = LogWriter(tmp_path, CONFIG)
    writer.put("train", {**rows, "sample": ids, "role": (ids // ROLE_STRIDE).astype(np.int8)})
    writer.close()
    found = diffhook.outliers(tmp_path).of_role("regularisation")
    assert set(found.sample_ids.tolist()) == set(ids[6:].tolist())
