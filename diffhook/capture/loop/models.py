"""The trained models of a run, and what of theirs we watch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from diffhook.capture.loop.attachment import Weak
from diffhook.errors import ConfigurationError
from diffhook.gradients import LocalHook


class Models:
    """Trained models whose gradients one backward makes: a denoiser, perhaps its text encoders.

    Args:
        on_forward: a method, called before a model's forward with (model, args, kwargs).
        on_output: one called after it with (model, args, output).
    """

    def __init__(self, on_forward: Callable[..., None], on_output: Callable[..., None]) -> None:
        self._on_forward, self._on_output = on_forward, on_output
        self._models: list[nn.Module] = []

    def __len__(self) -> int:
        return len(self._models)

    def add(self, model: nn.Module) -> list[Callable[[], None]]:
        """Watch a model's calls. Returns how to stop; nothing if it is watched or frozen.

        Raises:
            ConfigurationError: the model is compiled, or its parameters are sharded over processes.
        """
        if any(model is known for known in self._models) or not is_trained(model):
            return []
        refuse_compiled(model)
        refuse_sharded(model)
        self._models.append(model)

        def before(hook: Callable[..., Any]) -> RemovableHandle:
            return model.register_forward_pre_hook(LocalHook(model, hook), with_kwargs=True)

        def after(hook: Callable[..., Any]) -> RemovableHandle:
            return model.register_forward_hook(LocalHook(model, hook))

        return [Weak(self._on_forward, before).remove, Weak(self._on_output, after).remove]

    def together(self) -> nn.Module:
        """The one model, or an ``nn.ModuleDict`` of several by class name."""
        if len(self._models) == 1:
            return self._models[0]
        named: dict[str, nn.Module] = {}
        for model in self._models:
            kind = type(model).__name__
            same = sum(type(other) is type(model) for other in named.values())
            named[f"{kind}_{same + 1}" if same else kind] = model
        return nn.ModuleDict(named)


def is_trained(model: nn.Module) -> bool:
    return any(p.requires_grad for p in model.parameters())


def refuse_compiled(model: nn.Module) -> None:
    """Raises ConfigurationError if the model or a part of it is compiled, or called by what is.

    A compiled model's layers make no calls of their own, so nothing can be seen of their gradients.
    """
    from torch._dynamo.eval_frame import OptimizedModule

    parts = (isinstance(m, OptimizedModule) or m._compiled_call_impl is not None for m in model.modules())
    if any(parts) or _called_by(OptimizedModule):
        raise ConfigurationError(
            f"{type(getattr(model, '_orig_mod', model)).__name__} is compiled, and a compiled model does "
            "not show its layers' gradients: train it uncompiled (accelerate: dynamo_backend 'no') or "
            "without diffhook (enabled=False)"
        )


def refuse_sharded(model: nn.Module) -> None:
    """Raises ConfigurationError if this process has only its share of the model's parameters."""
    for part in model.modules():
        for by in _sharded_by(part):
            raise sharded(by)


def sharded(by: str) -> ConfigurationError:
    """That ``by`` shards parameters, and what to do."""
    return ConfigurationError(
        f"{by} shards parameters over processes, and no process sees a sample's whole gradient: train with "
        "plain DDP or without diffhook (enabled=False)"
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


def _called_by(kind: type[nn.Module]) -> bool:
    """Whether a call of such a module is under way."""
    # Only these frames are asked for their locals: a frame that was keeps them alive until it ends,
    # and the loop's own would keep its first batch.
    calls = {method.__code__ for method in (kind.__call__, nn.Module._wrapped_call_impl)}
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code in calls and isinstance(frame.f_locals.get("self"), kind):
            return True
        frame = frame.f_back
    return False
