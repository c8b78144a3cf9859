"""What recognition comes to: the training loss, or why it is not known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffhook.capture.objective.diffusion import DiffusionObjective
from diffhook.capture.objective.distance import Distance, Squared
from diffhook.capture.objective.weighting import Uniform, Weighting
from diffhook.capture.recognition.noise_offset import MeasuredOffset
from diffhook.capture.samples.inputs import Inputs, default_inputs


@dataclass(frozen=True)
class Recognised:
    """The training loss, as its own gradients show it.

    Attributes:
        scheduler: one of diffusers', made anew from the configuration of the training's.
        noise_offset: as it was measured.
        prediction_type, distance, weighting, factor, timestep_scale: see
            :class:`~diffhook.capture.objective.diffusion.DiffusionObjective`.
        rows: from which it was recognised.
        error: relative error of the rows' gradients by it, the largest but for a twentieth of the rows.
    """

    scheduler: Any
    prediction_type: str
    distance: Distance
    weighting: Weighting
    factor: float
    timestep_scale: float
    noise_offset: MeasuredOffset
    rows: int
    error: float

    def objective(self, inputs: Inputs = default_inputs) -> DiffusionObjective:
        """The loss, for probes and queries."""
        return DiffusionObjective(
            self.scheduler,
            inputs,
            prediction_type=self.prediction_type,
            weighting=self.weighting,
            noise_offset=self.noise_offset.value,
            timestep_scale=self.timestep_scale,
            distance=self.distance,
            factor=self.factor,
        )

    @property
    def words(self) -> str:
        """In a line."""
        parts = [self.prediction_type.replace("_", "-"), type(self.scheduler).__name__]
        if not isinstance(self.distance, Squared):
            parts.append(_named(self.distance.describe()))
        if not isinstance(self.weighting, Uniform):
            parts.append(_named(self.weighting.describe()))
        if (offset := self.noise_offset).value:
            parts.append(
                f"noise offset {offset.value:g} (measured: {offset.measured:.3f} ± {offset.error:.3f})"
            )
        if self.timestep_scale != 1:
            parts.append(f"timesteps × {self.timestep_scale:g}")
        return f"{', '.join(parts)} ({self.rows} rows, error at most {max(self.error, 1e-7):.0e})"


def _named(description: dict[str, Any]) -> str:
    values = ", ".join(f"{key} {value:g}" for key, value in description.items() if key != "kind")
    return f"{description['kind'].replace('_', '-')} {values}".strip()


REASONS = {
    "unmixed": "no scheduler's add_noise or scale_noise was seen to make the model's input, and the loss is "
    "neither of those known of loops that mix by themselves: flow matching, a squared error of ε − x, at "
    "(1 − σ) x + σ ε, the model told σ or 1000 σ, or of x − ε, told 1 − σ; and a squared error of ε or v, at "
    "√ᾱ x + √(1 − ᾱ) ε, where the batch holds x itself",
    "schedule": "the loop mixes samples and noise by itself, in shares that are not √ᾱ and √(1 − ᾱ) of a "
    "usual schedule (linear, scaled linear, cosine, sigmoid) at the timesteps that the model is told",
    "small": "no scheduler's add_noise or scale_noise was seen to make the model's input, and samples of "
    "fewer than 128 numbers, which are not as the batch holds them, do not show how else noise was mixed in",
    "reversed": "the model is told how much of the sample is in its input, t x + (1 − t) ε, and samples look "
    "like noise",
    "either": "samples look like noise, so that it is not known which part of the input t a + (1 − t) b they "
    "are",
    "scheduler": "the scheduler mixes samples and noise in a way that its configuration does not give",
    "schedulers": "samples and noise are mixed by several schedulers, or by one whose configuration changes",
    "timesteps": "the model is told timesteps that are no constant multiple of the scheduler's",
    "noise": "the noise is not white",
    "target": "the loss's gradient at the output is that of no known error of ε-, v-, sample- or "
    "flow-prediction",
    "variance": "the loss has a second term, of variances that the model predicts beside the noise (learned "
    "sigma)",
    "several": "the timesteps trained on are so near an end of the schedule that several predictions explain "
    "the loss, as far as the output's precision shows",
    "weights": "the loss weighs its rows by none of the known functions of the timestep",
    "changed": "the loss of later steps is another one",
    "short": "too few of the captured rows showed it, {rows}, and 64 of two batches are needed: train longer",
    "unsettled": "{rows} captured rows showed it, and do not tell yet by what it weighs them, or which of "
    "several predictions it is; 256 decide: train longer",
    "thinned": "too few of the captured rows showed it, {rows}, and 64 of two batches are needed: train "
    "longer, or capture more steps (every=1)",
    "uncaptured": "no micro-batch has made rows that could show it, and the closing line says why",
    "unseen": "none of the captured rows showed it: that takes a denoiser that is told timesteps, and whose "
    "output is a tensor with a row for each sample, or begins with one",
    "overflowed": "the loss's gradient at the output was finite in none of the captured rows",
}


_HELP = {
    "reversed": "Tell that: objective=DiffusionObjective(FlowMatchEulerDiscreteScheduler(), inputs=…, "
    'prediction_type="flow_to_sample"), with timestep_scale=1 / 1000 where the model is told 0 … 1',
    "either": "If it is b, tell that: objective=DiffusionObjective(FlowMatchEulerDiscreteScheduler(), "
    "inputs=…), with timestep_scale=1 / 1000 where the model is told 0 … 1; if it is a, "
    'prediction_type="flow_to_sample" besides',
}
_USUAL_HELP = "Tell queries: objective=DiffusionObjective(noise_scheduler, …)"
_APPROXIMATE_HELP = (
    "objective=DiffusionObjective(noise_scheduler, …) tells queries the nearest loss of a known kind: an "
    "approximation, if the training's is masked or has further terms, or noise, input or target are changed "
    "(DREAM, input perturbation, pyramid noise). An objective=… of your own (diffhook.Objective) can be exact"
)
_OWN_HELP = (
    "Tell queries: objective=DiffusionObjective(DDPMScheduler(num_train_timesteps=T, trained_betas=betas), "
    "…) where the loop has betas of its own, timestep_scale= what the model is told for one step; for any "
    "other loss, an objective=… of your own (diffhook.Objective)"
)
_HELP |= dict.fromkeys(("unmixed", "schedule"), _OWN_HELP)
_HELP |= dict.fromkeys(("target", "noise", "changed", "variance"), _APPROXIMATE_HELP)
_HELP["weights"] = (
    "Tell queries: objective=DiffusionObjective(noise_scheduler, weighting=…), a function of the timestep. "
    "Where rows are weighed by anything else, it is an approximation"
)


@dataclass(frozen=True)
class Refusal:
    """The training loss was not recognised.

    Attributes:
        kind: one of :data:`REASONS`.
        rows: that showed it.
        early: the training ended before it could be sure.
    """

    kind: str
    rows: int = 0
    early: bool = False

    @property
    def words(self) -> str:
        """In a line, with what helps."""
        reason = REASONS[self.kind].format(rows=self.rows)
        return f"{reason}. {_HELP.get(self.kind, _USUAL_HELP)}"
