"""What a capture may add to a training: events while it runs, probes at its end, snapshots, and bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from diffhook.errors import ConfigurationError
from diffhook.words import duration


@dataclass(frozen=True)
class Budget:
    """A share of the training time, and some seconds besides.

    Scores need some hundred rows in any case: a share alone would leave a short training with none, while a
    long one should not feel that it is watched. So by default it is both.

    Attributes:
        share: of the training time without us.
        seconds: besides.

    Raises:
        ConfigurationError: a share not within (0, 1].
    """

    share: float
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigurationError(
                f"overhead is {self.share}; expected a share of the training time, such as 0.05"
            )

    def of(self, training: float) -> float:
        """Seconds that may be added to a training that took so many."""
        return self.share * training + self.seconds

    @property
    def half(self) -> Self:
        """For events, where probes get the rest."""
        return type(self)(self.share / 2, self.seconds / 2)

    def __str__(self) -> str:
        besides = f", and up to {duration(self.seconds)} on top" if self.seconds else ""
        return f"{100 * self.share:.3g}% of the training time{besides}"


BUDGET = Budget(0.10, 300.0)
"""By default. With a tenth, events of every step are had of LoRA, of every tenth step of a whole model, and
probes of all samples once they were visited some hundred times; five minutes pay for both where the training
is a short one."""

LOG_BYTES = 10 << 30
"""Of events, where no stride was chosen: each time that half of the room left is filled, half as many steps
are captured from there, so that it never gets there."""
