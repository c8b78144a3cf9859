"""The family of scores: a method is a small class in a file of its own, registered under its name."""

from diffhook.analysis.methods.adam_retrac import AdamReTrac
from diffhook.analysis.methods.adam_tracin import AdamTracIn
from diffhook.analysis.methods.cosine import Cosine
from diffhook.analysis.methods.das import DAS
from diffhook.analysis.methods.dtrak import DTRAK
from diffhook.analysis.methods.method import Method, SampleSums
from diffhook.analysis.methods.registry import METHODS, find_method, register
from diffhook.analysis.methods.retrac import ReTrac
from diffhook.analysis.methods.tracin import TracIn
from diffhook.analysis.methods.trak import TRAK

__all__ = [
    "DAS",
    "DTRAK",
    "METHODS",
    "TRAK",
    "AdamReTrac",
    "AdamTracIn",
    "Cosine",
    "Method",
    "ReTrac",
    "SampleSums",
    "TracIn",
    "find_method",
    "register",
]
