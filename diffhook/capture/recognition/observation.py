"""What one pass shows of the training loss, at the denoiser's output."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from diffhook.capture.objective.distance import relative

_TOLERANCE = {"torch.float64": 1e-4, "torch.float32": 1e-4, "torch.float16": 3e-3, "torch.bfloat16": 2e-2}
_MOST, _WORST = 0.95, 100.0


def agree(errors: Tensor, tolerance: float) -> bool:
    """Whether the rows' relative errors are within a tolerance: most of them, and the others near it.

    Loops that precondition outputs lose digits themselves where there is little noise.
    """
    errors = errors.flatten()
    within = float((errors <= tolerance).double().mean())
    return within >= _MOST and bool((errors <= _WORST * tolerance).all())


@dataclass(frozen=True)
class Mixing:
    """A scheduler made noisy samples of clean ones.

    Attributes:
        scheduler: of diffusers.
        clean, noise, noisy: (B, …).
        timesteps: (B,), in the scheduler's units.
    """

    scheduler: Any
    clean: Tensor
    noise: Tensor
    timesteps: Tensor
    noisy: Tensor

    def makes(self, given: Tensor) -> bool:
        """Whether a model's input is these noisy samples, perhaps with conditions as further channels."""
        noisy = self.noisy
        if noisy.dim() < 2 or given.dim() != noisy.dim() or len(given) != len(noisy):
            return False
        part = given[:, : noisy.shape[1]]
        return part.shape == noisy.shape and bool((part == noisy.to(part.dtype)).all())

    def scaled(self, given: Tensor) -> Mixing | None:
        """As DDPM's, where a sampler has mixed x + σ ε, and the model is given √ᾱ times that.

        EDM-style loops do so: √ᾱ = 1 / √(σ² + 1).
        """
        noisy, timesteps = self.noisy, self.timesteps.long()
        plain = _variance_preserving(self.scheduler)
        if plain is None or given.shape != noisy.shape or noisy.dim() < 2:
            return None
        if bool((timesteps != self.timesteps).any() or (timesteps < 0).any()):
            return None
        kept = plain.alphas_cumprod.to(noisy.device)
        if int(timesteps.max()) >= len(kept):
            return None
        expected = kept[timesteps].sqrt().view(-1, *(1 for _ in noisy.shape[1:])) * noisy.float()
        if float(relative(given.float(), expected).max()) > _TOLERANCE.get(str(given.dtype), 1e-4):
            return None
        return replace(self, scheduler=plain, timesteps=timesteps, noisy=given.detach())


_PLAIN: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def _variance_preserving(scheduler: Any) -> Any:
    """DDPM's scheduler of the same betas, None where a scheduler has none."""
    if not isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor):
        return None
    if scheduler not in _PLAIN:
        from diffusers import DDPMScheduler

        known = inspect.signature(DDPMScheduler.__init__).parameters
        config = {name: value for name, value in dict(scheduler.config).items() if name in known}
        _PLAIN[scheduler] = DDPMScheduler.from_config(config)
    return _PLAIN[scheduler]


@dataclass(frozen=True)
class Observation:
    """The denoiser's rows of one pass.

    Attributes:
        given: (B, …) its input, x_t.
        told: (B,) the timesteps that it was told.
        output: (B, …) what it said.
        gradient: (B, …) of each sample's own loss, by its output.
        mixing: what made the input, where that was seen.
        error_norms: (B,) lengths of output − target, where the loss's graph holds that squared, be it of the
            other sign or scaled.
        images: (B, …) the rows as the loop's batch has them, where it shows them.
    """

    given: Tensor
    told: Tensor
    output: Tensor
    gradient: Tensor
    mixing: Mixing | None = None
    error_norms: Tensor | None = None
    images: Tensor | None = None

    @property
    def tolerance(self) -> float:
        """Relative error of a gradient up to which the output's precision may have it."""
        return _TOLERANCE.get(str(self.output.dtype), 1e-4)

    @property
    def slope(self) -> Tensor:
        """(B, …) of what the loss takes the mean of: the gradient times the elements of a sample."""
        return self.gradient.float() * self.gradient[0].numel()

    @property
    def target(self) -> Tensor:
        """(B, …) float32, of a squared error: its slope has the direction of output − target, and the loss's
        graph its length, of whatever sign and factor.

        Raises:
            ValueError: the loss's graph does not show the lengths.
        """
        if self.error_norms is None:
            raise ValueError("the loss holds no squared error, or none of the whole output")
        slope = self.slope
        lengths = self.error_norms.float() / slope.flatten(1).norm(dim=1).clamp(min=1e-30)
        return self.output.float() - slope * lengths.view(-1, *(1 for _ in slope.shape[1:]))

    def without_variance(self, channels: int) -> Observation:
        """Of a model that predicts variances in further channels which the loss leaves alone."""
        output = self.output
        if output.dim() < 2 or output.shape[1] != 2 * channels or self.gradient[:, channels:].any():
            return self
        return replace(self, output=output[:, :channels], gradient=self.gradient[:, :channels])

    @property
    def trains_variance(self) -> bool:
        """Whether further channels, as many as those of the input, have a gradient of their own."""
        given, output = self.given.shape, self.output.shape
        if len(given) < 2 or output != (given[0], 2 * given[1], *given[2:]):
            return False
        return bool(self.gradient[:, given[1] :].any())
