"""Signals that a sample is unlike the others, each a small class in a file of its own."""

from diffhook.analysis.signals.duplicate import Duplicate
from diffhook.analysis.signals.equal import Equal
from diffhook.analysis.signals.input import Input
from diffhook.analysis.signals.label import Label
from diffhook.analysis.signals.loss import Loss
from diffhook.analysis.signals.norm import Norm
from diffhook.analysis.signals.repeat import Repeat
from diffhook.analysis.signals.self_influence import ReTracSelfInfluence, TracInSelfInfluence
from diffhook.analysis.signals.signal import PAIRWISE, SIGNALS, Found, Signal, View, register

__all__ = [
    "PAIRWISE",
    "SIGNALS",
    "Duplicate",
    "Equal",
    "Found",
    "Input",
    "Label",
    "Loss",
    "Norm",
    "ReTracSelfInfluence",
    "Repeat",
    "Signal",
    "TracInSelfInfluence",
    "View",
    "register",
]
