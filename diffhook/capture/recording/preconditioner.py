"""What Adam divides gradients by, read from the live optimiser."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_ADAMS = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam)


def adam_preconditioner(
    optimizer: torch.optim.Optimizer | None, parameters: Mapping[str, nn.Parameter]
) -> Mapping[str, Tensor]:
    """Parameter name → 1 / (√v̂ + ε) as the last step divided, float32 on the CPU, of the parameter's shape.

    Each is computed when it is asked for: together they are as large as the model.

    v̂ is the bias-corrected second moment (with amsgrad the largest so far). Where it is 0 the factor
    is 0, not 1/ε: no training gradient has reached that element, so no row has a part there, and 1/ε
    would drown the rest of a projection.

    Raises:
        ValueError: this is not Adam, AdamW or NAdam of torch.optim, has taken no step, or does not
            move every parameter; says so in words that follow "because".
    """
    if not isinstance(optimizer, _ADAMS):
        raise ValueError(f"{type(optimizer).__name__} is not Adam, AdamW or NAdam of torch.optim")
    if not optimizer.state:
        raise ValueError(f"{type(optimizer).__name__} has taken no step")
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    foreign = [name for name, parameter in parameters.items() if id(parameter) not in groups]
    if foreign:
        raise ValueError(f"{foreign[0]} ({len(foreign)} such) belongs to another optimizer")
    return _Factors(optimizer, parameters, groups)


class _Factors(Mapping[str, Tensor]):
    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Mapping[str, nn.Parameter],
        groups: Mapping[int, Mapping[str, Any]],
    ) -> None:
        self._optimizer, self._parameters, self._groups = optimizer, parameters, groups

    def __getitem__(self, name: str) -> Tensor:
        parameter = self._parameters[name]
        return _factor(parameter, self._optimizer.state.get(parameter), self._groups[id(parameter)])

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


def _factor(parameter: nn.Parameter, state: Mapping[str, Any] | None, group: Mapping[str, Any]) -> Tensor:
    if not state:  # it never had a gradient
        return torch.zeros(parameter.shape)
    moment = state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"].detach().float()
    correction = 1 - group["betas"][1] ** float(state["step"])
    factor = 1 / ((moment / correction).sqrt() + group["eps"])
    return torch.where(moment > 0, factor, 0.0).cpu()
