"""Exact norms and random projections of every sample's own gradient, from one batched backward."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from diffhook.errors import CaptureError, ConfigurationError, SurveyAgainError
from diffhook.gradients.coverage import Coverage
from diffhook.gradients.freeze import Frozen
from diffhook.gradients.gathering import Gathering, check_preconditioner
from diffhook.gradients.layers import find_layers, tied, trainable_parameters
from diffhook.gradients.local_hook import LocalHook
from diffhook.gradients.precision import exactly
from diffhook.gradients.reuse import Reuse, Sums
from diffhook.gradients.sample_axis import SAMPLES_FIRST, Layout, SampleAxis, leading_axis
from diffhook.gradients.sketch import FullGradient, make_sketch
from diffhook.gradients.survey import Survey
from diffhook.gradients.tape import OnBackward, Tape
from diffhook.gradients.uses import ParameterUses

# Bytes of per-sample products alive at once. On a processor they should stay in its cache; an
# accelerator wants few, large launches.
_WORKSPACE = {"cpu": 8 << 20}
_WORKSPACE_ELSEWHERE = 256 << 20


class PerSampleGradients:
    """Hooks on a model that turn one batched backward pass into per-sample gradients.

    Example:
        >>> model = nn.Linear(3, 1)
        >>> engine = PerSampleGradients(model, projection_dim=16)
        >>> with engine:
        ...     model(torch.ones(4, 3)).square().mean(1).mean().backward()
        >>> engine.norms.shape, engine.projections.shape
        (torch.Size([4]), torch.Size([4, 16]))

    Row b is the gradient of sample b's own loss: the 1/B of a mean over the batch and ``loss_scale``
    are undone. A loss that weighs samples unevenly is taken as it is.

    Args:
        model: the model that is called on the batch; the batch is the first axis of its first
            tensor argument. Parameters that need no gradient are left out. An ``nn.ModuleDict`` of
            models that one backward reaches (a denoiser and its text encoder) makes one gradient.
        projection_dim: D, the length of each projection; 0 for norms only; "full" for the whole
            gradient, unprojected.
        seed: seed of the projection.
        reduction: how the loss joins the samples, "mean" or "sum".
        weight_gradients: False leaves the parameters' ``.grad`` alone and skips computing it.
        group_size: M consecutive rows of the batch make one sample, whose loss is their mean.
        reuse_products: take a layer's summed weight gradient from its per-sample products where
            they are formed, in place of computing it a second time: cheaper, but training then
            differs by rounding from training without the engine.
        workspace: bytes of per-sample products alive at once; at least one sample's gradient of
            the largest layer is. None: 8 MiB on a CPU, 256 MiB elsewhere.

    Raises:
        ConfigurationError: nothing in the model is trainable, or an argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        projection_dim: int | Literal["full"] = 2048,
        seed: int = 0,
        reduction: Literal["mean", "sum"] = "mean",
        weight_gradients: bool = True,
        group_size: int = 1,
        reuse_products: bool = False,
        workspace: int | None = None,
    ) -> None:
        if reduction not in ("mean", "sum"):
            raise ConfigurationError(f'reduction is {reduction!r}; expected "mean" or "sum"')
        if group_size < 1:
            raise ConfigurationError(f"group_size is {group_size}; expected a positive integer")
        if workspace is not None and workspace < 1:
            raise ConfigurationError(f"workspace is {workspace}; expected a positive number of bytes")
        self.model = model
        self.reduction = reduction
        self.weight_gradients = weight_gradients
        self.group_size = group_size
        self.loss_scale = 1.0  #: factor on the loss besides the batch reduction (AMP, accumulation)
        #: parameter name → factor of its shape on its gradients, such as Adam's 1/(√v̂ + ε), before
        #: norms and projections; parameters not named are left as they are
        self.preconditioner: Mapping[str, Tensor] = {}
        self.parameters = trainable_parameters(model)
        if not self.parameters:
            raise ConfigurationError("the model has no parameter with requires_grad=True")
        self.sketch = make_sketch(projection_dim, seed, self.parameters)
        self._roots = list(model.values()) if isinstance(model, nn.ModuleDict) else [model]
        self._workspace = workspace
        self._layers = find_layers(model, self.parameters)
        self.tape = Tape(
            {name: owned.module for name, owned in self._layers.items()},
            self._on_forward,
            inputless=[n for n, owned in self._layers.items() if set(owned.parameters) == {"bias"}],
        )
        self._reuse = Reuse(self._layers, self.tape) if reuse_products and weight_gradients else None
        self.tape.let_go = self._reuse is None  # a second backward would need them to fill its sums
        self._tied = tied(self._layers)
        ruled = {p for owned in self._layers.values() for p in owned.parameters.values()}
        self._fallback = set(self.parameters) - ruled
        self._missing: dict[str, str] = {}
        self._declined: set[str] = set()  # layers that were called without samples in front
        self._layout = Layout()
        self._failure: Exception | None = None
        self._passes = 0  # finished
        self._root_handles: list[RemovableHandle] = []
        self._uses: ParameterUses | None = None
        self._survey: Survey | None = None
        self._stack = ExitStack()
        self._watching = self._warned = False
        self._reset()

    @property
    def _surveyed(self) -> bool:
        """Whether it is known which parameters the fallback has to watch."""
        return self._passes > 0

    @property
    def full(self) -> bool:
        """Whether the whole gradient is kept in place of a projection."""
        return isinstance(self.sketch, FullGradient)

    def sibling(self, model: nn.Module, *, group_size: int = 1) -> Self:
        """An engine with the same projection for passes without weight gradients."""
        other = type(self)(
            model,
            projection_dim=0,
            weight_gradients=False,
            group_size=group_size,
            workspace=self._workspace,
        )
        other.sketch = self.sketch
        return other

    # ── life of a pass ────────────────────────────────────────────────────────────────────────

    def attach(self) -> None:
        """Put two hooks on the model. They do nothing until :meth:`begin`, which hooks its layers."""
        if self._root_handles:
            return
        for root in self._roots:
            self._root_handles += [
                root.register_forward_pre_hook(LocalHook(root, self.enter_model), with_kwargs=True),
                root.register_forward_hook(LocalHook(root, self.leave_model), always_call=True),
            ]

    def detach(self, *, mid_pass: bool = False) -> None:
        """Take every hook off the model.

        Args:
            mid_pass: the pass under way is given up, but not by the training: hooks that checkpointed
                blocks need in its backward stay, mute, until the next forward.
        """
        for handle in self._root_handles:
            handle.remove()
        self._root_handles.clear()
        self.abandon()
        if not mid_pass:
            self.tape.detach()

    def begin(self) -> None:
        """Watch the next forward and backward.

        Raises:
            ConfigurationError: the preconditioner does not fit the parameters.
        """
        check_preconditioner(self.preconditioner, self.parameters)
        self._reset()
        self.tape.attach()
        if not self.weight_gradients:
            # The fallback differentiates with respect to its parameters; the survey to all.
            alive = self._fallback if self._surveyed else set(self.parameters)
            self._stack.enter_context(Frozen(self.parameters, alive))
            self.tape.require_outputs = True
            self._stack.callback(setattr, self.tape, "require_outputs", False)
        if not self._surveyed:
            self._survey = Survey(self.parameters, self._fallback, self.tape)
            self._stack.callback(self._survey.close)

    def finish(self) -> None:
        """Stop watching; :attr:`norms` and :attr:`projections` then belong to the pass.

        Raises:
            CaptureError: the backward did not come by, or an error inside a hook was kept back.
            SurveyAgainError: what the first pass found out no longer holds.
        """
        if self._axis.deceived is not None:
            self._failure = self._axis.deceived
        self.tape.detach()
        self.abandon()
        if isinstance(self._failure, SurveyAgainError):
            self._passes = 0
            if self._reuse is not None:
                self._reuse.chosen = ()
            raise self._failure
        if self._failure is not None:
            raise CaptureError(f"per-sample gradients failed: {self._failure}") from self._failure
        pass_ = self._pass
        if self._survey is not None:
            ruled = {p for name in pass_.taken for p in self._layers[name].parameters.values()}
            for name, reason in self._survey.contradictions(ruled, pass_.pending, pass_.precision):
                self._missing.setdefault(name, reason)
            self._survey = None
        with exactly(next(iter(self.parameters.values()))):
            pass_.complete(without=self._missing)
        if pass_.totals is None:
            raise CaptureError(
                "no gradient of a trained parameter was seen: was backward() called inside the engine's "
                "context, on a loss of this model? A custom torch.autograd.Function cannot be looked into"
            )
        self._passes += 1
        self._fallback -= self._missing.keys()
        if self._reuse is not None:
            self._reuse.chosen = pass_.formed
        self._report_missing()

    def abandon(self) -> None:
        """Stop watching and leave the model as it was, whatever has been seen."""
        self.tape.give_up()
        self._close_uses()
        if self._uses is not None:
            self._uses.release()
            self._uses = None
        self._axis.release()
        self._stack.close()

    def __enter__(self) -> Self:
        self.begin()
        self.attach()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.finish()
            else:
                self.abandon()
        finally:
            self.detach()

    # ── results ───────────────────────────────────────────────────────────────────────────────

    @property
    def norms(self) -> Tensor:
        """(B,) float32: L2 norm of each sample's gradient over all covered parameters. Exact."""
        assert self._pass.totals is not None, "no pass has been finished"
        return (self._pass.totals.squares.sqrt() * self._undo()).float()

    @property
    def projections(self) -> Tensor:
        """(B, D) float32: projection of each sample's gradient, not normalised."""
        projected = None if self._pass.totals is None else self._pass.totals.projected
        if projected is None:
            raise ConfigurationError("projection_dim is 0: only norms were computed")
        return projected * self._undo()

    @property
    def coverage(self) -> Coverage:
        """Which parameters norms and projections cover; final after the first pass."""
        fallback = self._fallback - self._missing.keys()
        ruled = self.parameters.keys() - fallback - self._missing.keys()
        return Coverage(
            tuple(n for n in self.parameters if n in ruled),
            tuple(n for n in self.parameters if n in fallback),
            dict(self._missing),
        )

    @property
    def first_nonfinite(self) -> str | None:
        """The parameter at which the last backward first met a gradient that is not finite, or None."""
        return None if self._pass.totals is None else self._pass.totals.first_nonfinite()

    @property
    def hook_seconds(self) -> float:
        """Time that the last pass spent on per-sample products (CPU: exact; GPU: launches)."""
        return self.tape.seconds

    def _undo(self) -> float:
        """What to multiply by so that a row is the gradient of its own (group's mean) loss."""
        assert self._pass.totals is not None
        rows = self._pass.totals.samples
        reduced = rows if self.reduction == "mean" else 1 / self.group_size
        return reduced / self.loss_scale

    # ── hooks ─────────────────────────────────────────────────────────────────────────────────

    def _reset(self) -> None:
        kind = next(iter(self.parameters.values())).device.type
        workspace = self._workspace or _WORKSPACE.get(kind, _WORKSPACE_ELSEWHERE)
        self._pass = Gathering(
            self._layers,
            self.sketch,
            self.group_size,
            max(workspace // 4, 1),
            lambda name: name in self._tied or name in self._fallback,
            self.preconditioner,
        )
        self._axis = SampleAxis(self._layout, self.tape, learning=not self._surveyed)
        self._failure = None
        self.tape.calls.clear()
        self.tape.seconds = 0.0

    def enter_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any = None) -> None:
        """The model's forward begins. A hook; called by hand from a pre-hook that came first."""
        watching = self.tape.armed and not self.tape.muted
        if not watching or not torch.is_grad_enabled() or self._watching:
            return
        if self._pass.batch is None:
            self._pass.batch = self._axis.batch = leading_axis((*args, *(kwargs or {}).values()))
        # The first pass watches every parameter, to find the uses that no layer explains.
        watched = self._fallback if self._surveyed else set(self.parameters)
        if self._pass.batch is None or not watched:
            return
        if self._uses is None:
            found = {n: p for n, p in self.parameters.items() if n in watched}
            known = {id(p) for p in found.values()}
            constants = [p for p in self.model.parameters() if id(p) not in known]
            self._uses = ParameterUses(
                found,
                [*constants, *self.model.buffers()],
                self._pass.batch,
                self.tape,
                self._axis,
                self._pass.add_use,
                self._missing.setdefault,
            )
        self._uses.__enter__()
        self._watching = True

    def leave_model(self, module: nn.Module, args: Any, output: Any) -> None:
        """The model's forward is over. A hook; called by hand for a module whose call was entered by hand."""
        self._close_uses()
        self._axis.watch(output)

    def _close_uses(self) -> None:
        if self._uses is not None and self._watching:
            self._watching = False
            self._uses.__exit__(None, None, None)
            self._fallback |= self._uses.close()

    def _on_forward(self, layer: str, inputs: Tensor, output: Tensor) -> OnBackward | None:
        owned = self._layers[layer]
        sums = None if self._reuse is None else self._reuse.sums(layer)
        if self._is_declined(layer, inputs, output):
            if sums is None or self._reuse is None:
                return None
            return partial(self._reuse.fill, layer, sums)
        if self._uses is not None:
            self._uses.claim(output, owned.parameters.values())
        if not isinstance(owned.module, SAMPLES_FIRST):
            self._axis.rely_on(output)
        return partial(self._on_backward, layer, sums)

    def _is_declined(self, layer: str, inputs: Tensor, output: Tensor) -> bool:
        """Whether a call is left to the fallback, which the survey has put on the layer's parameters."""
        if layer not in self._declined:
            unbatched = self._pass.batch is not None and not self._axis.samples_first(output)
            if unbatched or (self._uses is not None and self._uses.is_constant(inputs)):
                self._declined.add(layer)
                if self._surveyed and not self._fallback.issuperset(self._layers[layer].parameters.values()):
                    self._failure = SurveyAgainError(
                        f"{layer} was called on rows that are not samples, which it was not before: this "
                        "pass is left out, and the next one looks anew"
                    )
        return layer in self._declined

    def _on_backward(self, layer: str, sums: Sums | None, inputs: Tensor | None, grad_output: Tensor) -> None:
        if inputs is None:
            self._failure = self._failure or CaptureError(f"{layer} was differentiated a second time")
            return
        try:
            if self._failure is None:
                with exactly(grad_output):
                    self._pass.add_layer(layer, inputs, grad_output, self.tape.calls[layer], sums)
                return
        except Exception as error:  # kept for finish(): the backward belongs to someone else
            self._failure = error
        if sums is not None and self._reuse is not None:
            self._reuse.fill(layer, sums, inputs, grad_output)

    def _report_missing(self) -> None:
        if self._missing and not self._warned:
            self._warned = True
            warnings.warn(
                f"per-sample gradients leave out {len(self._missing)} of {len(self.parameters)} "
                f"parameters: {self.coverage}",
                stacklevel=3,
            )
