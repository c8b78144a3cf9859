"""Which trainable parameters the engine sees, and how."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn

from diffhook.errors import CaptureError
from diffhook.gradients.layers import Owned, tied


@dataclass(frozen=True)
class Coverage:
    """What became of every trainable parameter of the model.

    Attributes:
        ruled: names whose per-sample gradient comes from a layer rule.
        fallback: names handled by the exact fallback, operation by operation (bare parameters,
            weights used functionally or derived from others, layers without a rule).
        missing: name → reason, for parameters whose gradient is NOT part of norms and projections.
        inseparable: module → reason, where the rows of a layer are not one sample each: batch statistics
            (batch normalisation in training mode) couple the samples of a batch, or the model sorts,
            rolls or shares rows. Parameters behind it are in ``fallback``, which follows them to where
            rows are samples again: a row is then the gradient of the sample's own loss within its batch,
            exact, at the cost of one small backward for each sample.
        unchecked: reason why the samples' separability could not be checked, or None.
    """

    ruled: tuple[str, ...]
    fallback: tuple[str, ...]
    missing: Mapping[str, str] = field(default_factory=dict)
    inseparable: Mapping[str, str] = field(default_factory=dict)
    unchecked: str | None = None

    @property
    def complete(self) -> bool:
        """True when norms and projections cover every trainable parameter."""
        return not self.missing

    def __str__(self) -> str:
        text = f"{len(self.ruled)} parameters by layer rule, {len(self.fallback)} by exact fallback"
        if self.missing:
            text += f", {len(self.missing)} NOT covered: {_listed(self.missing)}"
        if self.inseparable:
            text += f"; rows are of a sample within its batch: {_listed(self.inseparable)}"
        return text


def _listed(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{name} ({why})" for name, why in reasons.items())


class Assignment:
    """Who computes each trainable parameter's gradients; grows as passes learn about the model.

    Args:
        parameters: name → trainable parameter.
        layers: name → layer with a rule.

    Attributes:
        fallback: names that the fallback watches.
        missing: name → reason.
        uncalled: layers that the last check saw no call of: their gradients are zero.
        declined: layers whose rule does not explain how they are called; the fallback has them.
        inseparable: module → reason.
        unchecked: why separability was not checked in the last check.
        tested_alone: the last check had a batch of one sample, which says nothing about others.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], layers: Mapping[str, Owned]) -> None:
        self.parameters = parameters
        self.layers = layers
        ruled = {name for owned in layers.values() for name in owned.parameters.values()}
        self.fallback = set(parameters) - ruled
        self.missing: dict[str, str] = {}
        self.uncalled: set[str] = set()
        self.declined: set[str] = set()
        self.inseparable: dict[str, str] = {}
        self.unchecked: str | None = None
        self.tested_alone = False
        self._tied = tied(layers)

    def is_shared(self, name: str) -> bool:
        """Whether a parameter has uses besides one layer: parts must be added before norms are taken."""
        return name in self._tied or name in self.fallback

    def rounded(self) -> set[str]:
        """Parameters whose gradients torch may sum in half precision."""
        return self.names_of(name for name, owned in self.layers.items() if owned.rule.rounded)

    def names_of(self, layers: Iterable[str]) -> set[str]:
        """The parameters of layers, by their names in the model."""
        return {name for layer in layers for name in self.layers[layer].parameters.values()}

    def leave_out(self, reasons: Mapping[str, str]) -> None:
        """Parameters that nobody can split by sample."""
        for name, reason in reasons.items():
            self.missing.setdefault(name, reason)
        self.fallback -= self.missing.keys()

    def refuse_nothing_left(self) -> None:
        """Without a parameter that is covered there are no rows.

        Raises:
            CaptureError: all are missing.
        """
        if self.missing.keys() == self.parameters.keys():
            raise CaptureError(
                "no parameter's gradient can be split by sample. A part of the loss that is of no sample, as "
                "a penalty on the weights, is for the optimiser (weight_decay) or a backward of its own. "
                f"{self.coverage()}",
                kind="uncovered",
            )

    def coverage(self) -> Coverage:
        fallback = self.fallback - self.missing.keys()
        return Coverage(
            tuple(n for n in self.parameters if n not in fallback and n not in self.missing),
            tuple(n for n in self.parameters if n in fallback),
            dict(self.missing),
            dict(self.inseparable),
            self.unchecked,
        )
