"""Every block of code in the README does what it says."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMPipeline, StableDiffusionPipeline
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import diffhook
from diffhook.cli import main
from diffhook.integrations.accelerate import DiffHook
from tests.models import unet
from tests.pipelines import images, save_stable_diffusion, train_lora
from tests.runs import SCHEDULER

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCKS = [(language, code) for language, code in _FENCED.findall(README) if language]
PICTURES = images(12)[:, :1]
SCRIPT = """
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset
from tests.runs import TinyDenoiser, denoising_losses, identified
accelerator = Accelerator(cpu=True)
model, loader = TinyDenoiser(), DataLoader(TensorDataset(identified()), 4)
model, loader, optimizer = accelerator.prepare(model, loader, torch.optim.AdamW(model.parameters()))
for (clean,) in loader:
    batch = clean, torch.randn_like(clean), torch.randint(0, 1000, (len(clean),))
    accelerator.backward(denoising_losses(model, batch).mean())
    optimizer.step()
    optimizer.zero_grad()
"""


class Pictures(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return len(PICTURES)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"id": index, "images": PICTURES[index]}


def _losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    clean = batch["images"]
    noise, timesteps = torch.randn_like(clean), torch.randint(0, 1000, (len(clean),))
    predicted = model(SCHEDULER.add_noise(clean, noise, timesteps), timesteps).sample
    return F.mse_loss(predicted, noise, reduction="none").flatten(1).mean(1)


def _train(accelerator: Accelerator) -> None:
    """The loop around the first block."""
    model = unet().model
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(Pictures(), 4, shuffle=True))
    for _ in range(6):  # 72 rows: enough to recognise the loss by
        for batch in loader:
            accelerator.backward(_losses(model, batch).mean())
            optimizer.step()
            optimizer.zero_grad()
    accelerator.end_training()


def _train_unwatched(out: Path) -> None:
    """A pipeline, and two checkpoints of its denoiser."""
    model: Any = unet().model
    DDPMPipeline(model, SCHEDULER).save_pretrained(out)
    for step in (10, 20):
        model.save_pretrained(out / f"checkpoint-{step}" / "unet")


def _save(folder: Path, count: int, channels: int) -> None:
    folder.mkdir(parents=True)
    for index, picture in enumerate(images(12)[:count, :channels]):
        pixels = ((picture + 1) * 127.5).round().byte().permute(1, 2, 0).squeeze(2).numpy()
        Image.fromarray(pixels).save(folder / f"{index:02}.png")


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with what the README's commands are given."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    AcceleratorState._reset_state(True)
    _save(tmp_path / "data" / "butterflies", 12, 1)
    _save(tmp_path / "generated", 2, 1)
    _save(tmp_path / "mine", 2, 3)
    (tmp_path / "mine.txt").write_text("a cat\nthe red sea\n")
    (tmp_path / "eight.txt").write_text("a cat\n" * 8)
    (tmp_path / "train.py").write_text(SCRIPT)
    yield tmp_path
    AcceleratorState._reset_state(True)


def _python(code: str, names: dict[str, Any]) -> None:
    exec(compile(code, "README.md", "exec"), names)
    if "runs/butterflies" in code and "hook" in names and not Path("runs/butterflies").exists():
        _train(names["accelerator"])


def _own(code: str) -> dict[str, Any]:
    """What blocks are given that do not go on from those before them."""
    if "from_checkpoints" in code:
        return {"dataset": Pictures()}  # of which nothing is excluded
    if "Trajectory" in code:
        pipe = StableDiffusionPipeline.from_pretrained("models/sd")
        return {"pipe": pipe, "log": diffhook.open_log("runs/lora")}
    return {}


def _shell(line: str) -> None:
    words = shlex.split(line, comments=True)
    if "pip" in words:  # the test command installs; that the extras exist is what is left to see
        asked = re.findall(r"\[([\w,]+)\]", line)
        extras = ConfigParser()
        extras.read(ROOT / "setup.cfg")
        assert all(extra in extras["options.extras_require"] for one in asked for extra in one.split(","))
        return
    if words[0] == "diffhook" and words[1] != "run":
        if "models/sd" in words and not Path("models/sd").exists():
            train_lora(save_stable_diffusion(Path("models/sd")), Path("runs/lora"), projection_dim=64)
        if "checkpoints" in words:
            _train_unwatched(Path("out"))
        if "runs/second" in words:
            accelerator = Accelerator()
            DiffHook(accelerator, "runs/second")
            _train(accelerator)
        assert main(words[1:]) == 0, line
        return
    start = words.index("--log")  # of `diffhook run`, by whatever it is launched
    log = ["--log", f"runs/by-{words[0]}", *words[start + 2 :]]
    subprocess.run([sys.executable, "-m", "diffhook.run", *log], check=True)
    assert len(diffhook.open_log(log[1]).train) == 12


def test_its_blocks_run_in_their_order(workspace: Path) -> None:
    model = unet().model
    names: dict[str, Any] = {
        "dataset": Pictures(),
        "images": PICTURES[:2],
        "objective": diffhook.DiffusionObjective(SCHEDULER),
        "noise_scheduler": SCHEDULER,
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters()),
        "loader": DataLoader(Pictures(), 4),
        "loss": lambda model, batch: _losses(model, batch).mean(),
        "sample_losses": _losses,
        "batch": next(iter(DataLoader(Pictures(), 4))),
        "url": "http://localhost/hook",
    }
    for language, code in BLOCKS:
        if language == "python":
            own = _own(code)
            _python(code, {**names, **own} if own else names)
        else:
            for line in code.splitlines():
                _shell(line)
    assert len(diffhook.open_log("runs/butterflies").train) == 72
    assert len(diffhook.open_log("runs/plain").train) == 12
    assert names["scores"].top(10).sample_ids.shape == (2, 10)
    assert len(names["dataset"]) == 12 - len(Path("exclude.txt").read_text().split())
    assert names["engine"].norms.shape == (4,)
    assert Path("page.html").exists()


def test_its_imports_and_names_are_there_in_a_fresh_process() -> None:
    blocks = [code for language, code in BLOCKS if language == "python"]
    code = "\n".join([*blocks, *re.findall(r"`([^`]+)`", _FENCED.sub("", README))])
    imports = sorted(set(re.findall(r"from diffhook[\w.]* import [\w, ]+", code)))
    names = sorted(set(re.findall(r"(?<!from )(?<!-m )(?<![\w./-])diffhook\.[\w.]*\w", code)))
    assert len(imports) > 4
    assert len(names) > 6
    # The names first, by nothing but `import diffhook`: an import of a part makes it one of the whole.
    script = "\n".join(["import diffhook", *names, *imports])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
