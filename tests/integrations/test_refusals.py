"""What cannot be captured is refused in one sentence, before the first step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from diffhook.compat import fsdp
from diffhook.errors import ConfigurationError
from diffhook.gradients import PerSampleGradients
from diffhook.gradients.sharding import refuse_miscounted
from diffhook.integrations.accelerate import DiffHook
from diffhook.integrations.torch import TorchHook
from tests.integrations.traces import Traces
from tests.runs import TinyDenoiser


def test_megatron_is_refused_before_anything(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    state, kind = accelerator.state, DistributedType.MEGATRON_LM
    state.distributed_type, before = kind, state.distributed_type
    try:
        with pytest.raises(ConfigurationError, match="split over a device mesh"):
            DiffHook(accelerator, tmp_path / "log")
        DiffHook(accelerator, tmp_path / "log", enabled=False)
    finally:
        accelerator.state.distributed_type = before
    assert not (tmp_path / "log").exists()


@pytest.fixture
def one_process_group(tmp_path: Path) -> Iterator[Any]:
    """A gloo group of this process alone, as a device mesh."""
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def _flat(model: torch.nn.Module, mesh: Any) -> torch.nn.Module:
    return FullyShardedDataParallel(
        model, device_id=torch.device("cpu"), device_mesh=mesh, use_orig_params=False
    )


def _both(model: torch.nn.Module, mesh: Any) -> torch.nn.Module:
    _tensor_parallel(model, mesh)
    for part in (model.inward, model.outward):
        fully_shard(part, mesh=mesh)  # type: ignore[arg-type]
    return model


def _zero3(model: torch.nn.Module, mesh: Any) -> torch.nn.Module:
    """DeepSpeed wants a GPU; this is how it marks the parameters that it has taken away."""
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id = number
    return model


class _Engine(torch.nn.Module):
    """What DeepSpeed's engine says of itself."""

    def __init__(self, model: torch.nn.Module, stage: int, *, half: bool = False) -> None:
        super().__init__()
        self.module, self.optimizer = model, mock.Mock(bit16_groups=[list(model.parameters())])
        self._stage, self._half = stage, half

    def zero_optimization_stage(self) -> int:
        return self._stage

    def fp16_enabled(self) -> bool:
        return self._half


_Engine.__module__, _Engine.__name__ = "deepspeed.runtime.engine", "DeepSpeedEngine"


def _tensor_parallel(model: torch.nn.Module, mesh: Any) -> torch.nn.Module:
    return parallelize_module(model, mesh, {"time": ColwiseParallel()})


SHARDINGS = {
    "FSDP1, flat": ("FullyShardedDataParallel with use_orig_params=False", _flat),
    "tensor-parallel": ("parameters are split over a device mesh, and not by fully_shard", _tensor_parallel),
    "tensor-parallel and FSDP": ("parameters are split over a device mesh, and not by fully_shard", _both),
    "ZeRO-3": ("DeepSpeed's ZeRO-3", _zero3),
    "ZeRO-3's engine": ("DeepSpeed's ZeRO-3", lambda model, _: _Engine(model, 3)),
    "DeepSpeed alone": ("DeepSpeed without ZeRO-1 or ZeRO-2", lambda model, _: _Engine(model, 0)),
    "DeepSpeed in fp16": ("DeepSpeed's fp16 scales losses", lambda model, _: _Engine(model, 2, half=True)),
}


@pytest.mark.parametrize("kind", SHARDINGS)
def test_a_sharded_model_is_refused_in_one_sentence(
    tmp_path: Path, kind: str, one_process_group: Any
) -> None:
    reason, shard = SHARDINGS[kind]
    model = shard(TinyDenoiser(), one_process_group)
    for refusing in (lambda: TorchHook(tmp_path / "log", model), lambda: PerSampleGradients(model)):
        with pytest.raises(ConfigurationError) as told:
            refusing()
        assert str(told.value).startswith(reason)
        assert str(told.value).endswith("or without diffhook (enabled=False)")
    assert not (tmp_path / "log").exists()


def test_a_model_split_after_prepare_is_refused_at_its_first_call(
    tmp_path: Path, one_process_group: Any
) -> None:
    traces = Traces()
    DiffHook(traces.accelerator, tmp_path / "log")
    traces.prepare()
    parallelize_module(traces.model, one_process_group, {"time": ColwiseParallel()})
    with pytest.raises(ConfigurationError, match="split over a device mesh"):
        traces.loop()
    assert not (tmp_path / "log").exists()


def test_options_that_a_sharded_model_cannot_have_are_refused(one_process_group: Any) -> None:
    model = TinyDenoiser()
    fully_shard(model, mesh=one_process_group)
    with pytest.raises(ConfigurationError, match="would leave other processes waiting"):
        PerSampleGradients(model, weight_gradients=False)
    with pytest.raises(ConfigurationError, match="reuse_products=True is for whole models"):
        PerSampleGradients(model, reuse_products=True)


def test_a_hook_that_is_not_told_of_the_other_processes_is_refused() -> None:
    unit, model = mock.Mock(), torch.nn.Linear(1, 1)
    with (
        mock.patch.object(fsdp, "units", return_value=[unit]),
        mock.patch.object(fsdp, "processes", return_value=iter([2])),
        pytest.raises(ConfigurationError, match="told of 1: each has samples of its own, so say rank="),
    ):
        refuse_miscounted(model, 1)
