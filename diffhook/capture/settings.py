"""What to capture: the options that every adapter takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import nn

from diffhook.capture import Alerts, Detector, Objective, Plan, Probe
from diffhook.capture.budget import BUDGET, Budget
from diffhook.capture.checks import check_choice, check_kind, check_whole
from diffhook.capture.objective import check_objective
from diffhook.capture.probes.last_probe import AT_END
from diffhook.errors import ConfigurationError
from diffhook.gradients import check_projection_dim
from diffhook.words import brief, guess


@dataclass(frozen=True)
class Settings:
    """Options of a capture.

    Of an optimiser whose groups have several learning rates, the log has the first group's; it is told.

    Attributes:
        projection_dim: D; 0 for norms only; "full" keeps whole gradients. None: that of the log, if there is
            one, or else 8192, and less for large datasets, see
            :func:`~diffhook.capture.projection_dim.usual_dim`.
        seed: seed of the projection.
        every: capture one optimiser step in this many; None: as many as the budget allows.
        overhead: the share of the training time that all of it may add, such as 0.05: events, snapshots and
            the probe at the end. None: see :data:`~diffhook.capture.budget.BUDGET`. What is said with
            ``every`` or ``probe`` is done whatever it costs.
        snapshot_every: optimiser steps between snapshots, besides those at checkpoints and at the
            end.
        snapshot_dtype: "float16" or "bfloat16": snapshots hold the parameters rounded to half precision, so
            that queries are of slightly other models than events and probes; None: as they are.
        keep_preconditioner: snapshots also keep Adam's 1/(√v̂ + ε), which the methods "adam-tracin" and
            "adam-retrac" need: as many numbers again as the trained parameters. Training steps cost the
            same.
        probe: which samples to probe at snapshots. Without an ``objective``, by the loss that is recognised
            and with clean samples and conditions as the training's own calls had them; of n samples about as
            many, chosen by their ids. None: all of them at the end of the training, if the budget affords
            it. False: none.
        objective: the training loss, for probes, which then load the dataset's items. With several trained
            models it is called with an ``nn.ModuleDict`` of them.
        alerts: an :class:`~diffhook.capture.Alerts`, or detectors; None for the usual, () for none.
        sample_ids: where a batch holds its samples' ids: a key, or a function of the batch, or of the batch
            and its samples' (B,) indices in the dataset, that returns (B,) integers or B strings. None: a
            well-known key such as "ids", "indices" or "filenames", or else the index in the dataset. False:
            the index, whatever the batch holds.
        thumbnails: longest side in pixels of a small image of each sample, as the batch had it at its first
            visit, to keep in the log; 0, as by default: the log holds no image.
        models: which of the trained models count; None: those that are trained together with the denoiser.
        layers: names of modules, "*" for any part of one ("*.attn1"): only what is inside them counts, in
            norms, which are exact over it, and in projections. None: everything that is trained.
        reduction: how the loop's loss joins the samples of a batch, "mean" or "sum".
        reuse_products: for most models cheaper, but training then differs by rounding, see
            :class:`diffhook.gradients.PerSampleGradients`.
        workspace: bytes of per-sample products alive at once, likewise.
        strict: raise our own errors instead of logging them.
        enabled: False does nothing at all.

    Raises:
        ConfigurationError: a value out of range.
    """

    projection_dim: int | Literal["full"] | None = None
    seed: int = 0
    every: int | None = None
    overhead: float | None = None
    snapshot_every: int | None = None
    snapshot_dtype: Literal["float16", "bfloat16"] | None = None
    keep_preconditioner: bool = False
    probe: Probe | Literal[False] | None = None
    objective: Objective | None = None
    alerts: Alerts | Sequence[Detector] | None = None
    sample_ids: str | Callable[..., Any] | Literal[False] | None = None
    thumbnails: int = 0
    models: Sequence[nn.Module] | None = None
    layers: str | Sequence[str] | None = None
    reduction: Literal["mean", "sum"] = "mean"
    reuse_products: bool = False
    workspace: int | None = None
    strict: bool = False
    enabled: bool = True

    def __post_init__(self) -> None:
        if self.projection_dim is not None:
            check_projection_dim(self.projection_dim)
        check_whole("thumbnails", self.thumbnails, 0, 512)
        for name in ("every", "snapshot_every", "workspace"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), 1)
        if self.snapshot_dtype is not None:
            check_choice("snapshot_dtype", self.snapshot_dtype, ("float16", "bfloat16"))
        check_choice("reduction", self.reduction, ("mean", "sum"))
        check_objective(self.objective)
        if self.probe not in (None, False):
            check_kind("probe", self.probe, Probe, "Probe(samples=512)")
        _check_sequence("models", self.models, nn.Module)
        _check_sequence("layers", self.layers, str, alone=True)
        if not (
            self.sample_ids in (None, False) or isinstance(self.sample_ids, str) or callable(self.sample_ids)
        ):
            raise ConfigurationError(
                f"sample_ids is {brief(self.sample_ids)}; expected a batch's key, a function of a batch, "
                "None or False"
            )
        if self.probed is not None and self.objective is not None:
            self.probed.grid.timesteps_of(self.objective)
        Alerts.of(self.alerts)
        self.plan()

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Settings:
        """From options by name.

        Raises:
            ConfigurationError: there is no such option.
        """
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise ConfigurationError(
                    f"no option {name!r}; there are {', '.join(known)}.{guess(name, known)}"
                )
        return cls(**given)

    def snapshot_precision(self) -> torch.dtype | None:
        """Of the parameters in snapshots; None: their own."""
        return None if self.snapshot_dtype is None else getattr(torch, self.snapshot_dtype)

    @property
    def budget(self) -> Budget:
        """What all of it may add to the training."""
        return BUDGET if self.overhead is None else Budget(self.overhead)

    @property
    def probes_at_end(self) -> bool:
        """Whether all samples are to be probed at the end, if the budget affords it."""
        return self.probe is None and self.projection_dim != 0

    @property
    def probed(self) -> Probe | None:
        """Which samples are to be probed; None: none."""
        return AT_END if self.probes_at_end else self.probe or None

    def plan(self) -> Plan:
        """Which steps to capture."""
        if self.every is not None and self.overhead is None:
            return Plan(self.every)
        return Plan(self.every or 1, self.budget.half if self.probes_at_end else self.budget)


def _check_sequence(name: str, value: Any, kind: type, *, alone: bool = False) -> None:
    """Raises ConfigurationError unless it is None, a sequence of this kind, or one of it ``alone``."""
    if value is None or (alone and isinstance(value, kind)):
        return
    whole = isinstance(value, Sequence) and not isinstance(value, str)
    if whole and all(isinstance(each, kind) for each in value):
        return
    found = next((each for each in value if not isinstance(each, kind)), value) if whole else value
    hint = f": did you mean [{name.removesuffix('s')}]?" if isinstance(value, kind) else ""
    raise ConfigurationError(
        f"{name} {'holds' if whole else 'is'} {brief(found)}; expected a list of {kind.__name__}s{hint}"
    )
