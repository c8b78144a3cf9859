"""The contract of the loop as tests: an adapter inherits :class:`LoopContract` and says how it trains.

Run by pytest, which gives ``tmp_path``; nothing else of pytest is needed.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffhook.capture.recording.recorder import Recorder
from diffhook.compat.torch import function_modes
from diffhook.log import open_log

_COUNT, _SIZE = 8, 4


class Denoiser(nn.Module):
    """A small model that is called on noisy images and timesteps."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Conv2d(1, 3, 3, padding=1)
        self.outward = nn.Conv2d(3, 1, 3, padding=1)
        self.time = nn.Linear(1, 3)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        shift = self.time(timestep.to(sample.dtype)[:, None] / 1000)[:, :, None, None]
        predicted: Tensor = self.outward((self.inward(sample) + shift).tanh())
        return predicted


def items() -> list[dict[str, Tensor]]:
    """Samples with noise, timestep and id of their own: rows do not depend on the order of draws."""
    draw = torch.Generator().manual_seed(7)
    images = torch.randn(_COUNT, 2, 1, _SIZE, _SIZE, generator=draw)
    return [
        {"clean": clean, "noise": noise, "timestep": torch.tensor(90 * i), "ids": torch.tensor(40 + i)}
        for i, (clean, noise) in enumerate(images)
    ]


def losses_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """(B,) losses of a collated batch of :func:`items`."""
    predicted = model(batch["clean"] + batch["noise"], batch["timestep"])
    return (predicted - batch["noise"]).square().flatten(1).mean(1)


_COLUMNS = ("step", "timestep", "weight", "lr", "grad_norm", "loss")


class LoopContract(ABC):
    """What holds in a loop that an adapter watches.

    Attributes:
        batch, accumulation: samples of a micro-batch, and micro-batches of an optimiser step.
        lr: of plain SGD.
    """

    batch = 2
    accumulation = 2
    lr = 0.05

    @abstractmethod
    def train(self, model: nn.Module, log: Path | None, folder: Path) -> None:
        """Train ``model`` for an epoch over :func:`items`, in their order, by SGD on the mean of
        :func:`losses_of`; watched, with ``projection_dim=0``, where there is a ``log``.

        Args:
            folder: for what the framework writes.
        """

    def test_rows_are_the_batch_1_loops(self, tmp_path: Path) -> None:
        expected = self._twin()
        self.train(self._model(), tmp_path / "log", tmp_path)
        table = open_log(tmp_path / "log").train
        found = {
            sample: {name: float(table[name][row]) for name in _COLUMNS}
            for row, sample in enumerate(table["sample"].tolist())
        }
        assert sorted(table["sample"].tolist()) == sorted(expected), "each sample has its one row"
        for sample, row in expected.items():
            for name, value in row.items():
                error = abs(found[sample][name] - value)
                told = f"{name} of {sample} is {found[sample][name]}, not {value}"
                assert error <= 1e-5 * max(abs(value), 1e-9), told

    def test_training_is_bit_identical_and_nothing_of_ours_is_left(self, tmp_path: Path) -> None:
        plain, watched = self._model(), self._model()
        self.train(plain, None, tmp_path / "plain")
        self.train(watched, tmp_path / "log", tmp_path / "watched")
        self._assert_same(watched, plain)
        self._assert_clean(watched)

    def test_an_error_of_ours_costs_a_micro_batch(self, tmp_path: Path) -> None:
        plain, watched = self._model(), self._model()
        self.train(plain, None, tmp_path / "plain")
        captured = Recorder.captured
        calls: list[int] = []

        def failing(recorder: Recorder, *args: Any, **kwargs: Any) -> Any:
            calls.append(len(calls))
            if calls[-1] == 1:
                raise MemoryError("not today")
            return captured(recorder, *args, **kwargs)

        Recorder.captured = failing  # type: ignore[assignment,method-assign]
        try:
            self.train(watched, tmp_path / "log", tmp_path / "watched")
        finally:
            Recorder.captured = captured  # type: ignore[method-assign]
        self._assert_same(watched, plain)
        samples = open_log(tmp_path / "log").train["sample"].tolist()
        assert sorted(samples) == [40, 41, 44, 45, 46, 47], "all but the second micro-batch"

    def _model(self) -> Denoiser:
        torch.manual_seed(0)
        return Denoiser()

    def _twin(self) -> dict[int, dict[str, float]]:
        """Every row, by a loop of batch size 1 in float64."""
        model = self._model()
        optimizer = torch.optim.SGD(model.parameters(), self.lr)
        rows: dict[int, dict[str, float]] = {}
        everything = items()
        per_step = self.batch * self.accumulation
        for start in range(0, _COUNT, per_step):
            twin = copy.deepcopy(model).double()
            total = torch.zeros(())
            for item in everything[start : start + per_step]:
                one = {key: value[None] for key, value in item.items()}
                exact = {k: v.double() if v.is_floating_point() else v for k, v in one.items()}
                (loss,) = losses_of(twin, exact)
                shares = torch.autograd.grad(loss, list(twin.parameters()))
                rows[int(item["ids"])] = {
                    "step": start // per_step,
                    "timestep": float(item["timestep"]),
                    "weight": 1 / per_step,
                    "lr": self.lr,
                    "grad_norm": float(torch.cat([share.flatten() for share in shares]).norm()),
                    "loss": float(loss.detach()),
                }
                total = total + losses_of(model, one)[0] / per_step
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
        return rows

    @staticmethod
    def _assert_same(found: nn.Module, expected: nn.Module) -> None:
        pairs = zip(found.parameters(), expected.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), "training differs from training without us"

    @staticmethod
    def _assert_clean(model: nn.Module) -> None:
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
        left = [hook for m in model.modules() for kind in kinds for hook in getattr(m, kind).values()]
        assert not left, "hooks of ours are left on the model"
        assert not torch.nn.modules.module._global_forward_pre_hooks
        assert not hasattr(torch.autograd.backward, "__wrapped__"), "autograd.backward is not itself"
        assert not hasattr(Tensor.backward, "__wrapped__"), "Tensor.backward is not itself"
        assert not function_modes(), "a function mode of ours is left on"
