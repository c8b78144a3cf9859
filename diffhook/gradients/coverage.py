"""Which trainable parameters the engine sees, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Coverage:
    """What became of every trainable parameter of the model.

    Attributes:
        ruled: names whose per-sample gradient comes from a layer rule.
        fallback: names handled by the exact fallback, operation by operation (bare parameters,
            weights used functionally, layers without a rule).
        missing: name → reason, for parameters whose gradient is NOT part of norms and projections.
    """

    ruled: tuple[str, ...]
    fallback: tuple[str, ...]
    missing: Mapping[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """True when norms and projections cover every trainable parameter."""
        return not self.missing

    def __str__(self) -> str:
        text = f"{len(self.ruled)} parameters by layer rule, {len(self.fallback)} by exact fallback"
        if self.missing:
            named = "; ".join(f"{name} ({why})" for name, why in self.missing.items())
            text += f", {len(self.missing)} NOT covered: {named}"
        return text
