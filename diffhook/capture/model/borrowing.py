"""A model of the user's, taken for measurements: afterwards it is as it was."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from diffhook.compat import deepspeed
from diffhook.compat.torch import own_parameters
from diffhook.gradients.compiled import without_wrappers


@contextmanager
def undrawn(device: torch.device | None = None) -> Iterator[None]:
    """Random states, of a GPU's too, that are as before afterwards: a dataset may draw from them."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device is not None and device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def trainable(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """What was trained takes gradients, though the loop may have frozen it since; afterwards as before."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def unengaged(model: nn.Module) -> Iterator[nn.Module]:
    """A model without DeepSpeed's engine around it, which takes every gradient of its parameters for the
    training's: meanwhile others stand in their place, on the same memory. Any other model as it is."""
    if not deepspeed.wraps(model):
        yield model
        return
    inner = without_wrappers(model)
    others: dict[int, nn.Parameter] = {}  # one for each, though layers share it
    taken = [
        (module, name, own)
        for module in inner.modules()
        for name, own in own_parameters(module).items()
        if own is not None
    ]
    try:
        for module, name, own in taken:
            other = others.setdefault(id(own), nn.Parameter(own.detach(), own.requires_grad))
            setattr(module, name, other)
        yield inner
    finally:
        for module, name, own in taken:
            setattr(module, name, own)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and random states of our own; both are as before afterwards.

    ``model.eval()`` is not called: some models change their weights in it (averages, merged adapters).
    """
    modes = {module: module.training for module in model.modules()}
    with undrawn(next(model.parameters()).device):
        for module in modes:
            module.training = False
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


@contextmanager
def restored(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Parameters that other values are put into have their own again afterwards."""
    parameters = list(parameters)
    own = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, values in zip(parameters, own, strict=True):
                parameter.copy_(values)


@contextmanager
def holding(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Parameters with other values, by their names; afterwards with their own."""
    with restored(parameters.values()):
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(values[name])
        yield


@contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """A model that snapshots are loaded into: it may be live. Undisturbed, and afterwards with the
    trainable parameters that it had."""
    with restored(p for p in model.parameters() if p.requires_grad), undisturbed(model):
        yield
