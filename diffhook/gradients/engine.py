"""Exact norms and random projections of every sample's own gradient, from one batched backward."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from diffhook.compat.torch import gradient_hooks
from diffhook.errors import CaptureError, ConfigurationError, RecheckNeeded
from diffhook.gradients.accumulator import PassAccumulator, check_preconditioner, workspace_on
from diffhook.gradients.coverage import Assignment, Coverage
from diffhook.gradients.laws import Schedule, judge, refuse_missed
from diffhook.gradients.layers import chosen, find_layers, trainable_parameters
from diffhook.gradients.local_hook import LocalHook
from diffhook.gradients.precision import exactly
from diffhook.gradients.reuse import Reuse
from diffhook.gradients.sample_axis import AxisLayout
from diffhook.gradients.sharding import refuse_options, refuse_unsupported, shapes_of, unit_hooks
from diffhook.gradients.sketch import FullGradient, make_sketch
from diffhook.gradients.tape import OnBackward, Tape
from diffhook.gradients.totals import Totals
from diffhook.gradients.watched_pass import WatchedPass


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
    are undone. A loss that weighs samples unevenly is taken as it is. The first pass, and a spot check every
    so often, is held to two laws (:mod:`diffhook.gradients.laws`): samples' gradients add up to autograd's,
    and samples stay apart. A pass that breaks one is discarded (:class:`RecheckNeeded`), and the next one
    follows what broke it exactly, or names it in :attr:`coverage`. Where a model couples samples, as batch
    normalisation does, a row is the gradient of the sample's own loss within its batch. A loss that couples
    them (contrastive terms) cannot be told from the model's output.

    Args:
        model: the model that is called on the batch; the batch is the first axis of its first
            tensor argument. Parameters that need no gradient are left out. An ``nn.ModuleDict`` of
            models that one backward reaches (a denoiser and its text encoder) makes one gradient.
        layers: names of the modules whose parameters count, "*" for any part of a name; None: all. Norms
            are then exact over those, and projections are of those.
        projection_dim: D, the length of each projection; 0 for norms only; "full" for the whole
            gradient, unprojected.
        seed: seed of the projection.
        reduction: how the loss joins the samples, "mean" or "sum".
        weight_gradients: False leaves the parameters' ``.grad`` alone and skips computing it.
        group_size: M consecutive rows of the batch make one sample, whose loss is their mean.
        reuse_products: take a layer's summed weight gradient from its per-sample products where
            they are formed, in place of computing it a second time: for most models cheaper (the
            tables of examples/benchmarks have some of both kinds), but training then differs by
            rounding from training without the engine. Not for losses that are differentiated twice
            (gradient penalties): their backward raises :class:`CaptureError`.
        workspace: bytes of per-sample products alive at once; at least one sample's gradient of
            the largest layer is. None: 8 MiB on a CPU, 256 MiB elsewhere.

    Raises:
        ConfigurationError: nothing in the model is trainable, its parameters are spread over processes in a
            way that is not supported, or an argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: str | Sequence[str] | None = None,
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
        refuse_unsupported(model)
        refuse_options(model, weight_gradients=weight_gradients, reuse_products=reuse_products)
        self.model = model
        self.reduction = reduction
        self.weight_gradients = weight_gradients
        self.group_size = group_size
        self.loss_scale = 1.0  #: factor on the loss besides the batch reduction (AMP, accumulation)
        #: parameter name → factor of its shape on its gradients, such as Adam's 1/(√v̂ + ε), before
        #: norms and projections; parameters not named are left as they are
        self.preconditioner: Mapping[str, Tensor] = {}
        #: what is trained, by name; :attr:`parameters` are those of them that count
        self.trained = trainable_parameters(model)
        if not self.trained:
            raise ConfigurationError("the model has no parameter with requires_grad=True")
        self.layers = layers
        self.parameters = chosen(self.trained, layers)
        #: of :attr:`parameters`, by name; of a sharded one, that of the whole
        self.shapes = shapes_of(model, self.parameters)
        self.sketch = make_sketch(projection_dim, seed, self.shapes)
        self._roots = list(model.values()) if isinstance(model, nn.ModuleDict) else [model]
        self._root_handles: list[RemovableHandle] = []
        self._workspace = workspace
        ruled = find_layers(model, self.parameters)
        self.tape = Tape(
            {name: owned.module for name, owned in ruled.items()},
            self._on_forward,
            inputless=[name for name, owned in ruled.items() if not owned.needs_input],
        )
        self._reuse = Reuse(ruled, self.tape) if reuse_products and weight_gradients else None
        self.tape.companions += unit_hooks(model, self.tape, lambda: self._pass)
        self.tape.let_go = self._reuse is None  # keep inputs: a second backward must refill reused gradients
        self._formed: set[str] = set()  # layers whose products may be reused
        self._assignment = Assignment(self.parameters, ruled)
        self._layout = AxisLayout(self._assignment.names_of(ruled))
        self._schedule = Schedule()
        self._warned = False
        self._hooks = [0] * len(self.parameters)  # on the parameters, by others, when coverage was checked
        self._pass = self._new_pass()

    @property
    def full(self) -> bool:
        """Whether the whole gradient is kept in place of a projection."""
        return isinstance(self.sketch, FullGradient)

    def sibling(self, model: nn.Module, *, group_size: int = 1) -> Self:
        """An engine with the same projection for passes without weight gradients."""
        other = type(self)(
            model,
            layers=self.layers,
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
        try:
            for root in self._roots:
                # First of all: other pre-hooks compute weights (pruning, weight and spectral norms).
                enter = LocalHook(root, self.enter_model, self._on_failure)
                leave = LocalHook(root, self.leave_model, self._on_failed_leave)
                handle = root.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
                self._root_handles.append(handle)
                self._root_handles.append(root.register_forward_hook(leave, always_call=True))
        except BaseException:
            self.detach()
            raise

    def detach(self, *, mid_pass: bool = False) -> None:
        """Take every hook off the model.

        Args:
            mid_pass: the pass under way is given up, but not by the training: hooks that checkpointed
                blocks need in its backward stay, mute, until the next forward.
        """
        while self._root_handles:
            self._root_handles.pop().remove()
        try:
            self.abandon()
        finally:
            if not mid_pass:
                self.tape.detach()

    def begin(self) -> None:
        """Watch the next forward and backward. On an error, the model is left as it was.

        Raises:
            ConfigurationError: the preconditioner does not fit the parameters.
        """
        check_preconditioner(self.preconditioner, self.shapes)
        self._pass.end()
        hooks = [gradient_hooks(p) for p in self.parameters.values()]
        if hooks != self._hooks:  # they may change gradients
            self._hooks, self._schedule.passes = hooks, 0
        self._pass = self._new_pass()
        try:
            if self._reuse is not None:  # a check compares with what autograd itself computes
                self._reuse.chosen = () if self._pass.checked else self._formed
            self.tape.attach(self._pass.guard)
            self._pass.begin(None if self.weight_gradients else self.trained)
        except BaseException:
            self.tape.detach()
            self._pass.end()
            raise

    def finish(self) -> None:
        """Stop watching; :attr:`norms` and :attr:`projections` then belong to the pass.

        Raises:
            CaptureError: no backward was seen, a backward was differentiated itself, or an error inside
                a hook was kept for here; its ``kind`` says which.
            RecheckNeeded: what an earlier pass has established no longer holds; this pass has no rows.
        """
        watched = self._pass
        try:
            self.tape.detach()
        finally:
            watched.end()
        try:
            self._conclude(watched)
        except RecheckNeeded as reason:
            self._formed = set()
            self._schedule.restart(reason)
            raise

    def abandon(self) -> None:
        """Stop watching and leave the model as it was, whatever has been seen."""
        try:
            self.tape.give_up()
        finally:
            self._pass.end()

    def __enter__(self) -> Self:
        try:
            self.begin()
            self.attach()
        except BaseException:
            self.detach()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.finish()
            else:
                self.abandon()
        finally:
            self.detach()

    def enter_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any = None) -> None:
        """A call of the model begins. :meth:`attach` has it called by a hook.

        Call it by hand, and :meth:`leave_model` after, where the layers are run by another module than
        the engine's model, such as a frozen denoiser that calls trained adapters of a container of their
        own.

        Args:
            module: the module that is called.
            args, kwargs: its arguments; the batch is the first axis of the first tensor among them.
        """
        if self.tape.armed and not self.tape.muted:
            self._pass.enter(module, args, kwargs)

    def leave_model(self, module: nn.Module, args: Any, output: Any) -> None:
        """The call of ``module`` has given ``output``; None if it has failed."""
        self._pass.leave(module, output)

    def _new_pass(self) -> WatchedPass:
        device = next(iter(self.parameters.values())).device
        accumulator = PassAccumulator(
            self._assignment.layers,
            self.sketch,
            self.group_size,
            workspace_on(device) if self._workspace is None else self._workspace,
            self._assignment.is_shared,
            self.preconditioner,
        )
        return WatchedPass(
            self.model,
            self._assignment,
            self._layout,
            self.tape,
            self._reuse,
            accumulator,
            checked=self._schedule.due,
            seed=self._schedule.passes,
        )

    def _on_forward(self, layer: str, inputs: Tensor, output: Tensor) -> OnBackward | None:
        return self._pass.on_forward(layer, inputs, output)

    def _on_failure(self, error: Exception) -> None:
        self._pass.guard.keep(error)

    def _on_failed_leave(self, error: Exception) -> None:
        self._pass.guard.keep(error)
        self._pass.stop_watching()  # or the loop would go on under our eyes

    def _conclude(self, watched: WatchedPass) -> None:
        """Make rows of what the pass has seen, if it obeys the laws."""
        error, accumulator = watched.guard.error, watched.accumulator
        if isinstance(error, RecheckNeeded):
            raise error
        if error is not None:
            kind = error.kind if isinstance(error, CaptureError) else "failed"
            raise CaptureError(f"per-sample gradients failed: {error}", kind=kind) from error
        self._assignment.refuse_nothing_left()
        refuse_missed(watched)
        if accumulator.is_empty:
            raise CaptureError(
                "no gradient of a trained parameter was seen: was backward() called inside the engine's "
                "context, on a loss of this model? A custom torch.autograd.Function cannot be looked into",
                kind="no backward",
            )
        with torch.no_grad(), exactly(next(iter(self.parameters.values()))):
            accumulator.flush()
            conclusive = judge(watched, self._assignment, self.model, first=self._schedule.first)
            self._assignment.refuse_nothing_left()
            accumulator.complete(without=self._assignment.missing)
        self._schedule.passed(conclusive=conclusive)
        self._formed = accumulator.formed
        self._report()

    def _report(self) -> None:
        """Warn once of what rows do not hold, or hold in another sense."""
        missing = self._assignment.missing
        if self._warned or not (missing or self._assignment.inseparable):
            return
        self._warned = True
        left_out = f"leave out {len(missing)} of {len(self.parameters)} parameters"
        said = left_out if missing else "follow samples that the model couples or reorders"
        warnings.warn(f"per-sample gradients {said}: {self.coverage}", stacklevel=4)

    # ── results ───────────────────────────────────────────────────────────────────────────────

    @property
    def samples(self) -> int:
        """How many rows the results have: B, or B/M groups."""
        return self._totals.samples

    @property
    def norms(self) -> Tensor:
        """(B,) float32: L2 norm of each sample's gradient over all covered parameters. Exact."""
        return (self._totals.squares.sqrt() * self._undo()).float()

    @property
    def projections(self) -> Tensor:
        """(B, D) float32: projection of each sample's gradient, not normalised."""
        if self.sketch is None:
            raise ConfigurationError("projection_dim is 0: only norms were computed")
        projected = self._totals.projected
        assert projected is not None
        return projected * self._undo()

    @property
    def coverage(self) -> Coverage:
        """Which parameters norms and projections cover; final after the first pass, but for spot checks."""
        return self._assignment.coverage()

    @property
    def first_nonfinite(self) -> str | None:
        """The parameter at which the last backward first met a gradient that is not finite, or None."""
        totals = self._pass.accumulator.totals
        return None if totals is None else totals.first_nonfinite()

    @property
    def uses(self) -> int:
        """How many uses of trained parameters the forward under way has shown so far."""
        return self._pass.uses

    @property
    def hook_seconds(self) -> float:
        """Time that the last pass spent on per-sample gradients and checks (CPU: exact; GPU: launches)."""
        return self.tape.seconds

    @property
    def _totals(self) -> Totals:
        totals = self._pass.accumulator.totals
        if totals is None:
            raise CaptureError("no pass has been finished", kind="no backward")
        return totals

    def _undo(self) -> float:
        """What to multiply by so that a row is the gradient of its own (group's mean) loss."""
        reduced = self._totals.samples if self.reduction == "mean" else 1 / self.group_size
        return reduced / self.loss_scale
