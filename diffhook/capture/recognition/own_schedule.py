"""√ᾱ x + √(1 − ᾱ) ε that a loop mixes by itself: of which of the usual schedules, the batch's own rows show.

Most public code keeps a table of its own and calls no scheduler. A squared error tells its target; where that
is ε or v, x_t = p x + q target for each row, and q is √(1 − ᾱ) of the row's timestep, or √(1 − ᾱ) / √ᾱ.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffhook.capture.recognition.observation import Mixing, Observation, agree

STEPS = (1000, 4000, 2000, 500, 400, 300, 256, 250, 200, 128, 100, 64, 50, 32, 25, 20)
"""T of the schedules that are tried."""

_NEAR = 1e-4  # of √(1 − ᾱ): far less than two schedules differ by where there is much of both


class _Schedule(NamedTuple):
    """One that is tried, and a factor on the timesteps that the model is told."""

    scheduler: Any
    scale: float
    predicts: str  # "epsilon" or "v"
    lost: Tensor  # (T,) float64 √(1 − ᾱ)

    def timesteps(self, told: Tensor) -> Tensor | None:
        """(B,) int64, if all are steps of it."""
        steps = told / self.scale
        whole = steps.round().long()
        if bool(((steps - whole).abs() > 1e-3).any() or (whole < 0).any()) or int(whole.max()) >= len(
            self.lost
        ):
            return None
        return whole

    def fits(self, told: Tensor, share: Tensor, tolerance: float) -> bool:
        """Whether rows have these shares (B,) of the target."""
        timesteps = self.timesteps(told)
        lost = share if self.predicts == "epsilon" else share / (1 + share.square()).sqrt()
        return timesteps is not None and agree((self.lost[timesteps] - lost).abs(), tolerance)


class OwnSchedule:
    """Which schedule a loop's own table is, by all passes so far: where hardly anything but noise is left,
    one pass may fit several."""

    def __init__(self) -> None:
        self._left: list[_Schedule] | None = None

    def mixed(self, seen: Observation) -> Mixing | str | None:
        """What was mixed; None: not known yet; or why it is not known, a kind of
        :data:`~diffhook.capture.recognition.verdict.REASONS`."""
        seen = seen.without_variance(seen.given.shape[1] if seen.given.dim() > 1 else 0)
        if seen.error_norms is None or seen.images is None:
            return "unmixed"
        if not seen.given.shape == seen.output.shape == seen.images.shape:
            return "unmixed"
        told, given, images, target = (
            each.detach().cpu().double() for each in (seen.told, seen.given, seen.images, seen.target)
        )
        share, rest = _solved(given, images, target)
        if not agree(rest, seen.tolerance):
            return "unmixed"
        near = max(_NEAR, seen.tolerance / 20)
        left = [each for each in self._left or _schedules() if each.fits(told, share, near)]
        if not left:
            return "schedule"
        self._left = left
        if len(left) > 1:
            return None
        return _mixing(seen, left[0], told, given, images, target)


def _solved(given: Tensor, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) q of given = p images + c + q target, and (B,) the relative length of what that leaves."""
    ones = torch.ones_like(given)
    columns = torch.stack([each.flatten(1) for each in (target, images, ones)], -1)  # (B, n, 3)
    wanted = given.flatten(1).unsqueeze(-1)
    gram = columns.mT @ columns
    solution = torch.linalg.pinv(gram, hermitian=True) @ (columns.mT @ wanted)  # a flat picture is a constant
    left = (wanted - columns @ solution).flatten(1).norm(dim=1)
    return solution[:, 0, 0], left / wanted.flatten(1).norm(dim=1).clamp(min=1e-30)


def _mixing(
    seen: Observation, schedule: _Schedule, told: Tensor, given: Tensor, images: Tensor, target: Tensor
) -> Mixing:
    timesteps = schedule.timesteps(told)
    assert timesteps is not None
    lost = schedule.lost[timesteps].view(-1, *(1 for _ in given.shape[1:]))
    kept = (1 - lost.square()).sqrt()
    noise = target if schedule.predicts == "epsilon" else lost * given + kept * target
    # Of all rows together: where hardly anything of a sample is left in x_t, that alone would not show it.
    pixels = torch.stack([(kept * images).flatten(), kept.expand_as(images).flatten()], 1)
    factors = torch.linalg.lstsq(pixels, (given - lost * noise).flatten().unsqueeze(1)).solution.flatten()
    clean, device = factors[0] * images + factors[1], seen.given.device
    clean, noise = clean.float().to(device), noise.float().to(device)
    return Mixing(schedule.scheduler, clean, noise, timesteps.to(device), seen.given)


@cache
def _schedules() -> list[_Schedule]:
    """The usual ones: linear in β, as it is or stretched to T, or in √β; cosine; sigmoid."""
    from diffusers import DDPMScheduler

    found: list[_Schedule] = []
    for steps in STEPS:
        stretch = 1000 / steps
        kinds = [
            ("linear", 1e-4, 0.02),
            ("linear", 1e-4 * stretch, 0.02 * stretch),
            ("squaredcos_cap_v2", 1e-4, 0.02),
            ("scaled_linear", 0.00085, 0.012),
            ("scaled_linear", 1e-4, 0.02),
            ("sigmoid", 1e-4, 0.02),
        ]
        for kind, first, last in dict.fromkeys(kinds):
            if last >= 1:
                continue
            scheduler = DDPMScheduler(
                num_train_timesteps=steps, beta_start=first, beta_end=last, beta_schedule=kind
            )
            lost = (1 - scheduler.alphas_cumprod.double()).sqrt()
            scales = dict.fromkeys((1.0, stretch, 1 / steps))
            found += [
                _Schedule(scheduler, scale, predicts, lost)
                for scale, predicts in product(scales, ("epsilon", "v"))
            ]
    return found
