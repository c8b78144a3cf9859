"""The callback for transformers' Trainer."""

from diffhook.integrations.transformers.callback import DiffHookCallback

__all__ = ["DiffHookCallback"]
