"""Scores from the log. Needs no torch, but where a dataset is cut."""

from diffhook.analysis.bias import BiasReport, bias
from diffhook.analysis.comparison import Comparison, compare
from diffhook.analysis.duplicates import Neighbours, near_duplicates
from diffhook.analysis.exclude_list import without
from diffhook.analysis.execution import Execution
from diffhook.analysis.influence import influence
from diffhook.analysis.influential_subset import Subset, influential_subset
from diffhook.analysis.methods import METHODS, Method
from diffhook.analysis.outliers import outliers
from diffhook.analysis.ranking import Ranking
from diffhook.analysis.scores import Scores, Top
from diffhook.analysis.self_influence import self_influence
from diffhook.analysis.timesteps import TimestepInfluence, influence_by_timestep

__all__ = [
    "METHODS",
    "BiasReport",
    "Comparison",
    "Execution",
    "Method",
    "Neighbours",
    "Ranking",
    "Scores",
    "Subset",
    "TimestepInfluence",
    "Top",
    "bias",
    "compare",
    "influence",
    "influence_by_timestep",
    "influential_subset",
    "near_duplicates",
    "outliers",
    "self_influence",
    "without",
]
