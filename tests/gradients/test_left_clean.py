"""Whatever raises where, nothing of ours stays on the user's model, and no error of ours reaches its loop."""

from __future__ import annotations

import copy
import gc
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

import diffhook.gradients
from diffhook.errors import CaptureError
from diffhook.gradients import PerSampleGradients

_OURS = str(Path(diffhook.gradients.__file__).parent)

BATCH, WIDTH = 4, 6


class _Net(nn.Module):
    """Ruled layers, a bare parameter, a checkpointed block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.table = nn.Parameter(torch.randn(3, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        hidden = (self.first(x) + self.table).tanh()
        return self.last(checkpoint(lambda h: self.inner(h).tanh(), hidden, use_reentrant=False))


def _loss(model: nn.Module) -> Tensor:
    torch.manual_seed(1)
    return model(torch.randn(BATCH, 3, WIDTH)).square().mean()


def _assert_clean(model: nn.Module, *, hooks: bool = True) -> None:
    assert not _get_current_function_mode_stack()
    for module in model.modules():
        assert not (module._forward_hooks or module._forward_pre_hooks) or not hooks
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad, name
        assert not parameter._backward_hooks, name
        assert not parameter._post_accumulate_grad_hooks, name


@contextmanager
def _raising(where: Callable[[FrameType], bool], error: Exception) -> Iterator[list[str]]:
    """Raise ``error`` at the first call of a function of ours for which ``where`` is true."""
    raised: list[str] = []

    def trace(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(_OURS) and not raised and where(frame):
            raised.append(f"{Path(code.co_filename).name}:{code.co_name}")
            raise error

    collects = gc.isenabled()
    gc.disable()  # to close a generator of ours that is garbage is a call, too, but nobody's
    sys.settrace(trace)
    try:
        yield raised
    finally:
        sys.settrace(None)
        if collects:
            gc.enable()


@pytest.mark.parametrize("weight_gradients", [True, False], ids=["in-step", "probe"])
def test_an_error_at_any_call_of_begin_leaves_the_model_as_it_was(weight_gradients: bool) -> None:
    model = _Net()
    counted = 0
    for failing in range(10_000):
        engine = PerSampleGradients(model, projection_dim=0, weight_gradients=weight_gradients)
        kept = torch.full_like(model.table, 7)
        model.table.grad = kept
        calls = iter(range(10_000))
        with _raising(lambda frame: next(calls) == failing, MemoryError("injected")) as raised:  # noqa: B023
            try:
                engine.__enter__()
            except MemoryError:
                counted += 1
        if not raised:
            engine.detach()
            break
        _assert_clean(model)
        assert model.table.grad is kept
    assert counted > 20, "no call was reached, so nothing was tested"


def _steps(model: nn.Module, engine: PerSampleGradients | None, inject: Any) -> list[Tensor]:
    """Weights after four steps; what we raise must not reach here."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        optimizer.zero_grad()
        if engine is None:
            _loss(model).backward()
        else:
            engine.attach()
            engine.begin()
            with inject if step == 2 or inject is None else _raising(lambda frame: False, ValueError()):
                _loss(model).backward()
            with suppress(CaptureError):
                engine.finish()
            engine.detach()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


_ENTRY = {"Guarded.__call__", "Fallback.__torch_function__"}
"""What torch calls itself: an error at the very call of these cannot be caught by anyone."""


@pytest.mark.parametrize(
    "error", [MemoryError("injected"), RuntimeError("injected")], ids=lambda e: type(e).__name__
)
def test_an_error_at_a_random_call_of_ours_changes_no_weight(error: Exception) -> None:
    torch.manual_seed(0)
    initial = _Net()
    expected = _steps(copy.deepcopy(initial), None, None)
    draw = random.Random(0)
    for _ in range(40):
        model = copy.deepcopy(initial)
        engine = PerSampleGradients(model, projection_dim=16)
        chance = draw.choice([0.003, 0.02, 0.1])

        def where(frame: FrameType, chance: float = chance) -> bool:
            return frame.f_code.co_qualname not in _ENTRY and draw.random() < chance

        inject = _raising(where, error)
        with torch.autograd.set_multithreading_enabled(False):
            found = _steps(model, engine, inject)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        _assert_clean(model)
