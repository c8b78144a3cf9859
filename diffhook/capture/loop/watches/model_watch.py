"""The trained models of a run, and which of them count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from diffhook.capture.loop.events import Event, ForwardBegan, OutputSeen
from diffhook.capture.loop.watches.attachment import Attachment
from diffhook.capture.loop.watches.call_inspection import takes_timesteps
from diffhook.capture.loop.watches.call_watch import watch_calls
from diffhook.compat.deepspeed import moved
from diffhook.compat.fsdp import plain_class
from diffhook.gradients import Guarded
from diffhook.gradients.compiled import compiled_wrapper, holder, is_compiled, without_wrappers
from diffhook.gradients.sharding import parameters_of, refuse_unsupported


class ModelWatch:
    """Watches the calls of trained models whose gradients one backward makes: a denoiser, perhaps its text
    encoders.

    Args:
        attachment: holds our hooks.
        emit: called with events.
        chosen: the models that count, if the user has said; others are not watched.
    """

    def __init__(
        self,
        attachment: Attachment,
        emit: Callable[[Event], None],
        chosen: Sequence[nn.Module] | None = None,
    ) -> None:
        self._attachment = attachment
        self._emit = emit
        self._chosen = None if chosen is None else [_origin(model) for model in chosen]
        self._models: list[nn.Module] = []
        self._holders: dict[int, nn.Module] = {}  # id of a model → what holds its parameters
        self._called: list[nn.Module] = []  # the same, or the compiled wrappers that the loop calls
        self._hooks: list[Guarded] = []

    def __len__(self) -> int:
        return len(self._models)

    def add(self, model: nn.Module) -> None:
        """Watch a model's calls, unless it is watched, frozen, or not one of those chosen.

        Args:
            model: as the loop calls it, or what is inside of the wrappers of DDP.

        Raises:
            ConfigurationError: its parameters are spread over processes in a way that is not supported.
        """
        refuse_unsupported(model)
        called, whole, model = model, holder(model), without_wrappers(model)
        if any(model is known for known in self._models) or not is_trained(model):
            return
        if self._chosen is not None and not any(_origin(model) is chosen for chosen in self._chosen):
            return
        self._models.append(model)
        self._holders[id(model)] = whole
        self._attachment.own(model)
        wrapper = compiled_wrapper(called)  # within which a compiled call shows nothing
        called = model if wrapper is None else wrapper
        self._called.append(called)
        self._hooks += watch_calls(self._attachment, called, self._before, self._after)

    def contains(self, module: nn.Module) -> bool:
        """Whether the module is a watched model, or has one inside."""
        return any(any(part is model for part in module.modules()) for model in self._models)

    @property
    def are_compiled(self) -> bool:
        """Whether they, or parts of them, are compiled, or were called by compiled code."""
        return any(hook.compiled for hook in self._hooks) or any(is_compiled(model) for model in self._called)

    def moved_by(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether an optimiser has a parameter of the models that count."""
        return bool(moved(optimizer) & self._trained_in(self._models))

    def settle(self, optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, list[nn.Module]]:
        """Let only those models count that are trained together with the denoiser.

        A discriminator has an optimiser of its own, and an average of the weights (EMA), which some loops
        prepare and never freeze, has none. Without several optimisers, or where not exactly one model takes
        timesteps, all others count.

        Returns:
            Kind of :data:`~diffhook.capture.loop.run.absences.REASONS` → models that count no longer.
        """
        if self._chosen is not None:
            return {}
        optimizers = list(optimizers)
        return {
            kind: self._leave_out(found(optimizers))
            for kind, found in (("averages", self._averages), ("other-models", self._trained_apart))
        }

    def _trained_apart(self, optimizers: Sequence[torch.optim.Optimizer]) -> list[nn.Module]:
        """Models whose optimisers are not those of the one denoiser, if there are any."""
        denoisers = [model for model in self._models if takes_timesteps(model)]
        if len(self._models) < 2 or len(denoisers) != 1:
            return []
        together: set[int] = set()
        others: set[int] = set()
        for optimizer in optimizers:
            parameters = moved(optimizer)
            (together if parameters & self._trained_in(denoisers) else others).update(parameters)
        if not together:
            return []
        trained = {id(m): self._trained_in([m]) for m in self._models}
        return [m for m in self._models if trained[id(m)] & others and not trained[id(m)] & together]

    def _averages(self, optimizers: Sequence[torch.optim.Optimizer]) -> list[nn.Module]:
        """Models that no optimiser moves, and whose parameters are in shape those of one that is moved."""
        moving: set[int] = set().union(*map(moved, optimizers))
        still = [m for m in self._models if not self._trained_in([m]) & moving]
        shapes = [self._shapes(m) for m in self._models if not any(m is one for one in still)]
        return [m for m in still if self._shapes(m) in shapes]

    def _shapes(self, model: nn.Module) -> list[torch.Size]:
        return [p.shape for p in parameters_of(self._holders[id(model)])]

    def _leave_out(self, models: list[nn.Module]) -> list[nn.Module]:
        self._models = [m for m in self._models if not any(m is other for other in models)]
        return models

    def together(self) -> nn.Module:
        """The one model, or an ``nn.ModuleDict`` of several by class name."""
        if len(self._models) == 1:
            return self._holders[id(self._models[0])]
        named: dict[str, nn.Module] = {}
        kinds = Counter[str]()
        for model in self._models:
            kind = plain_class(model).__name__
            kinds[kind] += 1
            named[f"{kind}_{kinds[kind]}" if kinds[kind] > 1 else kind] = self._holders[id(model)]
        return nn.ModuleDict(named)

    def _trained_in(self, models: Iterable[nn.Module]) -> set[int]:
        holders = [self._holders[id(model)] for model in models]
        return {id(p) for holder in holders for p in parameters_of(holder) if p.requires_grad}

    def _before(self, called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        model = without_wrappers(called)
        if any(model is known for known in self._models):
            self._emit(ForwardBegan(model, args, kwargs, torch.is_grad_enabled()))

    def _after(self, called: nn.Module, args: Any, output: Any) -> None:
        model = without_wrappers(called)
        if torch.is_grad_enabled() and any(model is known for known in self._models):
            self._emit(OutputSeen(model, output))


def _origin(model: nn.Module) -> nn.Module:
    """What a model was before it was wrapped; accelerate compiles regions of a shallow copy."""
    model = without_wrappers(model)
    origin = model.__dict__.get("_orig_mod", model)
    return origin if isinstance(origin, nn.Module) else model


def is_trained(model: nn.Module) -> bool:
    return any(p.requires_grad for p in model.parameters())


def adapters_of(host: nn.Module) -> nn.ModuleDict:
    """The trained modules that have taken the place of the forwards of a frozen model's layers, by theirs."""
    found = {}
    for path, layer in host.named_modules():
        adapter = getattr(layer.__dict__.get("forward"), "__self__", None)
        if isinstance(adapter, nn.Module) and adapter is not layer and is_trained(adapter):
            found[path.replace(".", "_")] = adapter
    return nn.ModuleDict(found)
