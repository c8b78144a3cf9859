"""Models whose parameters are spread over processes."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from diffhook.errors import ConfigurationError


def refuse_sharded(model: nn.Module) -> None:
    """Raises ConfigurationError if this process has only its share of the model's parameters."""
    for part in model.modules():
        for by in _sharded_by(part):
            raise sharded(by)


def sharded(by: str) -> ConfigurationError:
    """That ``by`` shards parameters, and what to do."""
    return ConfigurationError(
        f"{by} shards parameters over processes, and each has them whole only while their layer runs. "
        "Snapshots, parameters outside of layers and a check that none is missing need them at other times: "
        "train with plain DDP or without diffhook (enabled=False)"
    )


def _sharded_by(module: nn.Module) -> Iterator[str]:
    """What has sharded a module's own parameters. Told by names: their imports take seconds."""
    parameters = list(module.parameters(recurse=False))
    origin = type(module).__module__
    if origin.startswith("deepspeed.") or any(hasattr(p, "ds_id") for p in parameters):
        yield "DeepSpeed"
    if origin.startswith("torch.distributed.fsdp"):
        yield "FSDP"
    if any(type(p.data).__name__ == "DTensor" for p in parameters):
        yield "a device mesh"
