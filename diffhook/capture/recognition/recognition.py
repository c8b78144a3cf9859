"""Recognises the training loss from the training's own passes.

At the denoiser's output a loss shows the slope of its error: for w · mean of n squared errors, 2w/n times
(output − target). Of each candidate target (ε, v, x, the flow) and distance the rows' weights follow by least
squares, and what is accepted must give the gradients back.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffhook.capture.objective.distance import Distance, relative
from diffhook.capture.objective.parametrization import PARAMETRIZATIONS, FlowToSample, Parametrization
from diffhook.capture.objective.schedulers import configured, remade
from diffhook.capture.recognition.by_hand import Exchange, flow_by_hand
from diffhook.capture.recognition.distances import candidates, fit
from diffhook.capture.recognition.noise_offset import NoiseOffset
from diffhook.capture.recognition.observation import Mixing, Observation, agree
from diffhook.capture.recognition.own_schedule import OwnSchedule
from diffhook.capture.recognition.verdict import Recognised, Refusal
from diffhook.capture.recognition.weightings import Weights, find_weighting
from diffhook.capture.recognition.whiteness import Whiteness, is_white
from diffhook.errors import ConfigurationError

logger = logging.getLogger("diffhook")

ROWS, PASSES = 64, 2
"""From so many rows of so many passes a loss is recognised."""

_LONGEST = 256  # rows after which no further ones will tell how they are weighed
_ODD, _ODD_SHARE = 2, 0.05  # passes, and their share, that may be odd before a loss is given up
_CLEARLY = 4.0  # times the error that another prediction must have
_HALVES = (torch.float16, torch.bfloat16)


@dataclass
class _Candidate:
    """A target and a distance that have explained every pass so far."""

    parametrization: Parametrization
    distance: Distance
    timesteps: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)  # of each pass, all but a twentieth of the rows'

    def weights_of(self, mixing: Mixing, seen: Observation) -> tuple[Tensor, Tensor]:
        """(B,) weights and (B,) relative errors, see :func:`~diffhook.capture.recognition.distances.fit`."""
        target = self.parametrization.target(mixing.clean, mixing.noise, mixing.timesteps)
        return fit(self.distance, seen.output.float() - target.float(), seen.slope)

    def keep(self, mixing: Mixing, weights: Tensor, errors: Tensor) -> None:
        """A pass that it has explained."""
        self.timesteps.append(mixing.timesteps.cpu())
        self.weights.append(weights.cpu().double())
        self.errors.append(float(errors.quantile(0.95)))

    def weights_found(self, tolerance: float) -> Weights | None:
        """How the rows so far are weighed, if that is known."""
        timesteps, weights = torch.cat(self.timesteps), torch.cat(self.weights)
        return find_weighting(timesteps, weights, self.parametrization, tolerance)

    def settled(self, verdict: Recognised, tolerance: float) -> bool:
        """Whether the last pass has the weights of a verdict; passes are not kept from then on."""
        weights = verdict.factor * verdict.weighting(self.timesteps[-1], self.parametrization).double()
        fits = agree((self.weights[-1] / weights - 1).abs(), tolerance)
        self.forget()
        return fits

    def forget(self) -> None:
        """Rows are not needed any more."""
        self.timesteps.clear()
        self.weights.clear()
        self.errors.clear()


class Recognition:
    """Takes passes until it has a verdict.

    Attributes:
        verdict: the loss, or why it is not known; None: not yet.
    """

    def __init__(self) -> None:
        self.verdict: Recognised | Refusal | None = None
        self._rows = 0
        self._passes = 0
        self._failures = 0  # passes
        self._failed = ""  # why the last of them
        self._overflowed = False  # a pass whose gradient is not finite
        self._scheduler: Any = None
        self._parametrizations: list[Parametrization] = []
        self._candidates: list[_Candidate] = []
        self._scale: float | None = None  # of the timesteps that the model is told
        self._noise = Whiteness()  # of all rows, where each pass has few
        self._offset = NoiseOffset()
        self._schedule = OwnSchedule()
        self._exchange: Exchange | None = None  # of samples and noise, where they had to be solved for

    def end(self, passes: int, *, thinned: bool = False) -> Refusal | None:
        """The training is over. Why there is no verdict, where there is none.

        Args:
            passes: that have made rows, whether or not they could be shown here.
            thinned: further ones were not captured, which ``every=1`` would have.
        """
        if self.verdict is not None:
            return None
        if self._rows >= ROWS and self._passes >= PASSES:
            kind = "unsettled"
        elif self._rows:
            kind = "thinned" if thinned else "short"
        elif not passes:
            kind = "uncaptured"
        else:
            kind = self._failed or ("overflowed" if self._overflowed else "unseen")
        return Refusal(kind, self._rows, early=True)

    def add(self, seen: Observation) -> Mixing | None:
        """Take a pass. Returns what made its noisy samples, where that is known and fits."""
        if not bool(torch.isfinite(seen.gradient).all()):
            self._overflowed = True
            return None
        mixing = seen.mixing if seen.mixing is not None else self._solved(seen)
        if mixing is None:
            return None
        failure = mixing if isinstance(mixing, str) else self._failure(mixing, seen)
        if failure is None:
            self._passes += 1
            self._rows += len(seen.told)
            if self.verdict is None and self._rows >= ROWS and self._passes >= PASSES:
                self._decide(seen.tolerance)
            return mixing if isinstance(mixing, Mixing) else None
        self._failures, self._failed = self._failures + 1, failure
        if self._failures > max(_ODD, _ODD_SHARE * self._passes):
            self.verdict = Refusal("changed" if isinstance(self.verdict, Recognised) else failure)
        return None

    def _solved(self, seen: Observation) -> Mixing | str | None:
        """What a loop has mixed by itself; None: not known yet; or why it is not known."""
        if seen.trains_variance:
            return "variance"
        mixed = self._schedule.mixed(seen)  # it must be exact; where little of a sample is left, both may fit
        if not isinstance(mixed, str):
            return mixed
        flow = flow_by_hand(seen)
        return flow if isinstance(flow, Mixing) or mixed == "unmixed" else mixed

    def _failure(self, mixing: Mixing, seen: Observation) -> str | None:
        """Why a pass is not explained; a kind of :data:`~diffhook.capture.recognition.verdict.REASONS`."""
        if self._scheduler is not None and not self._knows(mixing.scheduler):
            return "schedulers"
        if self._scheduler is None and not self._meet(mixing.scheduler):
            return "scheduler"
        if seen.trains_variance:
            return "variance"
        seen = seen.without_variance(mixing.clean.shape[1])
        if seen.output.shape != mixing.clean.shape:
            return "target"
        if not self._mixes(mixing, seen.tolerance):
            return "scheduler"
        if not self._scales(mixing.timesteps, seen.told):
            return "timesteps"
        if not is_white(mixing.noise):
            return "noise"
        if not self._explained(mixing, seen):
            return "target"
        if isinstance(self.verdict, Recognised):
            return None if self._candidates[0].settled(self.verdict, seen.tolerance) else "weights"
        self._noise.add(mixing.noise)
        self._offset.add(mixing.noise)
        if seen.mixing is None:
            self._exchange = self._exchange or Exchange()
            self._exchange.add(mixing, seen.images)
        return None

    def _knows(self, scheduler: Any) -> bool:
        return type(scheduler) is type(self._scheduler) and configured(scheduler) == self._config

    def _meet(self, scheduler: Any) -> bool:
        """Take its configuration, and what may be predicted with it."""
        found = []
        try:
            fresh = remade(scheduler)
        except (TypeError, ValueError, AttributeError, ImportError):
            return False
        for kind in PARAMETRIZATIONS.values():
            try:
                found.append(kind(fresh))
            except ConfigurationError:
                continue
        self._scheduler, self._config, self._parametrizations = fresh, configured(scheduler), found
        return bool(found)

    def _mixes(self, mixing: Mixing, tolerance: float) -> bool:
        """Keep the parametrizations that mix as was seen."""
        kept = []
        for kind in self._parametrizations:
            noisy = kind.noisy(mixing.clean, mixing.noise, mixing.timesteps)
            if float(relative(noisy.float(), mixing.noisy.float()).max()) <= tolerance:
                kept.append(kind)
        self._parametrizations = kept or self._parametrizations
        return bool(kept)

    def _scales(self, timesteps: Tensor, told: Tensor) -> bool:
        told_in, timesteps, told = told.dtype, timesteps.cpu().double(), told.cpu().double()
        if len(told) != len(timesteps):
            return False
        moved = timesteps != 0
        ratios = told[moved] / timesteps[moved]
        if self._scale is None and len(ratios):
            scale = float(ratios.median())
            self._scale = 1.0 if abs(scale - 1) < 1e-6 else 1 / round(1 / scale) if 0 < scale < 1 else scale
        if self._scale is None:
            return bool((told == timesteps).all())
        rounding = 4e-3 if told_in in _HALVES else 1e-5
        return bool(
            ((told - timesteps * self._scale).abs() <= rounding * self._scale * timesteps.abs()).all()
        )

    def _explained(self, mixing: Mixing, seen: Observation) -> bool:
        kept = []
        for candidate in self._candidates or self._conceivable(mixing, seen):
            weights, errors = candidate.weights_of(mixing, seen)
            if agree(errors, seen.tolerance):
                candidate.keep(mixing, weights, errors)
                kept.append(candidate)
        self._candidates = kept or self._candidates
        return bool(kept)

    def _conceivable(self, mixing: Mixing, seen: Observation) -> list[_Candidate]:
        found = []
        for kind in self._parametrizations:
            difference = seen.output.float() - kind.target(mixing.clean, mixing.noise, mixing.timesteps)
            found += [_Candidate(kind, each) for each in candidates(difference, seen.slope)]
        return found

    def _decide(self, tolerance: float) -> None:
        refused = None if self._exchange is None else self._exchange.refusal
        if refused == "reversed" and any(isinstance(kind, FlowToSample) for kind in self._parametrizations):
            refused = "noise"  # it is time that runs forward, with samples that look like noise
        refused = refused or (None if self._noise.holds else "noise")
        if refused is not None:
            self.verdict = Refusal(refused)
            return
        told = [(each, found) for each in self._candidates if (found := each.weights_found(tolerance))]
        if len({each.parametrization.name for each, _ in told}) > 1:
            told.sort(key=lambda each: max(each[0].errors))
        several = bool(told) and _near(told[0][0], [each for each, _ in told[1:]])
        if told and not several:
            self._accept(*told[0])
        elif self._rows >= _LONGEST:
            self.verdict = Refusal("several" if several else "weights")

    def _accept(self, candidate: _Candidate, weights: Weights) -> None:
        self._candidates = [candidate]
        self.verdict = Recognised(
            self._scheduler,
            candidate.parametrization.name,
            candidate.distance,
            weights.weighting,
            weights.factor,
            1.0 if self._scale is None else self._scale,
            self._offset.estimate(),
            self._rows,
            max(*candidate.errors, weights.error),
        )
        candidate.forget()


def _near(best: _Candidate, others: list[_Candidate]) -> bool:
    """Whether another prediction explains the rows about as well: near an end of a schedule, two targets may
    differ by less than a half's digits."""
    rivals = [each for each in others if each.parametrization.name != best.parametrization.name]
    return any(max(each.errors) < _CLEARLY * max(best.errors) for each in rivals)
