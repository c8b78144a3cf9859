"""Whether a model still trains the parameters that its rows are of."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from diffhook.gradients.layers import trainable_parameters
from diffhook.gradients.sharding import parameters_of


class TrainedSet:
    """The parameters that rows hold gradients of, held against those that the model trains now.

    Fewer are no matter: what is frozen adds nothing to a gradient. What is trained newly, since it was
    unfrozen or its layer was replaced, would be missing from the rows.

    Args:
        model: that is trained.
        parameters: name → parameter, of those that rows hold.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self._model = model
        self._held = {id(parameter): parameter for parameter in parameters.values()}

    def added(self) -> list[str]:
        """Names of parameters that are trained and not held."""
        if all(id(p) in self._held for p in parameters_of(self._model) if p.requires_grad):
            return []
        return [name for name, p in trainable_parameters(self._model).items() if id(p) not in self._held]

    def is_another(self, model: nn.Module) -> bool:
        """Whether a model is trained of which rows hold nothing."""
        trained = [id(p) for p in parameters_of(model) if p.requires_grad]
        return bool(trained) and self._held.keys().isdisjoint(trained)
