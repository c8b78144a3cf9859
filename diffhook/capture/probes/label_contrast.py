"""Wrong labels and captions: which samples a model denoises better under another condition than their own.

Forward passes only. A model that has learned its classes finds a wrongly labelled sample easier under its
true class; nothing else in a log shows that so plainly. Of captions, those of other samples are tried.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from diffhook.capture.objective import Objective
from diffhook.capture.objective.diffusion import DiffusionObjective
from diffhook.capture.probes.grid import Grid, take
from diffhook.capture.samples.inputs import without_shared

CLASSES, CAPTIONS = 16, 4
"""Of more, so many, evenly spaced, are tried beside a sample's own. Models that read captions are large."""

REFERENCE = 256
"""Samples that say what the conditions are, and what loss is usual at a timestep."""

_LABELS = ("class_labels", "y", "c", "labels", "label", "classes", "class_label", "cls")
"""What denoisers call their class."""

Arguments = dict[str, Any]  # of the model
Batches = Callable[[], Iterable[tuple[Sequence[int], Any]]]  # () → (sample ids, collated batch on the device)


class LabelContrast(NamedTuple):
    """How a sample's own class or caption compares with the best of the others.

    Attributes:
        contrast: log loss under its own − log of the smallest under another; positive: another fits better.
            NaN where no other was tried.
        own, better: the sample's class and the other of the smallest loss; −1 of captions, and where no other
            was tried.
    """

    contrast: float = float("nan")
    own: int = -1
    better: int = -1


class LabelContrasts:
    """Sets samples' losses under their own class or caption against those under others.

    A loss is the sum over the grid's timesteps, each divided by the mean over
    the reference samples there, so that no timestep rules; the noise at a timestep is the same for all. Which
    conditions are tried is learned from the same samples: so each sample's number is its own affair, and
    several processes come to the same.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: DiffusionObjective,
        conditions: _Conditions,
        batches: Batches,
        grid: Grid,
    ) -> None:
        self._model, self._objective, self._conditions = model, objective, conditions
        self._under = [_told(objective, change) for change in conditions.tried]
        self._cells = [(timestep, grid.seeds(timestep, 0)[0]) for timestep in grid.timesteps_of(objective)]
        own = [self._losses(batch, len(ids), [objective])[:, :, 0] for ids, batch in batches()]
        self._scale = np.concatenate(own, axis=1).mean(1)[:, None]

    @classmethod
    def learn(cls, model: nn.Module, objective: Objective, batches: Batches, grid: Grid) -> Self | None:
        """None of a model without conditions, or where all samples have the same.

        Args:
            objective: one whose inputs hand the model integer ``class_labels`` (``y``, ``labels`` …), or
                ``encoder_hidden_states``; of others, nothing is known.
            batches: goes through the reference samples, from the beginning at each call.
            grid: timesteps; one draw of noise at each.
        """
        if not isinstance(objective, DiffusionObjective):
            return None
        conditions = _classes(objective, batches) or _captions(objective, batches)
        return None if conditions is None else cls(model, objective, conditions, batches, grid)

    def of(self, batch: Any, count: int) -> list[LabelContrast]:
        """Of each of a collated batch's so many samples."""
        losses = self._losses(batch, count, [self._objective, *self._under]) / self._scale[:, :, None]
        arguments = self._objective.inputs(batch)[1]
        under = np.where(self._conditions.own(arguments).numpy(), np.inf, losses[:, :, 1:]).sum(0)
        best, smallest = under.argmin(1), under.min(1)
        with np.errstate(divide="ignore", invalid="ignore"):
            contrasts = np.log(losses[:, :, 0].sum(0)) - np.log(smallest)
        alone = np.isinf(smallest)  # nothing but its own was tried
        contrasts[alone] = np.nan
        better = np.where(alone, -1, np.array(self._conditions.classes)[best])
        columns = zip(contrasts.tolist(), self._conditions.told(arguments), better.tolist(), strict=True)
        return [LabelContrast(*each) for each in columns]

    @torch.no_grad()
    def _losses(
        self, batch: Any, count: int, objectives: list[DiffusionObjective]
    ) -> npt.NDArray[np.float64]:
        """(S, count, C) by timestep, sample and objective."""
        each = []
        for timestep, seed in self._cells:
            times = torch.full((count,), timestep, device=next(self._model.parameters()).device)
            seeds = torch.full((count,), seed)
            losses = [one(self._model, batch, times, seeds).double() for one in objectives]
            each.append(torch.stack(losses, 1))
        return torch.stack(each).cpu().numpy()


