"""Flow matching that a loop mixes itself: however its error is written, probes are the batch-1 loop's; where
samples may be the noise, there are none."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import diffhook
from diffhook.capture.objective.noise import noise_bank
from diffhook.integrations.accelerate import DiffHook

SMOOTH = torch.rand(48, 1, 12, 12, generator=torch.Generator().manual_seed(0)).cumsum(3) / 6 - 1
WHITE = torch.randn(48, 1, 12, 12, generator=torch.Generator().manual_seed(0))
SMALL = WHITE[..., :5, :5]  # of too few numbers for their noise to be judged
GRID = diffhook.Grid(3)

Mixed = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # output, x, ε, x_t, σ
Write = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class Net(nn.Module):
    """Told how much noise there is, 0 … 1."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, 6)
        self.inward = nn.Conv2d(1, 6, 3, padding=1)
        self.outward = nn.Conv2d(6, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.outward(F.silu(self.inward(x) + self.time(t[:, None])[..., None, None]))


WRITTEN: dict[str, Write] = {
    "output − target": lambda v, x, e, _, s: ((v - (e - x)) ** 2).mean(),
    "target − output": lambda v, x, e, _, s: (((e - x) - v) ** 2).mean(),
    "ε − x − output, a row at a time": lambda v, x, e, _, s: (e - x - v).square().flatten(1).mean(1).mean(),
    "ε − (x + output)": lambda v, x, e, _, s: (e - (x + v)).pow(2).mean(),
    "mse_loss(target, output)": lambda v, x, e, _, s: F.mse_loss(e - x, v),
    "sample − (x_t − σ output)": lambda v, x, e, xt, s: ((x - (xt - s * v)) ** 2).mean(),
    "(x_t − σ output) − sample": lambda v, x, e, xt, s: F.mse_loss(xt - s * v, x),
    "half the difference": lambda v, x, e, _, s: ((0.5 * (e - x) - 0.5 * v) ** 2).mean(),
}
BACK: dict[str, Write] = {  # x and ε exchanged, σ is the sample's share
    **{name: WRITTEN[name] for name in ("output − target", "target − output", "mse_loss(target, output)")},
    "sample − (x_t + (1 − t) output)": lambda v, e, x, xt, t: ((x - (xt + (1 - t) * v)) ** 2).mean(),
}
CASES = [
    (write, back, name) for back, forms in ((False, WRITTEN), (True, BACK)) for name, write in forms.items()
]


def train(
    log: Path,
    write: Write,
    data: Tensor = SMOOTH,
    *,
    encode: bool = False,
    jitter: float = 0.0,
    back: bool = False,
) -> Net:
    torch.manual_seed(0)
    accelerator, model = Accelerator(cpu=True), Net()
    DiffHook(accelerator, log, every=1, strict=True, probe=diffhook.Probe(None, GRID, label_timesteps=0))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    loader = DataLoader(TensorDataset(data), 16, shuffle=True)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for _ in range(3):
        for (clean,) in loader:
            x = clean.flip(-1) if encode else clean
            x = x + jitter * torch.randn_like(x) if jitter else x
            noise, told = torch.randn_like(x), torch.rand(len(x))
            share = told.view(-1, 1, 1, 1)
            mixed = (1 - share) * x + share * noise
            if back:
                mixed, x, noise = (1 - share) * noise + share * x, noise, x
            accelerator.backward(write(prepared(mixed, told), x, noise, mixed, share))
            optimizer.step()
            optimizer.zero_grad()
    accelerator.end_training()
    return model


def twin_norm(
    model: nn.Module, write: Write, clean: Tensor, sigma: float, seed: int, back: bool = False
) -> float:
    """Of one sample's own loss, in float64."""
    twin, x = copy.deepcopy(model).double(), clean[None].double()
    noise, told = noise_bank(torch.tensor([seed]), clean[None]).double(), torch.tensor([sigma]).double()
    share = told.view(-1, 1, 1, 1)
    x, noise = (noise, x) if back else (x, noise)
    mixed = (1 - share) * x + share * noise
    write(twin(mixed, told), x, noise, mixed, share).backward()
    return float(torch.cat([p.grad.flatten() for p in twin.parameters() if p.grad is not None]).norm())


@pytest.mark.parametrize(
    ("write", "back"),
    [case[:2] for case in CASES],
    ids=[f"{name}, told {('σ', '1 − σ')[back]}" for _, back, name in CASES],
)
def test_probes_are_the_batch_1_loops(write: Write, back: bool, tmp_path: Path) -> None:
    model = train(tmp_path / "log", write, back=back)
    log = diffhook.open_log(tmp_path / "log")
    assert log.objective is not None, log.objective_words
    assert ("flow-to-sample" in log.objective_words) == back
    table: dict[str, Any] = {
        name: log.probe[name] for name in ("sample", "timestep", "noise_seed", "grad_norm")
    }
    last = range(len(table["sample"]) - 12, len(table["sample"]))
    for row in last:
        sigma, seed = float(table["timestep"][row]) / 1000, int(table["noise_seed"][row])
        expected = twin_norm(model, write, SMOOTH[table["sample"][row]], sigma, seed, back)
        assert table["grad_norm"][row] == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("back", [False, True], ids=["told σ", "told 1 − σ"])
@pytest.mark.parametrize("factor", [1.0, 0.3], ids=["unit variance", "scaled"])
def test_small_samples_are_known_by_the_batch(back: bool, factor: float, tmp_path: Path) -> None:
    write, data = WRITTEN["output − target"], factor * SMALL
    model = train(tmp_path / "log", write, data, back=back)
    log = diffhook.open_log(tmp_path / "log")
    assert log.objective is not None, log.objective_words
    table = {name: log.probe[name] for name in ("sample", "timestep", "noise_seed", "grad_norm")}
    last = range(len(table["sample"]) - 12, len(table["sample"]))
    for row in last:
        sigma, seed = float(table["timestep"][row]) / 1000, int(table["noise_seed"][row])
        expected = twin_norm(model, write, data[table["sample"][row]], sigma, seed, back)
        assert table["grad_norm"][row] == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize(
    ("options", "recognised", "told"),
    [
        ({"data": WHITE}, True, "flow-prediction"),
        ({"data": WHITE, "back": True}, True, "flow-to-sample"),
        ({"data": WHITE, "jitter": 0.1}, True, "flow-prediction"),
        ({"data": WHITE, "jitter": 0.1, "back": True}, False, "told how much of the sample"),
        ({"data": SMALL, "encode": True}, False, "fewer than 128 numbers"),
        ({"data": WHITE, "encode": True}, False, "samples look like noise"),
        ({"data": WHITE, "encode": True, "back": True}, False, "samples look like noise"),
        ({"back": True}, True, "flow-to-sample"),
        ({"encode": True}, True, "flow-prediction"),
        ({"encode": True, "back": True}, True, "flow-to-sample"),
    ],
)
def test_samples_and_noise_are_never_exchanged(
    options: dict[str, Any], recognised: bool, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "log", WRITTEN["output − target"], **options)
    log = diffhook.open_log(tmp_path / "log")
    assert told in log.objective_words
    assert (log.objective is not None, len(log.probe) > 0) == (recognised, recognised)
    assert recognised or "objective=" in capsys.readouterr().out
