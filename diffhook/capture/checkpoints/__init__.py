"""A model that is trained already: probes at the checkpoints that a training has left.

What comes of it is the log of a watched run whose training steps are absent: the rows of probes, and
snapshots that refer to the checkpoints. Read :mod:`~diffhook.capture.checkpoints.measurement` first.
"""

from diffhook.capture.checkpoints.finding import Checkpoint, find_checkpoints
from diffhook.capture.checkpoints.lora import read_lora
from diffhook.capture.checkpoints.measurement import from_checkpoints
from diffhook.capture.checkpoints.weights import read_parameters

__all__ = ["Checkpoint", "find_checkpoints", "from_checkpoints", "read_lora", "read_parameters"]
