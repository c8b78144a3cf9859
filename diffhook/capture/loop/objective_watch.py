"""Shows passes to the recognition of the training loss, and tells what it has come to."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from diffhook.capture.loop.attachment import Attachment
from diffhook.capture.loop.denoiser_calls import DenoiserCall
from diffhook.capture.recognition import Mixing, Observation, Recognised, Recognition, Refusal

_SCHEDULERS = "diffusers.schedulers.scheduling_utils"
_MIXINGS = 4  # of the batch at hand that are kept
_AGAIN = 100  # passes after which a loss that was recognised is looked at again

Tell = Callable[[Recognised | Refusal], None]


class ObjectiveWatch:
    """Sees diffusers' schedulers at work, until the loss is recognised or given up.

    Args:
        attachment: holds our hooks.
        tell: called with each verdict.
    """

    def __init__(self, attachment: Attachment, tell: Tell) -> None:
        self._attachment, self._tell = attachment, tell
        self._recognition = Recognition()
        self._mixings: deque[Mixing] = deque(maxlen=_MIXINGS)
        self._watched: dict[type, list[Callable[[], None]]] = {}
        self._passes = 0

    @property
    def observes(self) -> bool:
        """Whether the next pass is to be observed."""
        if isinstance(self._recognition.verdict, Refusal):
            return False
        return self._recognition.verdict is None or self._passes % _AGAIN == 0

    def batch_received(self) -> None:
        """What was mixed for the batch before is of no use any more."""
        self._mixings.clear()
        if self.observes:
            self._watch_schedulers()

    def pass_ended(self, call: DenoiserCall | None, undo: float) -> None:
        """A pass has made rows.

        Args:
            call: of the denoiser, that the loss came from.
            undo: factor that makes a gradient that of the sample's own loss.
        """
        observed = self.observes
        self._passes += 1
        if not observed or call is None or (seen := self._observation(call, undo)) is None:
            return
        before = self._recognition.verdict
        self._recognition.add(seen)
        verdict = self._recognition.verdict
        if verdict is not None and verdict is not before:
            self._tell(verdict)
        if isinstance(verdict, Refusal):
            self._let_go()

    def _observation(self, call: DenoiserCall, undo: float) -> Observation | None:
        found = call.prediction
        if found is None or found.gradient is None or found.output is None or call.arguments is None:
            return None
        inputs = list(_inputs(*call.arguments, rows=len(found.output)))
        made = ((each, x) for each in reversed(self._mixings) for x in inputs if each.makes(x))
        mixing, given = next(made, (None, inputs[0] if inputs else None))
        if given is None or len(call.timesteps) not in (1, len(given)):
            return None
        told = call.timesteps.expand(len(given))
        gradient = found.gradient * undo
        return Observation(given.detach(), told, found.output, gradient, mixing, found.difference)

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
        if self.observes and all(isinstance(value, Tensor) for value in mixed):
            clean, noise, timesteps, noisy = (tensor.detach() for tensor in mixed)
            if len(timesteps.flatten()) == len(clean) == len(noise):
                self._mixings.append(Mixing(scheduler, clean, noise, timesteps.flatten(), noisy))


def _kinds(kind: type) -> Iterator[type]:
    subclasses: list[type] = type.__subclasses__(kind)
    for subclass in subclasses:
        yield subclass
        yield from _kinds(subclass)


def _inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any], *, rows: int) -> Iterator[Tensor]:
    """Arguments that may be noisy samples, one for each row."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 2 and len(value) == rows:
            yield value
