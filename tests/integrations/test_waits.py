"""Where training waits for its device because of us: never in a step that is not captured, and in a captured
one not before the optimiser's step is under way."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

import diffhook
from diffhook.integrations.accelerate import DiffHook, loaders
from tests.runs import TinyDenoiser, denoising_losses, identified, train

_READING = ("_local_scalar_dense", "nonzero", "equal", "_unique2", "masked_select", "is_nonzero")
_METHODS = ("cpu", "numpy", "tolist", "__array__")


class Device(TorchDispatchMode):
    """Has tensors lie on a device that is not there: what is put there, and what is made of it.

    Attributes:
        phase: what the loop is doing.
        waits: (phase, where in our code) of reads of such tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = ""
        self.waits: Counter[tuple[str, str]] = Counter()

    def put(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            tensor.untyped_storage().on_device = True  # type: ignore[attr-defined]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ == "_local_scalar_dense" and not isinstance(args[0], Tensor):
            return args[0]  # a number that torch had wrapped
        held = any(_lies_there(value) for value in tree_leaves((args, kwargs)))
        if held and func.overloadpacket.__name__ in _READING:
            self.note()
        result = func(*args, **(kwargs or {}))
        if held:
            self.put(*(value for value in tree_leaves(result) if isinstance(value, Tensor)))
        return result

    def note(self) -> None:
        ours = [frame for frame in traceback.extract_stack() if _is_ours(frame.filename)]
        if ours:
            self.waits[self.phase, f"{Path(ours[-1].filename).name}:{ours[-1].name}"] += 1

    @contextmanager
    def watched(self) -> Iterator[None]:
        with self:
            patches = [mock.patch.object(Tensor, name, self._noting(name)) for name in _METHODS]
            for patch in patches:
                patch.start()
            try:
                yield
            finally:
                for patch in patches:
                    patch.stop()

    def _noting(self, name: str) -> Any:
        original = getattr(Tensor, name)

        def read(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if _lies_there(tensor):
                self.note()
            return original(tensor, *args, **kwargs)

        return read


def _lies_there(value: Any) -> bool:
    return isinstance(value, Tensor) and getattr(value.untyped_storage(), "on_device", False)


def _is_ours(filename: str) -> bool:
    return any(
        f"/{package}/" in filename and "/tests/" not in filename for package in ("diffhook", "integrations")
    )


def _train(log: Path, device: Device, *, clip: bool) -> None:
    """Thirty steps, every second one captured; the last ten are watched: by then the loss is recognised."""
    torch.manual_seed(0)
    accelerator, model = Accelerator(cpu=True), TinyDenoiser()
    DiffHook(accelerator, log, strict=True, every=2, projection_dim=16)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    optimizer.register_step_pre_hook(lambda *_: setattr(device, "phase", "step"))
    loader = DataLoader(TensorDataset(identified()), 4, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    step = 0
    for _ in range(10):
        for (clean,) in loader:
            noise, timesteps = torch.randn_like(clean), torch.randint(0, 1000, (4,))
            with device.watched() if step >= 20 else torch.enable_grad():
                device.put(clean, noise, timesteps, *model.parameters())
                device.phase = "idle" if step % 2 else "pass"
                accelerator.backward(denoising_losses(model, (clean, noise, timesteps)).mean())
                if clip:
                    accelerator.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                device.phase = "after"
                optimizer.zero_grad()
            step += 1
    accelerator.end_training()
    assert len(diffhook.open_log(log).train) == 15 * 4


@pytest.fixture(autouse=True)
def _devices_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffhook.gradients.host.waits", lambda tensor: True)


@pytest.mark.parametrize("clip", [False, True])
def test_nobody_waits_before_the_optimiser_step_is_under_way(tmp_path: Path, clip: bool) -> None:
    device = Device()
    _train(tmp_path / "log", device, clip=clip)
    read = Counter(phase for phase, _ in device.waits.elements())
    assert read["pass"] == 0, device.waits
    assert read["idle"] == 0, device.waits
    assert read["step"] > 0, "rows are read once it is"


def test_where_a_batch_came_from_is_read_for_captured_steps_and_those_before_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It travels with the batch to the device. Loops fetch a batch ahead, so the step before is one, too."""
    read = Counter[int]()
    unpacked = loaders.unpack
    monkeypatch.setattr(loaders, "unpack", lambda *args: read.update([0]) or unpacked(*args))
    train(tmp_path / "log", every=5, epochs=10, projection_dim=0)
    rows = diffhook.open_log(tmp_path / "log").train
    assert sorted(set(rows["step"].tolist())) == [0, 5, 10, 15, 20, 25]
    assert len(rows) == 6 * 4
    assert read[0] == 30 * 2 // 5
