"""The loss that probes and queries differentiate: its target, distance, weights and noise."""

from diffhook.capture.objective.objective import Objective, Predicting, Prediction, check_objective

__all__ = ["Objective", "Predicting", "Prediction", "check_objective"]
