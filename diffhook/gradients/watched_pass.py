"""One forward and backward under watch: what our hooks do in it, and what they have seen."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from diffhook.compat.fsdp import Unit, units
from diffhook.compat.torch import in_backward, tree_leaves, tree_map, without_function_modes
from diffhook.errors import CaptureError, RecheckNeeded
from diffhook.gradients.accumulator import PassAccumulator
from diffhook.gradients.compiled import is_compiled, uncompiled
from diffhook.gradients.coverage import Assignment
from diffhook.gradients.coverage_check import CoverageCheck
from diffhook.gradients.fallback import Fallback
from diffhook.gradients.freeze import frozen
from diffhook.gradients.guard import PassGuard, on_gradient
from diffhook.gradients.precision import exactly
from diffhook.gradients.reuse import Reuse, Sums
from diffhook.gradients.sample_axis import AxisLayout, SampleAxis, leading_axis
from diffhook.gradients.separability import SeparabilityCheck
from diffhook.gradients.sharding import parameters_of, whole_now
from diffhook.gradients.tape import OnBackward, Tape


class WatchedPass:
    """The hooks' side of a pass; :class:`PerSampleGradients` begins and ends it.

    Args:
        model: the engine's.
        assignment: who computes which parameter; learns.
        layout: what has samples in front; learns.
        tape: reports the calls of layers.
        reuse: of per-sample products, or None.
        accumulator: adds up.
        checked: whether both laws are put to the test.
        seed: of the test.

    Attributes:
        guard: holds the first error of ours.
        obstacles: parameter → why the fallback could not split it.
    """

    def __init__(
        self,
        model: nn.Module,
        assignment: Assignment,
        layout: AxisLayout,
        tape: Tape,
        reuse: Reuse | None,
        accumulator: PassAccumulator,
        *,
        checked: bool,
        seed: int,
    ) -> None:
        self.guard = PassGuard()
        self.obstacles: dict[str, str] = {}
        self.accumulator = accumulator
        self.completeness: CoverageCheck | None = None
        self.separability = SeparabilityCheck(model, tape, self.guard, seed) if checked else None
        self.axis = SampleAxis(layout, self.separability)
        self._model = model
        self._assignment = assignment
        self._tape = tape
        self._reuse = reuse
        self._fallback: Fallback | None = None
        self._host: nn.Module | None = None  # whose call is being watched
        self._units = units(model)
        self._names = {id(p): name for name, p in assignment.parameters.items()}
        self._whole: dict[str, Tensor] = {}  # name → what stands for a sharded parameter in this pass
        self._uncalled: dict[str, RemovableHandle] = {}  # parameters whose layers no call has reached
        self._undo = ExitStack()

    @property
    def checked(self) -> bool:
        return self.separability is not None

    @property
    def uses(self) -> int:
        """How many uses of trained parameters the forward has shown so far."""
        return self._tape.calls.total() + (0 if self._fallback is None else self._fallback.met)

    @property
    def batch(self) -> int | None:
        """Rows of the batch, once a model has been called."""
        return self.accumulator.batch

    # ── begin and end ─────────────────────────────────────────────────────────────────────────

    def begin(self, untouched: Mapping[str, nn.Parameter] | None) -> None:
        """Prepare the parameters; on an error, everything is as it was.

        Args:
            untouched: all trained parameters, whose gradients are not wanted; None: they are.
        """
        parameters = self._assignment.parameters
        with ExitStack() as undo:
            if is_compiled(self._model):
                undo.enter_context(uncompiled())
            if untouched is not None:
                # The fallback differentiates with respect to its parameters; the check to all.
                undo.enter_context(frozen(untouched, parameters if self.checked else self._watched()))
                undo.callback(setattr, self._tape, "require_outputs", False)
                self._tape.require_outputs = True
            if self.separability is not None:
                accumulator = self.accumulator
                self.completeness = CoverageCheck(
                    parameters,
                    self._tape,
                    lambda: accumulator.precision,
                    self.guard,
                    self._assignment.rounded(),
                )
                accumulator.audit = self.completeness.add
                undo.callback(self.completeness.hooks.close)
                undo.callback(self.separability.release)
                self.completeness.attach()
            self._undo = undo.pop_all()

    def end(self) -> None:
        """Undo everything that this pass has put on the model, whatever has happened."""
        self._undo.callback(self._release)
        self._undo.close()

    def _release(self) -> None:
        self.stop_watching()
        while self._uncalled:
            self._uncalled.popitem()[1].remove()
        fallback, self._fallback = self._fallback, None
        if fallback is not None:
            fallback.release()

    # ── the model's calls ─────────────────────────────────────────────────────────────────────

    def _watched(self) -> set[str]:
        """A checked pass watches every parameter, to find uses that no layer explains."""
        return set(self._assignment.parameters) if self.checked else self._assignment.fallback

    def enter(self, host: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        """A call of the model, or of its host, begins."""
        if self._host is not None or not torch.is_grad_enabled() or in_backward():
            return
        if self.batch is None:
            self.accumulator.batch = self.axis.batch = leading_axis((*args, *(kwargs or {}).values()))
        if self.batch is not None and (watched := self._watched()):
            if self._fallback is None:
                self._fallback = self._make_fallback(watched, self.batch)
            self._fallback.__enter__()
            self._host = host
        for unit in self._units:  # whose call has begun already
            self.on_whole(unit)

    def _make_fallback(self, watched: set[str], batch: int) -> Fallback:
        found = {n: p for n, p in self._assignment.parameters.items() if n in watched}
        known = {id(p) for p in found.values()}
        constants = [p for p in parameters_of(self._model) if id(p) not in known]
        return Fallback(
            found,
            [*constants, *self._model.buffers()],
            batch,
            self._tape,
            self.axis,
            self.guard,
            self.accumulator.add_use,
            self.obstacles.setdefault,
            sharded=bool(self._units),
        )

    def on_whole(self, unit: Unit) -> None:
        """Parameters of a unit of FSDP's are whole now, as they are until its call ends."""
        for parameter, now in whole_now(unit):
            name = self._names.get(id(parameter))
            if name is not None:
                self._whole[name] = now
                if self.completeness is not None:
                    self.completeness.follow(name, now)
            if self._fallback is not None:
                if name is None:
                    self._fallback.know_constant(now)
                elif name in self._fallback.watched:
                    self._fallback.follow(name, now)

    def on_left(self, output: Any) -> Any:
        """A unit has answered. FSDP hooks what it has answered, to be told of the backward. It must not be
        told of ours, which begin at what the fallback watches: then FSDP gets a copy.

        Returns:
            What FSDP is to see; None: the same.
        """
        fallback = self._fallback
        if fallback is None or not torch.is_grad_enabled() or in_backward():
            return None
        ours = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and fallback.is_ours(leaf)]
        if not ours:
            return None
        known = {id(leaf) for leaf in ours}
        with without_function_modes():
            return tree_map(lambda leaf: leaf.clone() if id(leaf) in known else leaf, output)

    def leave(self, host: nn.Module, output: Any) -> None:
        """The call has come to its end."""
        if torch.is_grad_enabled() and not in_backward():
            if self.checked:
                self._assignment.uncalled = self._assignment.layers.keys() - self._tape.calls.keys()
            else:
                self._watch_uncalled()
        if host is self._host:
            self.stop_watching()
            if output is not None:  # None: the forward has failed
                self.axis.test(output, self._tape.calls.keys() - self._assignment.declined)

    def _watch_uncalled(self) -> None:
        """Layers that were called whenever coverage was checked may be left out, and their weights used."""
        expected = self._expected() | self._uncalled.keys()
        for layer, owned in self._assignment.layers.items():
            for local, name in owned.parameters.items():
                used = self._whole.get(name, owned.tensors[local])
                if name in expected or (layer in self._assignment.uncalled and not used.requires_grad):
                    continue
                if not used.requires_grad:  # a pass of ours without weight gradients, which would not show it
                    raise RecheckNeeded(
                        f"{layer} was not called, as it was when coverage was checked; this pass is "
                        "discarded and the next one re-checks",
                        names=[layer],
                    )
                hook = partial(self._on_unexpected, layer, name)
                self._uncalled[name] = on_gradient(used, self.guard, hook)

    def _expected(self) -> set[str]:
        """Parameters of whose gradients it is known where they come from, or that they do not count."""
        assignment = self._assignment
        return assignment.names_of(self._tape.calls) | assignment.fallback | assignment.missing.keys()

    def _on_unexpected(self, layer: str, name: str, _: Tensor) -> None:
        if not self._tape.paused and name not in self._expected():
            self.guard.keep(
                RecheckNeeded(
                    f"{name} has a gradient, and {layer} was not called: it is used in another way than when "
                    "coverage was checked; this pass is discarded and the next one re-checks",
                    names=[layer],
                )
            )

    def stop_watching(self) -> None:
        """Torch functions are no longer seen."""
        host, self._host = self._host, None
        if host is not None and self._fallback is not None:
            self._fallback.__exit__(None, None, None)
            self._assignment.fallback |= self._fallback.close() - self._assignment.missing.keys()

    # ── the layers' calls ─────────────────────────────────────────────────────────────────────

    def on_forward(self, layer: str, inputs: Tensor, output: Tensor) -> OnBackward | None:
        """A layer was called; what to do with its output's gradient."""
        if self.guard.error is None and self.batch is None:
            raise CaptureError(
                f"{layer} was called outside of any call of the model: pass the calls of the module that "
                "runs it to enter_model and leave_model",
                kind="outside",
            )
        sums = None if self._reuse is None else self._reuse.sums(layer)
        if self._is_declined(layer, inputs, output):
            return None
        self.axis.rely_on(output, layer)
        return partial(self._on_backward, layer, sums)

    def _is_declined(self, layer: str, inputs: Tensor, output: Tensor) -> bool:
        """Whether the rule does not explain this call, so that the fallback has the layer's parameters."""
        assignment = self._assignment
        if layer not in assignment.declined and not self._is_explained(layer, inputs, output):
            assignment.declined.add(layer)
            watched = self.checked or assignment.fallback.issuperset(assignment.names_of([layer]))
            if not watched:
                self.guard.keep(
                    RecheckNeeded(
                        f"{layer} is used in another way than when coverage was checked; this pass is "
                        "discarded and the next one re-checks",
                        names=[layer],
                    )
                )
        return layer in assignment.declined

    def _is_explained(self, layer: str, inputs: Tensor, output: Tensor) -> bool:
        owned = self._assignment.layers[layer]
        if not (self.axis.samples_first(output) and owned.rule.samples_first(owned.module, inputs)):
            return False
        if not owned.is_as_found(self._whole):
            return False
        if self._fallback is None:
            return True
        if self._fallback.is_constant(inputs):
            return False
        # A recomputation is not watched: it was the first forward that showed what it does.
        return in_backward() or self._fallback.claim(output, owned.parameters.values())

    def _on_backward(self, layer: str, sums: Sums | None, inputs: Tensor | None, grad_output: Tensor) -> None:
        if inputs is None:
            self.guard.keep(CaptureError(f"{layer} was differentiated a second time", kind="double backward"))
            return
        if self.guard.error is None:
            found: Sums | None = None if sums is None else {}
            with exactly(grad_output):
                self.accumulator.add_layer(layer, inputs, grad_output, self._tape.calls[layer], found)
            if sums is not None and found is not None:
                sums.update(found)  # complete
