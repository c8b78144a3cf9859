"""Shows passes to the recognition of the training loss, and tells what it has come to."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain
from typing import Any, Self

from torch import Tensor, nn

from diffhook.capture.loop.events import BatchReceived
from diffhook.capture.loop.losses.denoiser_calls import DenoiserCall
from diffhook.capture.loop.probes.batch_rows import BatchRows
from diffhook.capture.loop.probes.probe_inputs import ProbeInputs
from diffhook.capture.loop.run.describe import describe_dataset
from diffhook.capture.loop.watches.attachment import Attachment
from diffhook.capture.probes.probe import Probe
from diffhook.capture.recognition import Mixing, Observation, Recognised, Recognition, Refusal
from diffhook.capture.settings import Settings
from diffhook.gradients.compiled import without_wrappers
from diffhook.gradients.sharding import needs_all_processes

_SCHEDULERS = "diffusers.schedulers.scheduling_utils"
_MIXINGS = 4  # of the batch at hand that are kept
_AGAIN = 100  # passes after which a loss that was recognised is looked at again

_SHARDED = (
    "the parameters are sharded, so every pass of a probe would need all processes. `diffhook checkpoints` "
    "measures samples later"
)

Tell = Callable[[Recognised | Refusal], None]


class ObjectiveWatch:
    """Sees diffusers' schedulers at work, until the loss is recognised or given up.

    Args:
        attachment: holds our hooks.
        tell: called with each verdict.
        no_inputs: called with why none of the samples' inputs can be kept.
        inputs: of samples to probe, which are kept as they come.
    """

    def __init__(
        self,
        attachment: Attachment,
        tell: Tell,
        no_inputs: Callable[[str], None],
        inputs: ProbeInputs | None = None,
    ) -> None:
        self._attachment, self._tell, self.inputs = attachment, tell, inputs
        self._no_inputs = no_inputs
        self._recognition = Recognition()
        self._mixings: deque[Mixing] = deque(maxlen=_MIXINGS)
        self._watched: dict[type, list[Callable[[], None]]] = {}
        self._held: BatchRows | None = None  # of the batch at hand
        self._passes = 0

    @classmethod
    def of(
        cls, settings: Settings, attachment: Attachment, tell: Tell, no_inputs: Callable[[str], None]
    ) -> Self:
        """Where the user has named neither objective nor dataset, probes take what the training shows."""
        probe = settings.probed if settings.objective is None else None
        if probe is None or probe.dataset is not None:
            return cls(attachment, tell, no_inputs)
        inputs = ProbeInputs(probe, all_or_none=settings.probes_at_end)
        return cls(attachment, tell, no_inputs, inputs)

    def begin(self, model: nn.Module, loader: Any, probe: Probe | None, probes: bool) -> Probe | None:
        """The capture begins.

        Args:
            model: that is trained.
            loader: the training's, where an adapter knows it.
            probe: what is to be probed.
            probes: whether this process takes part.

        Returns:
            ``probe``, or None where nothing can be probed.
        """
        if probe is not None and needs_all_processes(model):
            self._no_inputs(_SHARDED)
            self.inputs = probe = None
        if not probes:
            self.inputs = None
        if self.inputs is not None:
            dataset = describe_dataset(loader)
            self.inputs.begin(without_wrappers(model), None if dataset is None else dataset["samples"])
        return probe

    @property
    def observes(self) -> bool:
        """Whether the next pass is to be observed."""
        if isinstance(self._recognition.verdict, Refusal):
            return False
        return self._recognition.verdict is None or self._passes % _AGAIN == 0

    def observes_of(self, sample_ids: Tensor) -> bool:
        """Whether the next pass, over these samples, is."""
        wanted = self.inputs is not None and self.inputs.wants(sample_ids)
        return self.observes or (wanted and not isinstance(self._recognition.verdict, Refusal))

    def batch_received(self, event: BatchReceived) -> None:
        """What was mixed for the batch before is of no use any more."""
        self._mixings.clear()
        self._held = BatchRows(event) if self.inputs is not None else None
        if self.observes or self._watched:
            self._watch_schedulers()

    def end(self, *, thinned: bool) -> None:
        """The training is over: a run that was too short says so.

        Args:
            thinned: not all of its steps were captured.
        """
        if (verdict := self._recognition.end(self._passes, thinned=thinned)) is not None:
            self._tell(verdict)
        if self.inputs is not None:
            self.inputs.end()
            self._tell_refusal()

    def pass_ended(
        self, call: DenoiserCall | None, undo: float, sample_ids: Tensor, images: Tensor | None
    ) -> None:
        """A pass has made rows.

        Args:
            call: of the denoiser, that the loss came from; None where it was not observed.
            undo: factor that makes a gradient that of the sample's own loss.
            sample_ids: (B,).
            images: (B, …) the rows as the batch has them, where it shows them.
        """
        self._passes += 1
        if call is None or (seen := self._observation(call, undo, images)) is None:
            return
        before = self._recognition.verdict
        mixing = self._recognition.add(seen)
        if mixing is not None and self.inputs is not None and call.arguments is not None:
            held = partial(self._held_of, sample_ids, (mixing.noise, mixing.noisy, seen.told))
            # Solved for in float32 where the loop mixed by itself: the model may take halves alone.
            clean = mixing.clean if seen.mixing is not None else mixing.clean.to(seen.given.dtype)
            self.inputs.see(sample_ids, clean, seen.told, held, (call.module, *call.arguments))
        verdict = self._recognition.verdict
        if verdict is not None and verdict is not before:
            self._tell(verdict)
        self._tell_refusal()
        if isinstance(verdict, Refusal):
            self._let_go()

    def _held_of(self, sample_ids: Tensor, drawn: tuple[Tensor, ...]) -> list[Tensor]:
        return [] if self._held is None else self._held.of(sample_ids, drawn)

    def _tell_refusal(self) -> None:
        """Of inputs, once the loss is known: without it there are no probes anyway, which has been told."""
        if self.inputs is None or not self.inputs.refused:
            return
        if isinstance(self._recognition.verdict, Recognised):
            self._no_inputs(self.inputs.refused)
            self.inputs = None

    def _observation(self, call: DenoiserCall, undo: float, images: Tensor | None) -> Observation | None:
        found = call.prediction
        if found is None or found.gradient is None or found.output is None or call.arguments is None:
            return None
        inputs = _inputs(*call.arguments, like=found.output)
        pairs = [(each, x) for each in reversed(self._mixings) for x in inputs]
        made = chain(
            ((each, x) for each, x in pairs if each.makes(x)),
            ((scaled, x) for each, x in pairs if (scaled := each.scaled(x)) is not None),
        )
        mixing, given = next(made, (None, inputs[0] if inputs else None))
        if given is None or len(call.timesteps) not in (1, len(given)):
            return None
        told = call.timesteps.expand(len(given))
        gradient = found.gradient * undo
        return Observation(given.detach(), told, found.output, gradient, mixing, found.error_norms, images)

    # ── schedulers at work ────────────────────────────────────────────────────────────────────

    def _watch_schedulers(self) -> None:
        """Those that have been imported; a loop has made its own by its first batch."""
        module = sys.modules.get(_SCHEDULERS)
        for kind in () if module is None else _kinds(module.SchedulerMixin):
            if kind not in self._watched:
                after: dict[str, Callable[..., None]] = {
                    "add_noise": self._added,
                    "scale_noise": self._scaled,
                }
                self._watched[kind] = [
                    self._attachment.replace(kind, name, after=method)
                    for name, method in after.items()
                    if name in vars(kind)
                ]

    def _let_go(self) -> None:
        for removes in self._watched.values():
            for remove in removes:
                remove()
        self._watched.clear()
        self._mixings.clear()

    def _added(self, noisy: Any, scheduler: Any, original_samples: Any, noise: Any, timesteps: Any) -> None:
        self._mixed(scheduler, original_samples, noise, timesteps, noisy)

    def _scaled(self, noisy: Any, scheduler: Any, sample: Any, timestep: Any, noise: Any = None) -> None:
        self._mixed(scheduler, sample, noise, timestep, noisy)

    def _mixed(self, scheduler: Any, *mixed: Any) -> None:
        if (self.observes or self.inputs is not None) and all(isinstance(value, Tensor) for value in mixed):
            clean, noise, timesteps, noisy = (tensor.detach() for tensor in mixed)
            if len(timesteps.flatten()) == len(clean) == len(noise):
                self._mixings.append(Mixing(scheduler, clean, noise, timesteps.flatten(), noisy))


def _kinds(kind: type) -> Iterator[type]:
    subclasses: list[type] = type.__subclasses__(kind)
    for subclass in subclasses:
        yield subclass
        yield from _kinds(subclass)


def _inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any], *, like: Tensor) -> list[Tensor]:
    """Arguments that may be noisy samples, one for each row; those of the output's shape first."""
    found = [
        value
        for value in (*args, *kwargs.values())
        if isinstance(value, Tensor)
        and value.is_floating_point()
        and value.dim() > 1
        and len(value) == len(like)
    ]
    return sorted(found, key=lambda value: value.shape != like.shape)
