"""Training losses written out, as loops would compute them, and what is recognised of their passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor
from torch.nn import functional as F

from diffhook.capture.recognition import Mixing, Observation, Recognised, Recognition

SHAPE = (3, 12, 12)
BY_HAND = ("by hand", "preconditioned")  # flow matching whose loop mixes its samples itself
FLOWS = ("flow", *BY_HAND)
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "linear": lambda: DDPMScheduler(),
    "stable diffusion": lambda: DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
    ),
    "cosine": lambda: DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    "ddim": lambda: DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing"),
    "short": lambda: DDPMScheduler(num_train_timesteps=100),
}


def snr(scheduler: Any, timesteps: Tensor) -> Tensor:
    kept = scheduler.alphas_cumprod[timesteps]
    return kept / (1 - kept)


@dataclass
class Loss:
    """A training loss written out, as a loop would compute it."""

    scheduler: Any
    predicts: str = "epsilon"
    distance: str = "squared"
    weighting: str = "uniform"
    gamma: float = 5.0
    offset: float = 0.0
    perturbation: float = 0.0
    factor: float = 1.0
    told_scale: float = 1.0
    variance: bool = False
    variance_term: float = 0.0  # on the variances, besides
    colour: bool = False
    turned: bool = False  # the loss squares target − prediction
    reversed: bool = False  # of flow matching: the model is told how much of the sample there is
    white: bool = False  # samples that look like noise
    error: float = 0.3  # of the prediction
    most: int | None = None  # the highest timestep
    own: bool = False  # a loop's own table takes the scheduler's place
    shown: str = ""  # what the batch holds of a sample: "" nothing, "itself", or "another"

    def observe(
        self, draw: torch.Generator, rows: int = 24, dtype: torch.dtype = torch.float32
    ) -> Observation:
        """A pass of a model that predicts the target but for noise."""
        clean = torch.randn(rows, *SHAPE, generator=draw)
        clean = clean if self.white else clean.cumsum(-1).clamp(-1, 1)
        noise = torch.randn(clean.shape, generator=draw)
        noise += self.offset * torch.randn(rows, SHAPE[0], 1, 1, generator=draw)
        if self.colour:
            noise = (noise + noise.roll(1, -1)) / 2**0.5
        added = noise + self.perturbation * torch.randn(clean.shape, generator=draw)
        most = self.most or self.scheduler.config.num_train_timesteps
        timesteps = torch.randint(0, most, (rows,), generator=draw)
        if self.predicts in FLOWS:
            sigmas = ((timesteps + 0.5) / 1000).view(-1, 1, 1, 1)
            timesteps = sigmas.flatten() * 1000
            noisy, target = (1 - sigmas) * clean + sigmas * added, noise - clean
            if self.reversed:
                noisy, target = (1 - sigmas) * added + sigmas * clean, clean - noise
        else:
            noisy = self.scheduler.add_noise(clean, added, timesteps)
            target = {
                "epsilon": lambda: noise,
                "sample": lambda: clean,
                "v": lambda: self.scheduler.get_velocity(clean, noise, timesteps),
                "denoised by EDM": lambda: (clean - 0.3 * noisy) / 0.9,
            }[self.predicts]()
        output = (target + self.error * torch.randn(clean.shape, generator=draw)).to(dtype)
        if self.variance:
            output = torch.cat([output, torch.randn(clean.shape, generator=draw)], 1)
        output.requires_grad_()
        predicted = output[:, : SHAPE[0]].float()
        if self.predicts == "preconditioned":
            predicted, target = noisy - sigmas * predicted, clean
        difference = target - predicted if self.turned else predicted - target
        losses = self._distance(difference).flatten(1).mean(1) * self._weights(timesteps) * self.factor
        scaler = 2.0**16 if dtype == torch.float16 else 1.0  # as a GradScaler, or small gradients are lost
        if self.variance_term:
            losses = losses + self.variance_term * output[:, SHAPE[0] :].float().square().flatten(1).mean(1)
        gradient, inner = torch.autograd.grad(losses.sum() * scaler, (output, difference))
        gradient = gradient.float() / scaler
        lengths = [each.detach().flatten(1).norm(dim=1) for each in (difference, inner / scaler, gradient)]
        mixing = None
        if self.predicts not in BY_HAND and not self.own:
            mixing = Mixing(self.scheduler, clean, added, timesteps, noisy)
        images = {"": None, "itself": 2 * clean + 1, "another": torch.rand_like(clean)}[self.shown]
        return Observation(
            noisy,
            timesteps * self.told_scale,
            output.detach(),
            gradient,
            mixing,
            lengths[0] * lengths[1] / lengths[2] if self.distance == "squared" else None,  # others hold none
            images,
        )

    def _distance(self, difference: Tensor) -> Tensor:
        zero = torch.zeros_like(difference)
        return {
            "squared": lambda: difference.square(),
            "absolute": lambda: difference.abs(),
            "huber": lambda: F.huber_loss(difference, zero, reduction="none", delta=0.4),
            "smooth": lambda: F.smooth_l1_loss(difference, zero, reduction="none", beta=0.25),
            "pseudo-huber": lambda: 0.2 * ((difference.square() + 0.01).sqrt() - 0.1),
            "fourth power": lambda: difference.pow(4),
        }[self.distance]()

    def _weights(self, timesteps: Tensor) -> Tensor:
        if self.weighting == "uniform":
            return torch.ones(len(timesteps))
        if self.weighting == "sines":
            return 1.5 + (timesteps / 37).sin()
        if self.weighting == "by row":
            return torch.linspace(0.5, 2, len(timesteps))
        if self.predicts in FLOWS:
            sigmas = timesteps / 1000
            return {
                "sigma_sqrt": sigmas**-2.0,
                "cosmap": 2 / (3.14159265 * (1 - 2 * sigmas + 2 * sigmas**2)),
            }[self.weighting]
        ratio = snr(self.scheduler, timesteps).clamp(min=1e-20)
        divisor = {"epsilon": ratio, "v": ratio + 1, "sample": torch.ones_like(ratio)}[self.predicts]
        return {
            "min-snr": ratio.clamp(max=self.gamma) / divisor,
            "debiased": ratio**-0.5,
            "p2": 1 / (1 + ratio),
        }[self.weighting]


def recognise(loss: Loss, seed: int = 0, passes: int = 12, **options: Any) -> Any:
    """The verdict on a training of so many passes."""
    draw, recognition = torch.Generator().manual_seed(seed), Recognition()
    for _ in range(passes):
        recognition.add(loss.observe(draw, **options))
    return recognition.verdict


def slope(found: Recognised, mixing: Mixing, output: Tensor) -> Tensor:
    """(B, …): the gradient at the output that the recognised loss would have."""
    objective = found.objective()
    output = output.clone().requires_grad_()
    target = objective.parametrization.target(mixing.clean, mixing.noise, mixing.timesteps)
    weights = objective.factor * objective.weighting(mixing.timesteps, objective.parametrization)
    losses = objective.distance(output - target).flatten(1).mean(1) * weights
    (gradient,) = torch.autograd.grad(losses.sum(), output)
    return gradient
