"""The trained models of a run, and what of theirs we watch."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import nn

from diffhook.errors import ConfigurationError
from diffhook.gradients import LocalHook


class Models:
    """Trained models whose gradients one backward makes: a denoiser, perhaps its text encoders.

    Args:
        on_forward: called before a model's forward with (model, args, kwargs).
        on_output: called after it with (model, args, output).
    """

    def __init__(self, on_forward: Callable[..., None], on_output: Callable[..., None]) -> None:
        self._on_forward, self._on_output = on_forward, on_output
        self._models: list[nn.Module] = []

    def __len__(self) -> int:
        return len(self._models)

    def add(self, model: nn.Module) -> list[Callable[[], None]]:
        """Watch a model's calls. Returns how to stop; nothing if it is watched or frozen.

        Raises:
            ConfigurationError: the model is compiled.
        """
        if any(model is known for known in self._models) or not is_trained(model):
            return []
        refuse_compiled(model)
        self._models.append(model)
        before = model.register_forward_pre_hook(LocalHook(model, self._on_forward), with_kwargs=True)
        after = model.register_forward_hook(LocalHook(model, self._on_output))
        return [before.remove, after.remove]

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


def _called_by(kind: type) -> bool:
    """Whether a method of such an object is under way."""
    frame = inspect.currentframe()
    while frame is not None and not isinstance(frame.f_locals.get("self"), kind):
        frame = frame.f_back
    return frame is not None
