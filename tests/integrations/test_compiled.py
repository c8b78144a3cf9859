"""Compiled models: captured steps run uncompiled, the others compiled, and the graph is the loop's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import TorchDynamoPlugin, compile_regions
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import diffhook
from diffhook.gradients import PerSampleGradients
from diffhook.integrations.accelerate import DiffHook
from tests.runs import SCHEDULER, denoising_losses, identified
from tests.twins import sample_gradients

STEPS, EVERY = 6, 2


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inward = nn.Linear(width, 2 * width)
        self.outward = nn.Linear(2 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.outward(F.gelu(self.inward(self.norm(hidden))))


class Denoiser(nn.Module):
    """Blocks that repeat, and a bare parameter."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.time = nn.Linear(2, width)
        self.inward = nn.Linear(8, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.scale = nn.Parameter(torch.ones(width))
        self.outward = nn.Linear(width, 8)

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> Any:
        angle = timestep.to(sample.dtype)[:, None] / 100
        time = self.time(torch.cat([angle.sin(), angle.cos()], 1))
        hidden = self.inward(sample) + time[:, None, None]
        for block in self.blocks:
            hidden = block(hidden)
        return (self.outward(hidden * self.scale),)


class Backend:
    """Runs what was traced as it is, and counts."""

    def __init__(self) -> None:
        self.graphs = self.calls = 0

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1

        def run(*args: Any) -> Any:
            self.calls += 1
            return graph.forward(*args)

        return run


Compile = Callable[[nn.Module, Any], Any]


def _wrapped(model: nn.Module, backend: Any) -> Any:
    return torch.compile(model, backend=backend, fullgraph=True)


def _in_place(model: nn.Module, backend: Any) -> Any:
    model.compile(backend=backend, fullgraph=True)
    return model


def _blocks(model: nn.Module, backend: Any) -> Any:
    for block in model.blocks:  # type: ignore[union-attr]
        block.compile(backend=backend, fullgraph=True)
    return model


def _regions(model: nn.Module, backend: Any) -> Any:
    return compile_regions(model, backend=backend)


def _within_a_function(model: nn.Module, backend: Any) -> Any:
    return torch.compile(lambda *args, **kwargs: model(*args, **kwargs), backend=backend, fullgraph=True)


FORMS = [_wrapped, _in_place, _blocks, _regions]


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    yield
    assert torch._dynamo.eval_frame._stance.stance == "default", "the compiler is as it was"
    assert not torch.nn.modules.module._has_any_global_hook()


class Training:
    """A loop over a compiled model, and what a batch-1 loop says of each of its samples.

    Args:
        log: None: without us.
        before, after: compile it before or after ``prepare``.
    """

    def __init__(
        self,
        log: Path | None,
        before: Compile | None = None,
        after: Compile | None = None,
        accelerator: Accelerator | None = None,
        **options: Any,
    ) -> None:
        torch.manual_seed(3)
        self.backend = Backend()
        self.model = Denoiser()
        self.norms: dict[tuple[int, int], float] = {}
        loop = accelerator or Accelerator(cpu=True)
        if log is not None:
            DiffHook(loop, log, strict=True, projection_dim=16, **{"every": EVERY, **options})
        called = before(self.model, self.backend) if before else self.model
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        loader = DataLoader(TensorDataset(identified()), 4, shuffle=True)
        called, optimizer, loader = loop.prepare(called, optimizer, loader)
        called = after(called, self.backend) if after else called
        for epoch in range(STEPS // 3):
            for index, (clean,) in enumerate(loader):
                noise, timesteps = torch.randn_like(clean), torch.randint(0, 1000, (len(clean),))
                self._note(epoch * 3 + index, (clean, noise, timesteps))
                loss = denoising_losses(called, (clean, noise, timesteps)).mean()
                loop.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        loop.end_training()

    def _note(self, step: int, batch: tuple[Tensor, Tensor, Tensor]) -> None:
        twin = Denoiser()
        twin.load_state_dict({n.replace("_orig_mod.", ""): p for n, p in self.model.state_dict().items()})
        gradients = sample_gradients(twin, denoising_losses, batch)
        for image, gradient in zip(batch[0], gradients, strict=True):
            self.norms[step, round(float(image[0, 0, 0]) * 16)] = float(gradient.norm())

    def assert_rows(self, log: Path, steps: range) -> None:
        """Those of these steps, exactly."""
        table = diffhook.open_log(log).train
        found = dict(zip(zip(table["step"], table["sample"], strict=True), table["grad_norm"], strict=True))
        expected = {key: norm for key, norm in self.norms.items() if key[0] in steps}
        assert found.keys() == expected.keys()
        for key, norm in expected.items():
            np.testing.assert_allclose(found[key], norm, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_captured_steps_have_exact_rows_and_the_others_run_the_one_graph(
    tmp_path: Path, form: Compile
) -> None:
    plain = Training(None, form)
    torch.compiler.reset()
    probe = diffhook.Probe([0, 5], diffhook.Grid(2))
    objective = diffhook.DiffusionObjective(SCHEDULER)
    watched = Training(tmp_path / "log", form, snapshot_every=3, probe=probe, objective=objective)
    watched.assert_rows(tmp_path / "log", range(0, STEPS, EVERY))
    assert watched.backend.graphs == plain.backend.graphs
    assert watched.backend.calls * EVERY == plain.backend.calls
    for before, after in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(before, after), "the backend rounds as the uncompiled model does"
    log = diffhook.open_log(tmp_path / "log")
    kept = safetensors.torch.load(log.snapshots[0].parameters())
    assert kept.keys() == {name for name, _ in Denoiser().named_parameters()}
    assert len(log.probe) == 2 * 2 * len(log.snapshots)


@pytest.mark.parametrize(
    ("form", "first", "graphs"), [(_wrapped, EVERY, 2), (_in_place, 0, 1), (_within_a_function, 0, 3)]
)
def test_a_model_compiled_after_prepare_is_captured_once_its_first_compiled_call_was_seen(
    tmp_path: Path, form: Compile, first: int, graphs: int
) -> None:
    """Only of a module that is compiled in place is it known before. Calls until then are compiled while
    their batch is followed, or while all modules' calls are seen, which are graphs of their own."""
    watched = Training(tmp_path / "log", after=form)
    watched.assert_rows(tmp_path / "log", range(first, STEPS, EVERY))
    assert watched.backend.graphs == graphs


def test_a_plan_that_leaves_no_step_compiled_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Training(tmp_path / "log", _in_place, every=1)
    assert "captured steps run uncompiled: with every=1 all of them" in capsys.readouterr().out


def test_the_engine_alone_runs_a_compiled_model_uncompiled() -> None:
    batch = (torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8), torch.arange(4) * 100)
    model, backend = Denoiser(), Backend()
    expected = sample_gradients(model, denoising_losses, batch).norm(dim=1)
    model.compile(backend=backend)
    with PerSampleGradients(model) as engine:
        denoising_losses(model, batch).mean().backward()
    torch.testing.assert_close(engine.norms.double(), expected, rtol=1e-6, atol=0)
    assert not backend.graphs


@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
def test_accelerates_dynamo_plugin(tmp_path: Path, regional: bool) -> None:
    plugin = TorchDynamoPlugin(backend="eager", use_regional_compilation=regional)
    watched = Training(tmp_path / "log", accelerator=Accelerator(cpu=True, dynamo_plugin=plugin))
    watched.assert_rows(tmp_path / "log", range(0, STEPS, EVERY))
