"""The training loss, recognised from the training's own passes: no word about schedulers is needed."""

from diffhook.capture.recognition.observation import Mixing, Observation
from diffhook.capture.recognition.recognition import Recognition
from diffhook.capture.recognition.verdict import Recognised, Refusal

__all__ = ["Mixing", "Observation", "Recognised", "Recognition", "Refusal"]
