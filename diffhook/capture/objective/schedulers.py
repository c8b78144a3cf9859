"""Schedulers of diffusers, made anew."""

from __future__ import annotations

import inspect
from typing import Any

from diffhook.errors import ConfigurationError


def configured(scheduler: Any) -> dict[str, Any]:
    """A scheduler's configuration, without what diffusers notes beside it when a pipeline is saved."""
    return {name: value for name, value in dict(scheduler.config).items() if not name.startswith("_")}


def remade(scheduler: Any, **changed: Any) -> Any:
    """A fresh scheduler of the same class and configuration, but for what is to be changed.

    diffusers takes what was given by place, ``DDPMScheduler(100)``, for a default, and ``from_config`` then
    drops it: of what it notes as defaults, those that are count.
    """
    config = dict(scheduler.config)
    usual = inspect.signature(type(scheduler).__init__).parameters
    noted = config.get("_use_default_values", ())
    defaults = [name for name in noted if name in usual and config.get(name) == usual[name].default]
    return type(scheduler).from_config({**config, "_use_default_values": defaults}, **changed)


def make_scheduler(name: str, config: dict[str, Any]) -> Any:
    """One of diffusers' schedulers by class name.

    Raises:
        ConfigurationError: diffusers has no such scheduler, or cannot make it.
    """
    import diffusers

    kind = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if not isinstance(kind, type) or not hasattr(kind, "from_config"):
        raise ConfigurationError(f"diffusers has no scheduler {name!r}")
    try:
        return kind.from_config(config)
    except (TypeError, ImportError) as error:
        raise ConfigurationError(f"diffusers cannot make a {name}: {error}") from error
