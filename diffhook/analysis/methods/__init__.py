"""The family of scores: a method is a small class in a file of its own, registered under its name."""

from diffhook.analysis.methods.adam_retrac import AdamReTrac
from diffhook.analysis.methods.adam_tracin import AdamTracIn
from diffhook.analysis.methods.cosine import Cosine
from diffhook.analysis.methods.das import DAS
from diffhook.analysis.methods.dtrak import DTRAK
from diffhook.analysis.methods.method import Method, SampleSums
from diffhook.analysis.methods.registry import COMPARED, DEFAULT, METHODS, find_method, register, title_of
from diffhook.analysis.methods.retrac import ReTrac
from diffhook.analysis.methods.tracin import TracIn
from diffhook.analysis.methods.trak import TRAK
from diffhook.analysis.methods.whitened_retrac import WhitenedReTrac
from diffhook.analysis.methods.whitening import Whitened

__all__ = [
    "COMPARED",
    "DAS",
    "DEFAULT",
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
    "Whitened",
    "WhitenedReTrac",
    "find_method",
    "register",
    "title_of",
]
