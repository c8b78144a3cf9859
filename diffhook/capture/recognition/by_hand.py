"""Flow matching that a loop mixes by itself: x and ε are solved for, and ε must be white and standard."""

from __future__ import annotations

import math

from torch import Tensor

from diffhook.capture.recognition.observation import Mixing, Observation

_FEWEST = 128  # elements of a row from which its noise can be judged
_DEVIATIONS = 6.0
TIMESTEPS = 1000  # T of the scripts that mix by hand


def flow_by_hand(seen: Observation) -> Mixing | None:
    """x_t = (1 − σ) x + σ ε and the target v = ε − x give ε = x_t + (1 − σ) v and x = x_t − σ v.

    Of a squared error the slope has the direction of output − v, and the loss's graph its length. Where
    outputs are preconditioned, x_t − σ output against x, the graph has −σ times it. None: ε is not white
    noise of variance 1.
    """
    sigmas = _sigmas(seen.told)
    few = seen.output[0].numel() < _FEWEST
    if sigmas is None or seen.difference is None or seen.given.shape != seen.output.shape or few:
        return None
    sigmas = sigmas.view(-1, *(1 for _ in seen.given.shape[1:]))
    given, slope, difference = seen.given.float(), seen.slope, seen.difference.float()
    preconditioned = slope.shape == difference.shape and float((slope * difference).sum()) < 0
    lengths = difference.flatten(1).norm(dim=1) / slope.flatten(1).norm(dim=1).clamp(min=1e-30)
    error = slope * lengths.view_as(sigmas) / (sigmas if preconditioned else 1)
    target = seen.output.float() - error
    noise = given + (1 - sigmas) * target
    if not is_white(noise):
        return None
    return Mixing(_scheduler(), given - sigmas * target, noise, sigmas.flatten() * TIMESTEPS, given)


def _sigmas(told: Tensor) -> Tensor | None:
    told = told.float()
    if not bool((told > 0).all()) or float(told.max()) > TIMESTEPS:
        return None
    return told if float(told.max()) <= 1 else told / TIMESTEPS


def _scheduler() -> object:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIMESTEPS)


def is_white(noise: Tensor) -> bool:
    """Whether (B, …) numbers may be standard Gaussian noise: mean, variance, kurtosis and neighbours.

    A constant shift of each channel, as noise offset adds, is left out of it.
    """
    noise = noise.float()
    if noise.dim() > 3:
        noise = noise - noise.flatten(2).mean(2).view(*noise.shape[:2], *(1 for _ in noise.shape[2:]))
        lost = noise.shape[0] * noise.shape[1]
    else:
        lost = 0
    flat, count = noise.flatten(1), noise.numel()
    variance = float(flat.square().sum()) / max(count - lost, 1)
    rows = flat.square().mean(1) * count / max(count - lost, 1)
    kurtosis = float(flat.pow(4).mean()) / max(float(flat.square().mean()) ** 2, 1e-30)
    neighbours = float((flat[:, 1:] * flat[:, :-1]).mean()) / max(variance, 1e-30)
    root = math.sqrt(count)
    return (
        abs(variance - 1) < _DEVIATIONS * math.sqrt(2) / root
        and bool(((rows - 1).abs() < _DEVIATIONS * math.sqrt(2 / flat.shape[1])).all())
        and abs(kurtosis - 3) < _DEVIATIONS * math.sqrt(24) / root
        and abs(neighbours) < _DEVIATIONS / root + lost / count
    )
