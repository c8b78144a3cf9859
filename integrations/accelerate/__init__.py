"""The callback for Accelerate training loops."""

from diffhook.integrations.accelerate.hook import DiffHook

__all__ = ["DiffHook"]
