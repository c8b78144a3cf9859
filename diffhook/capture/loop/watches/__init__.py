"""Hooks on PyTorch that turn calls of models, backward passes and optimisers' steps into events."""

from diffhook.capture.loop.watches.backward_watch import BackwardWatch
from diffhook.capture.loop.watches.call_watch import CallWatch
from diffhook.capture.loop.watches.model_watch import ModelWatch
from diffhook.capture.loop.watches.optimizer_watch import OptimizerWatch

__all__ = ["BackwardWatch", "CallWatch", "ModelWatch", "OptimizerWatch"]
