"""What cannot be captured is refused in one sentence, before the first step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from diffhook.errors import ConfigurationError
from diffhook.gradients import PerSampleGradients
from diffhook.integrations.accelerate import DiffHook
from diffhook.integrations.torch import TorchHook
from tests.integrations.traces import Traces
from tests.runs import TinyDenoiser


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_sharded_parameters_are_refused_before_anything(tmp_path: Path, kind: Any) -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type, before = kind, accelerator.state.distributed_type
    try:
        with pytest.raises(ConfigurationError, match=f"{kind.value} shards parameters over processes"):
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


def _fsdp(model: torch.nn.Module, mesh: Any) -> torch.nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), device_mesh=mesh)


def _fsdp2(model: torch.nn.Module, mesh: Any) -> torch.nn.Module:
    fully_shard(model, mesh=mesh)
    return model


def _zero3(model: torch.nn.Module, mesh: Any) -> torch.nn.Module:
    """DeepSpeed wants a GPU; this is how it marks the parameters that it has taken away."""
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id = number
    return model


def _engine(model: torch.nn.Module, mesh: Any) -> torch.nn.Module:
    kind = type("DeepSpeedEngine", (torch.nn.Sequential,), {"__module__": "deepspeed.runtime.engine"})
    wrapped: torch.nn.Module = kind(model)
    return wrapped


def _tensor_parallel(model: torch.nn.Module, mesh: Any) -> torch.nn.Module:
    return parallelize_module(model, mesh, {"time": ColwiseParallel()})


SHARDINGS = {
    "FSDP": ("FSDP", _fsdp),
    "FSDP2": ("FSDP", _fsdp2),
    "tensor-parallel": ("a device mesh", _tensor_parallel),
    "ZeRO-3": ("DeepSpeed", _zero3),
    "DeepSpeed": ("DeepSpeed", _engine),
}


@pytest.mark.parametrize("kind", SHARDINGS)
def test_a_sharded_model_is_refused_in_one_sentence(
    tmp_path: Path, kind: str, one_process_group: Any
) -> None:
    by, shard = SHARDINGS[kind]
    model = shard(TinyDenoiser(), one_process_group)
    for refusing in (lambda: TorchHook(tmp_path / "log", model), lambda: PerSampleGradients(model)):
        with pytest.raises(ConfigurationError) as told:
            refusing()
        assert str(told.value).startswith(f"{by} shards parameters over processes")
        assert str(told.value).endswith("train with plain DDP or without diffhook (enabled=False)")
    assert not (tmp_path / "log").exists()


def test_a_model_sharded_after_prepare_is_refused_at_its_first_call(
    tmp_path: Path, one_process_group: Any
) -> None:
    traces = Traces()
    DiffHook(traces.accelerator, tmp_path / "log")
    traces.prepare()
    fully_shard(traces.model, mesh=one_process_group)
    with pytest.raises(ConfigurationError, match="FSDP shards parameters over processes"):
        traces.loop()
    assert not (tmp_path / "log").exists()
