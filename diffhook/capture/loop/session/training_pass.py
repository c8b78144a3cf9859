"""The pass under way, from a model's call to the end of the backward, and the batch that it is on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffhook.capture.loop.events import (
    BackwardBegan,
    DenoiserCalled,
    ForwardBegan,
    LossScaled,
    OutputSeen,
    tensors_of,
)
from diffhook.capture.loop.losses.denoiser_calls import DenoiserCalls
from diffhook.capture.loop.losses.loss_reader import LossReader
from diffhook.capture.loop.losses.row_losses import unexplained_factor
from diffhook.capture.loop.micro_batch import MicroBatch
from diffhook.capture.recording.recorder import Recorder

_UNSCALED = LossScaled()


@dataclass(slots=True)
class BatchProgress:
    """How far the batch at hand has come; a new one begins with each batch, which may have several passes.

    Attributes:
        scaled: by what the loss of the next pass is multiplied.
        staged: rows of the batch are with the recorder.
        reached: the backward under way has reached a captured forward, be it an earlier pass's; not any more
            once a pass has been abandoned.
    """

    scaled: LossScaled = _UNSCALED
    staged: bool = False
    reached: bool = False


class TrainingPass:
    """One captured forward and its backward: begins with a model's call, then is finished or abandoned.

    Args:
        micro_batch: whose rows the model is called on.
        began: the call.
        recorder: is to have the rows.
        losses: says whether the rows' own losses are read.
        observed: keep what the denoiser was called with, and its outputs' gradients.

    Attributes:
        micro_batch: as it is known by now.
        calls: of modules that are told timesteps.
        host: the module whose call began the pass.
        presumed: that module was not known before.
        recorder: as given.
        engine: the recorder's.
        unfit: why the pass makes no rows: a kind of absence; "": nothing speaks against it.
    """

    def __init__(
        self,
        micro_batch: MicroBatch,
        began: ForwardBegan,
        recorder: Recorder,
        losses: LossReader,
        *,
        observed: bool,
    ) -> None:
        self.micro_batch = micro_batch
        self.calls = DenoiserCalls(observed=observed)
        self.host, self.presumed = began.module, began.presumed
        self.recorder, self.engine = recorder, recorder.engine
        self.unfit = ""
        self._losses = losses

    def learn(self, **found: Any) -> None:
        """More is known of the micro-batch."""
        self.micro_batch = self.micro_batch.knowing(**found)

    # ── forward ───────────────────────────────────────────────────────────────────────────────

    def begin(self) -> None:
        """Watch the model."""
        self.engine.begin()
        self.engine.tape.paused = True  # until the backward: torch.autograd.grad is none

    def is_of(self, found: MicroBatch) -> bool:
        """A further call has shown whose rows it is on. Returns whether they may be this pass's."""
        if self.micro_batch.shown:
            return torch.equal(found.ids, self.micro_batch.ids)
        self.learn(ids=found.ids, images=found.images, shown=True)
        return True

    def model_called(self, event: ForwardBegan, values: tuple[Any, ...]) -> None:
        """A model is called; ``values`` are its arguments, the sample first."""
        self.engine.enter_model(event.module, values)
        self.called(event)

    def called(self, event: ForwardBegan | DenoiserCalled) -> None:
        """A module is called that may be told timesteps."""
        self.calls.called(event.module, event.args, event.kwargs)

    def answered(self, event: OutputSeen, on_reached: Callable[[Tensor], None]) -> None:
        """A model or a denoiser has answered.

        Args:
            on_reached: called when a backward reaches its output.
        """
        tape = self.engine.tape
        self.engine.leave_model(event.module, (), event.output)
        for tensor in tensors_of(event.output):
            if tensor.requires_grad:
                tensor.register_hook(partial(tape.guard, on_reached))
                break
        self.calls.answered(event.module, event.output, tape, self._losses.active)

    @property
    def uses(self) -> int:
        """How many uses of trained parameters the pass has shown so far."""
        return self.engine.uses

    @property
    def in_named_call(self) -> bool:
        """Whether a module that is told the timesteps by name is being called."""
        return self.calls.in_named_call

    @property
    def knows_timesteps(self) -> bool:
        """Whether a module was told them by name, or the loop has named them itself."""
        return self.micro_batch.timesteps is not None or self.calls.know_timesteps

    @property
    def knows_prediction(self) -> bool:
        """Whether that module's prediction was seen as well, where losses are read off it."""
        return self.calls.know_prediction if self._losses.active else self.knows_timesteps

    # ── backward ──────────────────────────────────────────────────────────────────────────────

    def backward_began(self, event: BackwardBegan) -> None:
        """Autograd starts from the pass's loss."""
        self.engine.tape.paused = False
        trained = self.engine.trained.values()
        if event.only is not None and not {*map(id, trained)} <= {*map(id, event.only)}:
            self.unfit = "partial-backward"
        if event.loss is None:
            self.learn(factor=event.factor)
            return
        found = self.micro_batch
        self.learn(loss=event.loss, factor=unexplained_factor(event.loss, found.scale, found.accumulation))
        if self._losses.active or self.calls.observed:
            self.calls.find_errors(event.loss)

    def backward_ended(self) -> None:
        """Autograd has come back."""
        self.engine.tape.paused = True

    def finish(self) -> None:
        """Have the rows' gradients computed: the engine's results are this pass's.

        Raises:
            CaptureError, RecheckNeeded: see :meth:`diffhook.gradients.PerSampleGradients.finish`.
        """
        self.engine.loss_scale = self.micro_batch.loss_scale
        self.engine.finish()

    @property
    def why_no_timesteps(self) -> str:
        """What to tell where no call was told any."""
        outer = self.engine.model
        if self.presumed and any(self.host is part for part in outer.modules()):
            return (
                f"{type(outer).__name__}, which is trained, was not called itself, but its parts were, of "
                "which no timestep is known: a loop that calls model.forward(...) passes by all hooks on the "
                "model. Call model(...), or name the timesteps with hook.step(sample_ids=..., timesteps=...)"
            )
        return (
            "what is trained was called without a timestep (keyword 'timestep' or second argument): name it "
            "with hook.step(sample_ids=..., timesteps=...), as where another model is trained through a "
            "frozen denoiser (textual inversion)"
        )

    def abandon(self) -> None:
        """Stop watching, whatever has been seen; after :meth:`finish` there is nothing left to stop."""
        self.engine.abandon()
