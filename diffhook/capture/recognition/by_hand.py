"""Flow matching that a loop mixes by itself: x and ε are solved for, and ε must be white and standard.

Models are told how much noise there is, or how much of the sample. What are the batch's own rows are the
samples. Where neither part is that, what is white is the noise, of samples that have numbers enough to tell;
where both are white, as of whitened latents, the batch's rows must say by their likeness which is which.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffhook.capture.recognition.observation import Mixing, Observation, agree
from diffhook.capture.recognition.whiteness import Whiteness, is_white

_FEWEST = 128  # elements of a row from which its noise can be judged
_LIKE = 0.5  # correlation with a batch's rows from which they are meant, with half of it at most elsewhere
TIMESTEPS = 1000  # T of the scripts that mix by hand


def flow_by_hand(seen: Observation) -> Mixing | str:
    """x_t = (1 − σ) x + σ ε and the target v = ε − x give ε = x_t + (1 − σ) v and x = x_t − σ v; with x and ε
    exchanged, these are the lines of a loop whose time runs the other way.

    Of whatever sign and factor, as where outputs are preconditioned, x_t − σ output against x.

    Returns:
        What was mixed, or why that is not known: a kind of
        :data:`~diffhook.capture.recognition.verdict.REASONS`.
    """
    sigmas = _sigmas(seen.told)
    if sigmas is None or seen.error_norms is None or seen.given.shape != seen.output.shape:
        return "unmixed"
    sigmas = sigmas.view(-1, *(1 for _ in seen.given.shape[1:]))
    given, target = seen.given.float(), seen.target
    clean, noise = given - sigmas * target, given + (1 - sigmas) * target
    if _are(noise, seen.images, seen.tolerance):
        clean, noise = noise, clean
    elif not _are(clean, seen.images, seen.tolerance):
        if seen.output[0].numel() < _FEWEST:
            return "small"
        if not is_white(noise):
            clean, noise = noise, clean
        if not is_white(noise):
            return "unmixed"
    return Mixing(_scheduler(), clean, noise, sigmas.flatten() * TIMESTEPS, given)


def _are(solved: Tensor, images: Tensor | None, tolerance: float) -> bool:
    """Whether what was solved for are the batch's own rows, but for a factor and a shift that all share."""
    if images is None or images.shape != solved.shape:
        return False
    own, wanted = images.to(solved).double().flatten(1), solved.double().flatten(1)
    columns = torch.stack([own.flatten(), torch.ones_like(own).flatten()], 1)
    found = torch.linalg.lstsq(columns.cpu(), wanted.flatten().unsqueeze(1).cpu()).solution.to(own)
    left = wanted - found[0] * own - found[1]
    return agree(left.norm(dim=1) / wanted.norm(dim=1).clamp(min=1e-30), tolerance)


def _sigmas(told: Tensor) -> Tensor | None:
    told = told.float()
    if not bool((told > 0).all()) or float(told.max()) > TIMESTEPS:
        return None
    return told if float(told.max()) <= 1 else told / TIMESTEPS


def _scheduler() -> object:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIMESTEPS)


class Exchange:
    """Whether x and ε that were solved for may be each other, over all passes so far."""

    def __init__(self) -> None:
        self._clean = Whiteness()
        self._sums = torch.zeros(5, dtype=torch.float64)

    def add(self, mixing: Mixing, images: Tensor | None) -> None:
        """A pass.

        Args:
            images: (B, …) its rows as the batch has them.
        """
        self._clean.add(mixing.clean)
        if images is None or images.shape != mixing.clean.shape:
            return
        images = images.to(mixing.clean.device)
        own, clean, noise = (_centred(each) for each in (images, mixing.clean, mixing.noise))
        pairs = ((own, clean), (own, noise), (own, own), (clean, clean), (noise, noise))
        self._sums += torch.stack([(one * other).sum().cpu().double() for one, other in pairs])

    @property
    def refusal(self) -> str | None:
        """Why the samples are not known, as a kind of reason; None: they are."""
        with_clean, with_noise, own, clean, noise = self._sums.tolist()
        like_clean = abs(with_clean) / max((own * clean) ** 0.5, 1e-30)
        like_noise = abs(with_noise) / max((own * noise) ** 0.5, 1e-30)
        if like_noise > max(_LIKE, 2 * like_clean):
            return "reversed"
        if like_clean > max(_LIKE, 2 * like_noise):
            return None
        return "either" if self._clean.holds else None


def _centred(values: Tensor) -> Tensor:
    """Without each row's mean, or each channel's: samples and noise may share a shift by chance."""
    flat = values.float().flatten(2 if values.dim() > 2 else 1)
    return (flat - flat.mean(-1, keepdim=True)).flatten(1)
