"""The hook for a loop in plain PyTorch, on which the other adapters stand."""

from diffhook.integrations.torch.hook import TorchHook

__all__ = ["TorchHook"]
