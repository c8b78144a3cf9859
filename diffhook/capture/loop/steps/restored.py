"""Parameters that the loop puts back after each step: in textual inversion, all embeddings but one."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from diffhook.gradients.sharding import is_sharded


class RestoredParameters:
    """Compares what a step has changed with what is left of it when the model is called next.

    Only rows of embeddings are known to be put back by training scripts, so only their weights are kept over
    a step, for the first captured steps. Not of sharded models: a script cannot put back rows that lie
    with other processes.

    Attributes:
        settled: it is known which rows are put back.
    """

    _STEPS = 2

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        names = {id(parameter): name for name, parameter in parameters.items()}
        self._tables: dict[str, Tensor] = {
            names[id(module.weight)]: module.weight
            for module in ([] if is_sharded(model) else model.modules())
            if isinstance(module, nn.Embedding) and id(module.weight) in names
        }
        self._before: dict[str, Tensor] = {}
        self._after: dict[str, Tensor] = {}
        self._left = self._STEPS if self._tables else 0
        self.masks: dict[
            str, Tensor
        ] = {}  #: parameter name → (rows, columns), 0 where the loop puts values back

    @property
    def settled(self) -> bool:
        return self._left == 0

    def step_began(self) -> None:
        if not self.settled:
            self._before = {name: weight.detach().clone() for name, weight in self._tables.items()}

    def step_ended(self) -> None:
        if self._before:
            self._after = {name: weight.detach().clone() for name, weight in self._tables.items()}

    def called(self) -> Mapping[str, Tensor]:
        """The model is called again. Returns what is found to be put back, as :attr:`masks` has it."""
        if not self._after:
            return {}
        self._left -= 1
        for name, weight in self._tables.items():
            mask = _kept_rows(self._before[name], self._after[name], weight.detach())
            if mask is not None:
                self.masks[name] = mask
        if self.masks:
            self._left = 0
        self._before, self._after = {}, {}
        return self.masks


def _kept_rows(before: Tensor, after: Tensor, now: Tensor) -> Tensor | None:
    """1 in the rows that a step has changed for good, 0 elsewhere; None if none was put back."""
    moved = (before != after).any(1)
    put_back = moved & (now == before).all(1)
    if not bool(put_back.any()):
        return None
    kept = moved & ~put_back
    return kept.to(now.dtype)[:, None].expand(now.shape)
