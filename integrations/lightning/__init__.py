"""The callback for Lightning."""

from diffhook.integrations.lightning.callback import DiffHookCallback

__all__ = ["DiffHookCallback"]
