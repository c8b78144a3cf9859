"""The command line: what a person types, sees, and gets as exit status."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch.utils.data import DataLoader

import diffhook
from diffhook.cli import main
from diffhook.cli.main import COMMANDS
from diffhook.integrations.accelerate import DiffHook
from diffhook.log.samples import name_id
from tests.models import unet
from tests.report.logs import write_log
from tests.runs import SCHEDULER, TinyDenoiser, denoising_losses, train

DATA = torch.randn(12, 1, 16, 16, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A UNet's log and the images that it was trained on."""
    root = tmp_path_factory.mktemp("cli")
    objective = diffhook.DiffusionObjective(SCHEDULER)
    probe = diffhook.Probe(samples=None, grid=diffhook.Grid(2))
    train(
        root / "log", make_model=lambda: unet().model, data=DATA, objective=objective, probe=probe,
        projection_dim=128,
    )  # fmt: skip
    (root / "images").mkdir()
    for index, image in enumerate(DATA):
        pixels = ((image[0].numpy() + 1) * 127.5).astype(np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{index:03d}.png")
    np.save(root / "images.npy", DATA.numpy())
    return root


def run(*arguments: Any) -> int:
    try:
        return main([str(a) for a in arguments])
    except SystemExit as error:  # argparse's own
        return int(error.code or 0)


def test_the_whole_road(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, out = workspace / "log", workspace
    assert run("query", log, "--images", workspace / "images", "--name", "again", "--timesteps", 2) == 0
    assert "12 queries at" in capsys.readouterr().out
    assert run("info", log, "--json") == 0
    info = json.loads(capsys.readouterr().out)
    assert info["train rows"] == 36
    assert info["queries"] == {"again": 2 * 24}, "rows to be set against events, and against probes"
    assert run("influence", log, "--queries", "again", "--top", 3, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    expected = diffhook.influence(diffhook.open_log(log), "again").top(3)
    assert [q["samples"] for q in found["queries"]] == expected.sample_ids.tolist()
    assert run("influence", log, "--queries", "again", "--csv", out / "all.csv") == 0
    with open(out / "all.csv") as file:
        assert len(list(csv.DictReader(file))) == 12 * 12
    capsys.readouterr()
    assert run("bias", log, "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["generality"]) == 3, "the default and the paper's two"
    assert run("verify", log) == 0
    assert "whole" in capsys.readouterr().out
    assert run("alerts", log) == 0


@pytest.mark.parametrize("by", ["norm", "tracin", "retrac"])
def test_outliers_writes_csv_json_and_a_page(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], by: str
) -> None:
    page, table = tmp_path / "page.html", tmp_path / "outliers.csv"
    status = run(
        "outliers", workspace / "log", "--by", by, "--source", "probe", "--json",
        "--csv", table, "--html", page, "--images", workspace / "images.npy",
    )  # fmt: skip
    assert status == 0
    printed = json.loads(capsys.readouterr().out)
    with open(table) as file:
        rows = list(csv.DictReader(file))
    assert [r["sample"] for r in rows] == [str(s["sample"]) for s in printed["samples"]]
    assert len(rows) == 12
    html = page.read_text()
    assert html.count("data:image/webp;base64,") >= 12
    assert "://" not in html, "the page must not reach outside"


def test_the_page_of_a_ranking_is_filtered_by_the_labels_that_are_given(
    workspace: Path, tmp_path: Path
) -> None:
    page, labels = tmp_path / "page.html", tmp_path / "labels.txt"
    labels.write_text("\n".join(["tabby", "ginger"] * 6))
    assert run("outliers", workspace / "log", "--by", "norm", "--labels", labels, "--html", page) == 0
    html = page.read_text()
    assert "tabby" in html
    assert "ginger" in html


def test_images_without_a_page_to_show_them_on_are_told(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("outliers", workspace / "log", "--images", workspace / "images") == 2
    assert "name its file with --html" in capsys.readouterr().err


def test_samples_with_names_are_listed_excluded_and_shown_by_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"{index}.png" for index in range(16)]
    write_log(tmp_path / "log", 16, 1, names=names)
    (tmp_path / "images").mkdir()
    for name in names:
        Image.new("L", (4, 4)).save(tmp_path / "images" / name)
    page, out = tmp_path / "page.html", tmp_path / "exclude.txt"
    files = ("--html", page, "--images", tmp_path / "images", "--exclude", 3, out)
    assert run("outliers", tmp_path / "log", "--top", 3, *files) == 0
    shown = capsys.readouterr().out
    listed = out.read_text().splitlines()
    assert len(listed) == 3
    assert set(listed) < set(names)
    assert all(name in shown for name in listed)
    assert page.read_text().count("data:image/webp") >= 16
    asked = ("influence", tmp_path / "log", "--queries", "held-out", "--top", 2)
    assert run(*asked, "--csv", tmp_path / "all.csv") == 0
    shown = capsys.readouterr().out
    assert run(*asked, "--json") == 0
    for query in json.loads(capsys.readouterr().out)["queries"]:
        assert [name_id(name) for name in query["names"]] == query["samples"]
        assert all(name in shown for name in query["names"])
    with open(tmp_path / "all.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 * 16
    assert all(name_id(row["name"]) == int(row["sample"]) for row in rows)


def test_names_that_are_no_utf_8_come_back_as_the_files_are_called(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [os.fsdecode(b"caf\xe9-%d.png" % index) for index in range(15)] + ["half \ud83d"]
    write_log(tmp_path / "log", 16, 1, names=names)
    out, page = tmp_path / "exclude.txt", tmp_path / "page.html"
    tables = {kind: tmp_path / f"table.{kind}" for kind in ("csv", "parquet")}
    files = [part for kind, path in tables.items() for part in (f"--{kind}", path)]
    assert run("outliers", tmp_path / "log", *files, "--exclude", 16, out, "--html", page) == 0
    found = out.read_bytes().splitlines()
    assert sorted(found) == sorted([*map(os.fsencode, names[:15]), b"half \xed\xa0\xbd"])
    assert b"caf\xe9-3.png" in tables["csv"].read_bytes()
    assert "caf\ufffd-3.png" in page.read_text(encoding="utf-8")
    assert "caf\ufffd-3.png" in set(pandas.read_parquet(tables["parquet"])["name"])
    assert run("influence", tmp_path / "log", "--queries", "held-out", *files) == 0
    assert b"caf\xe9-3.png" in tables["csv"].read_bytes()
    assert "caf\ufffd-3.png" in set(pandas.read_parquet(tables["parquet"])["name"])
    shown = capsys.readouterr().out
    assert "caf\ufffd-" in shown
    assert "\udce9" not in shown


def test_report_shows_queries_beside_their_proponents(workspace: Path, tmp_path: Path) -> None:
    log = workspace / "log"
    images = workspace / "images"
    assert run("query", log, "--images", images, "--name", "shown", "--timesteps", 1, "--draws", 1) == 0
    page = tmp_path / "page.html"
    shown = ["--queries", "shown", "--query-images", f"shown={images}"]
    assert run("report", log, "--images", images, *shown, "--out", page) == 0
    html = page.read_text()
    assert html.count('class="query"') == 12
    assert html.count('class="influences proponents"') == html.count('class="influences opponents"') == 24


def test_every_command_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for name, summary in COMMANDS.items():
        assert run(name, "--help") == 0
        assert "example: diffhook" in capsys.readouterr().out
        documented = import_module(f"diffhook.cli.{name}").__doc__ or ""
        assert documented.partition("\n\n")[0] == summary


def test_help_loads_nothing_that_it_does_not_need() -> None:
    heavy = ("torch", "numpy", "scipy", "dask", "zarr", "jinja2", "rich")
    code = f"""
import sys
from diffhook.cli import main
try:
    main(["--help"])
except SystemExit:
    print("loaded", [name for name in {heavy} if name in sys.modules])
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "loaded []" in shown


@pytest.mark.parametrize(
    ("typed", "offered"), [("diffhook outl", "outliers"), ("diffhook outliers log --ex", "--exclude")]
)
def test_the_shell_completes_commands_and_options(typed: str, offered: str, tmp_path: Path) -> None:
    answer = tmp_path / "answer"
    asked = {
        "_ARGCOMPLETE": "1",
        "COMP_LINE": typed,
        "COMP_POINT": str(len(typed)),
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
    }
    subprocess.run([sys.executable, "-m", "diffhook"], env=os.environ | asked, check=True)
    assert offered in answer.read_text()


@pytest.mark.parametrize("place", [[], ["no/such/log"]], ids=["without a log", "with one"])
def test_the_methods_are_listed_with_formula_and_source(
    place: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    from diffhook.analysis import METHODS

    assert run("influence", *place, "--method", "help") == 0
    shown = capsys.readouterr().out
    assert run("influence", *place, "--method", "help", "--json") == 0
    listed = {entry.pop("name"): entry for entry in json.loads(capsys.readouterr().out)}
    assert set(listed) == set(METHODS)
    for name, method in METHODS.items():
        assert all(text in shown for text in (name, method.formula, method.reference))
        assert (listed[name]["formula"], listed[name]["reference"]) == (method.formula, method.reference)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "{root}/nowhere"], "no log at {root}/nowhere: the folder does not exist"),
        (["info", "{root}/images"], "no diffhook log at {root}/images: it holds no zarr group"),
        (["outliers", "{root}/images.npy"], "{root}/images.npy is a file; a log is a folder"),
        (["influence", "{root}/log", "--queries", "nobody"], "has no queries 'nobody'"),
        (["influence", "{root}/log"], "--queries is missing"),
        (["influence", "--queries", "x"], "LOG is missing"),
        (["influence", "--queries", "x", "--top", "3", "{root}/nowhere"], "no log at {root}/nowhere"),
        (["influence", "{root}/log", "--queries", "x", "--method", "treck"], "no method 'treck'"),
        (["query", "{root}/log", "--images", "{root}/none", "--name", "q"], "no images at {root}/none"),
        (["query", "{root}/log", "--images", "{root}/log", "--name", "q"], "holds no image files"),
        (["query", "{root}/log", "--images", "{root}/images", "--name", "../q"], "cannot name a part"),
        (["report", "{root}/log", "--images", "{root}/few.npy"], "has 3 images, but the log knows sample 11"),
        (["report", "{root}/log", "--query-images", "q={root}/images"], "names 'q'; the sets shown are"),
        (["report", "{root}/log", "--queries", "a", "--queries", "b", "--query-images", "i"], "any of a, b"),
        (["report", "{root}/log", "--queries", "nobody"], "has no queries 'nobody'"),
        (["nonsense", "{root}/log"], "invalid choice"),
        (["report", "{root}/log", "--top", "-5"], "--top: -5; expected a whole number, 0 or more"),
        (["outliers", "{root}/log", "--top", "few"], "--top: few; expected a whole number, 0 or more"),
        (["alerts", "{root}/log", "--top", "-1"], "--top: -1; expected a whole number, 0 or more"),
        (["outliers", "{root}/log", "--by", "duplicate"], "invalid choice: 'duplicate'"),
        (["bias", "{root}/log", "--bins", "-3"], "bins is -3; expected at least 1"),
        (["bias", "{root}/log", "--bins", "0"], "bins is 0; expected at least 1"),
        (["bias", "{root}/log", "--bins", "100000"], "bins is 100000; expected at most 1000"),
        (["bias", "{root}/log", "--top", "0"], "k is 0; expected at least 1"),
        (
            ["query", "{root}/log", "--images", "{root}/images", "--name", "q", "--batch-size", "0"],
            "batch_size is 0; expected at least 1",
        ),
        (["evaluate", "{root}/log", "--outliers", "{root}/words.txt"], "words.txt holds no sample ids"),
        (["evaluate", "{root}/log", "--outliers", "{root}/objects.npy"], "no array of numbers or texts"),
        (["outliers"], "required: LOG"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    workspace: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(workspace / "few.npy", np.zeros((3, 16, 16)))
    np.save(workspace / "objects.npy", np.array([{}, 1], object))
    (workspace / "words.txt").write_text("3\nabc\n")
    assert run(*(a.format(root=workspace) for a in arguments)) == 2
    shown = capsys.readouterr()
    last = shown.err.strip().splitlines()[-1]
    assert message.format(root=workspace) in last
    assert "Traceback" not in shown.err


@pytest.mark.parametrize("error", [RuntimeError, AssertionError])
def test_a_device_that_is_not_there_is_named(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Any
) -> None:
    def absent(*_: Any, device: Any) -> None:
        raise error(f"no {device} here\nand more")

    monkeypatch.setattr(torch, "empty", absent)
    asked = ("--images", workspace / "images", "--name", "q", "--device", "cuda:0")
    assert run("query", workspace / "log", *asked) == 2
    assert capsys.readouterr().err == "diffhook: --device cuda:0: no cuda:0 here\n"


@pytest.mark.filterwarnings("ignore:per-sample gradients leave out 1")
def test_info_says_at_which_steps_and_what_was_left_out(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("info", workspace / "log") == 0
    shown = capsys.readouterr().out
    assert re.search(r"^  snapshots +1, at step 9 *$", shown, re.MULTILINE)
    assert "parameters left out" not in shown

    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    DiffHook(accelerator, tmp_path / "log", projection_dim=0)
    model = TinyDenoiser()
    model.register_parameter("penalised", torch.nn.Parameter(torch.ones(3)))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(DATA, 4))
    for clean in loader:
        batch = (clean, torch.randn_like(clean), torch.randint(0, 1000, (len(clean),)))
        accelerator.backward(denoising_losses(model, batch).mean() + model.penalised.square().sum())
        optimizer.step()
        optimizer.zero_grad()
    accelerator.end_training()
    capsys.readouterr()
    assert run("info", tmp_path / "log") == 0
    assert re.search(r"parameters left out +1: penalised \(its uses never met", capsys.readouterr().out)
    assert run("info", tmp_path / "log", "--json") == 0
    assert set(json.loads(capsys.readouterr().out)["parameters left out"]) == {"penalised"}


def test_a_query_of_the_wrong_shape_is_status_2(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "bad.npy", np.zeros((3, 2, 2, 2, 2)))
    assert run("query", workspace / "log", "--images", tmp_path / "bad.npy", "--name", "bad") == 2
    assert "bad.npy has shape (3, 2, 2, 2, 2) of float64; expected numbers" in capsys.readouterr().err


def test_ctrl_c_is_one_line_and_status_130(
    workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def pressed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("diffhook.cli.info.open_log", pressed)
    assert main(["info", str(workspace / "log")]) == 130
    assert capsys.readouterr() == ("", "diffhook: interrupted\n")
