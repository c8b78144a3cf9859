"""Scripts that know nothing of us, under ``diffhook run``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, data_loader

import diffhook
from diffhook.cli import main
from diffhook.log.samples import name_id

SCRIPTS = Path(__file__).with_name("scripts")


@pytest.fixture(autouse=True)
def _own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv[:])
    monkeypatch.setattr(sys, "path", sys.path[:])


def _run(script: str, log: Path, out: Path, *arguments: str, options: tuple[str, ...] = ()) -> int:
    out.mkdir(exist_ok=True)
    where = str(SCRIPTS / script)
    return main(["run", "--log", str(log), *options, where, "--output_dir", str(out), *arguments])


def _rows(log: Path) -> list[tuple[int, int, int]]:
    """(step, sample, timestep), sorted."""
    table = diffhook.open_log(log).train
    columns = (table[name].astype(int).tolist() for name in ("step", "sample", "timestep"))
    return sorted(zip(*columns, strict=True))


def _truth(out: Path) -> list[tuple[int, int, int]]:
    visits = [visit for path in out.glob("truth-*.json") for visit in json.loads(path.read_text())]
    return sorted(
        (step, sample, timestep)
        for step, samples, timesteps in visits
        for sample, timestep in zip(samples, timesteps, strict=True)
    )


def _plain(script: str, out: Path, *arguments: str) -> Any:
    import runpy

    out.mkdir(exist_ok=True)
    sys.argv = [script, "--output_dir", str(out), *arguments]
    runpy.run_path(str(SCRIPTS / script), run_name="__main__")
    return torch.load(out / "end-0.pt")


def test_an_unmodified_script_is_logged_exactly_and_ends_bit_identical(tmp_path: Path) -> None:
    before = _plain("unconditional.py", tmp_path / "plain")
    assert _run("unconditional.py", tmp_path / "log", tmp_path / "out") == 0
    assert len(_truth(tmp_path / "out")) == 20
    assert _rows(tmp_path / "log") == _truth(tmp_path / "out")
    torch.testing.assert_close(torch.load(tmp_path / "out/end-0.pt"), before, rtol=0, atol=0)
    snapshots = [s.step for s in diffhook.open_log(tmp_path / "log").snapshots]
    assert snapshots == [2, 4, 6], "those of checkpoints that the script has deleted are kept"


def test_a_script_that_resumes_by_walking_continues_its_log(tmp_path: Path) -> None:
    """Killed at step 5, resumed from checkpoint-4: step 4 was taken twice and counts once."""
    out, log = tmp_path / "out", tmp_path / "log"
    with pytest.raises(SystemExit):
        _run("unconditional.py", log, out, "--fail_at_step", "5")
    assert {step for step, _, _ in _rows(log)} == {0, 1, 2, 3, 4}
    assert _run("unconditional.py", log, out, "--resume_from_checkpoint") == 0
    rows = _rows(log)
    assert [row for row in rows if row[0] >= 4] == _truth(out)
    steps = [step for step, _, _ in rows]
    assert [steps.count(step) for step in range(6)] == [4, 4, 2, 4, 4, 2]


def test_names_of_a_lora_scripts_images_are_kept(tmp_path: Path) -> None:
    assert _run("text_to_image_lora.py", tmp_path / "log", tmp_path / "out", "--snr_gamma", "5") == 0
    log = diffhook.open_log(tmp_path / "log")
    names = [name for visited, _ in json.loads((tmp_path / "out/truth.json").read_text()) for name in visited]
    timesteps = [t for _, drawn in json.loads((tmp_path / "out/truth.json").read_text()) for t in drawn]
    assert len(log.train) == len(names) == 12
    assert [log.names()[sample] for sample in log.train["sample"].tolist()] == names
    assert log.train["sample"].tolist() == [name_id(name) for name in names]
    assert log.train["timestep"].tolist() == timesteps
    assert all("lora" in name for name, _ in log.config["identity"]["parameters"])
    assert log.train["step"].tolist() == [0] * 4 + [1] * 2 + [2] * 4 + [3] * 2


def test_a_scripts_own_error_keeps_its_traceback_and_leaves_nothing_of_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    originals = Accelerator.__init__, data_loader.DataLoaderShard.__iter__
    with pytest.raises(SystemExit) as caught:
        _run("unconditional.py", tmp_path / "log", tmp_path / "out", "--fail_at_step", "1")
    assert caught.value.code == 1
    assert "ValueError: the script's own error" in capsys.readouterr().err
    assert (Accelerator.__init__, data_loader.DataLoaderShard.__iter__) == originals
    assert len(_rows(tmp_path / "log")) == 4, "rows until then are kept"


def test_a_script_without_an_accelerator_is_told_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys\nprint(__name__, sys.argv[1:], sys.path[0])\n")
    assert main(["run", "--log", str(tmp_path / "log"), str(script), "--json", "-x"]) == 0
    assert capsys.readouterr().out.strip() == f"__main__ ['--json', '-x'] {tmp_path}"
    assert "the script made no Accelerator" in caplog.text


def test_tables_that_a_trainer_cannot_show_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch\n"
        "from transformers import Trainer, TrainingArguments\n"
        "Trainer(torch.nn.Linear(1, 1), TrainingArguments(sys.argv[1], report_to=[], use_cpu=True))\n"
    )
    command = [
        "run",
        "--log",
        str(tmp_path / "log"),
        "--table-every",
        "5",
        str(script),
        str(tmp_path / "out"),
    ]
    assert main(command) == 0
    assert "`diffhook watch LOG` shows the table" in caplog.text


def test_bad_use_is_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--log", "x", str(tmp_path / "none.py")]) == 2
    assert capsys.readouterr().err == f"diffhook: there is no script {tmp_path / 'none.py'}\n"
    assert main(["run", "--log", "x", "--every", "0", __file__]) == 2
    assert "every is 0" in capsys.readouterr().err


ACCELERATE = "accelerate.commands.launch --cpu --num_processes 1 --num_machines 1 --dynamo_backend no"
TORCHRUN = "torch.distributed.run --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint localhost:0"


@pytest.mark.parametrize("launcher", [ACCELERATE, TORCHRUN], ids=["accelerate launch", "torchrun"])
def test_launchers_of_processes_run_it_by_its_module(tmp_path: Path, launcher: str) -> None:
    (tmp_path / "out").mkdir()
    command = [
        sys.executable, "-m", *launcher.split(), "-m", "diffhook.run", "-l", str(tmp_path / "log"),
        str(SCRIPTS / "unconditional.py"), "--output_dir", str(tmp_path / "out"), "--train_batch_size", "2",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS.parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    truth = _truth(tmp_path / "out")
    assert len(truth) in (20, 24), "two processes repeat two samples to come out even"
    assert _rows(tmp_path / "log") == truth


def test_the_module_form_is_the_command(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit(7)\n")
    command = [sys.executable, "-m", "diffhook.run", "--log", str(tmp_path / "log"), str(script)]
    done = subprocess.run(command, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 7


def test_a_loop_that_is_not_watched_is_told_so_in_its_first_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script = tmp_path / "plain.py"
    script.write_text(
        "import logging, torch\n"
        "weight = torch.nn.Parameter(torch.ones(2))\n"
        "optimizer = torch.optim.SGD([weight], 0.1)\n"
        "for _ in range(3):\n"
        "    weight.square().sum().backward()\n"
        "    optimizer.step()\n"
        "logging.getLogger('script').warning('over')\n"
    )
    assert main(["run", "--log", str(tmp_path / "log"), str(script)]) == 0
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    first, over, last = said
    assert "captures nothing so far" in first
    assert "TorchHook" in first
    assert over == "over"
    assert "diffhook captured nothing" in last