@dataclass(frozen=True)
class _Conditions:
    """What samples are tried under.

    Attributes:
        tried: arguments of a batch → those that tell all of it one condition, for each condition.
        own: arguments of a batch → (B, C) bool, whether a sample's own condition is the tried one.
        classes: what each tried condition is called: a class's number, or −1 of a caption.
        told: arguments of a batch → the class of each of its samples; −1 of a caption.
    """

    tried: list[Callable[[Arguments], Arguments]]
    own: Callable[[Arguments], Tensor]
    classes: list[int]
    told: Callable[[Arguments], list[int]]


def _classes(objective: DiffusionObjective, batches: Batches) -> _Conditions | None:
    """None where the model is told no class, or the same of all."""
    found: set[int] = set()
    name = ""
    for _, batch in batches():
        arguments = objective.inputs(batch)[1]
        name = next((each for each in _LABELS if each in arguments), "")
        labels = arguments.get(name)
        if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point():
            return None
        found.update(labels.tolist())
    if len(found) < 2:
        return None
    classes = np.sort(list(found))[spaced(len(found), CLASSES)].tolist()

    def under(label: int) -> Callable[[Arguments], Arguments]:
        return lambda told: {**told, name: torch.full_like(told[name], label)}

    def own(told: Arguments) -> Tensor:
        return told[name].cpu()[:, None] == torch.tensor(classes)

    def told(arguments: Arguments) -> list[int]:
        labels: list[int] = arguments[name].tolist()
        return labels

    return _Conditions([under(label) for label in classes], own, classes, told)


def _captions(objective: DiffusionObjective, batches: Batches) -> _Conditions | None:
    """None where the model reads no captions. Of the others' conditions all go with the caption."""
    count = 0
    for ids, batch in batches():
        states = objective.inputs(batch)[1].get("encoder_hidden_states")
        if not isinstance(states, Tensor) or states.dim() != 3:
            return None
        count += len(ids)
    wanted, chosen, start = set(spaced(count, CAPTIONS).tolist()), [], 0
    for ids, batch in batches():
        told = without_shared(objective.inputs(batch)[1], batch)
        places = [place for place in range(len(ids)) if start + place in wanted]
        chosen += [take(told, torch.tensor([place], device=_states(told).device)) for place in places]
        start += len(ids)

    def under(other: Arguments) -> Callable[[Arguments], Arguments]:
        def repeated(told: Arguments) -> Arguments:
            states = _states(told)
            places = torch.zeros(len(states), dtype=torch.long, device=states.device)
            return {**told, **take(other, places)}

        return repeated

    def own(told: Arguments) -> Tensor:
        return torch.tensor([[torch.equal(mine, _states(o)[0]) for o in chosen] for mine in _states(told)])

    def untold(arguments: Arguments) -> list[int]:
        return [-1] * len(_states(arguments))

    tried = [under(other) for other in chosen]
    return _Conditions(tried, own, [-1] * len(chosen), untold) if len(chosen) > 1 else None


def _states(told: Arguments) -> Tensor:
    found: Tensor = told["encoder_hidden_states"]
    return found


def spaced(count: int, most: int) -> npt.NDArray[np.intp]:
    """At most so many of 0 … count − 1, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, most).round().astype(np.intp))


def _told(objective: DiffusionObjective, change: Callable[[Arguments], Arguments]) -> DiffusionObjective:
    """The objective with other arguments for the model."""
    changed = copy.copy(objective)

    def inputs(batch: Any) -> tuple[Tensor, Arguments]:
        clean, arguments = objective.inputs(batch)
        return clean, change(arguments)

    changed.inputs = inputs
    return changed
