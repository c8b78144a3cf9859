"""The training loop as a contract: its events, the micro-batch that they tell of, and who follows them.

Read :mod:`~diffhook.capture.loop.events` first: its docstring is the loop.
"""

from diffhook.capture.loop import events
from diffhook.capture.loop.session.capture import Capture
from diffhook.capture.loop.session.session import CaptureSession

__all__ = ["Capture", "CaptureSession", "events"]
