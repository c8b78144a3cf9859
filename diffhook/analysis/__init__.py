"""Scores from the log. No torch, except in :mod:`diffhook.analysis.query`."""

from diffhook.analysis.bias import BiasReport, bias
from diffhook.analysis.influence import Scores, influence
from diffhook.analysis.methods import METHODS, Method
from diffhook.analysis.outliers import outliers
from diffhook.analysis.ranking import Ranking
from diffhook.analysis.self_influence import self_influence

__all__ = [
    "METHODS",
    "BiasReport",
    "Method",
    "Ranking",
    "Scores",
    "bias",
    "influence",
    "outliers",
    "self_influence",
]
