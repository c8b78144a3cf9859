"""Why a sample is pointed out."""

from __future__ import annotations

from collections.abc import Sequence

COPY = "exact copy"

KINDS = (
    "not finite",
    "unusual look",
    "high loss",
    COPY,
    "near copy",
    "wrong label",
    "unusual in sum",
    "high norm",
    "TracIn self-influence",
    "ReTrac self-influence",
)
"""In the order in which a curator acts on them: what a look at the picture decides comes first."""

_WEAK = KINDS.index("high norm")  # from which on they tell of the training more than of the sample


class Reason(str):
    """A sentence, which it is wherever text is wanted, with what one can sort and filter by.

    Attributes:
        kind: what all such reasons have in common, one of :data:`KINDS` or a word of one's own; no numbers.
        brief: a few words with the strength, "loss × 3.1".
        others: ids of the samples that it names: those of which this one is a copy, or the first few.
    """

    __slots__ = ("brief", "kind", "others")

    kind: str
    brief: str
    others: tuple[int, ...]

    def __new__(cls, sentence: str, kind: str, brief: str, others: tuple[int, ...] = ()) -> Reason:
        made = super().__new__(cls, sentence)
        made.kind, made.brief, made.others = kind, brief, others
        return made

    def __reduce__(self) -> tuple[type[Reason], tuple[str, str, str, tuple[int, ...]]]:
        return Reason, (str(self), self.kind, self.brief, self.others)

    @classmethod
    def of(cls, text: str) -> Reason:
        """One that is none yet is a note of its own."""
        return text if isinstance(text, cls) else cls(text, "note", text)

    @staticmethod
    def telling(given: Sequence[str]) -> list[Reason]:
        """In the order of :data:`KINDS`, without the weak ones where there are others."""
        found = sorted(map(Reason.of, given), key=lambda reason: reason.place)
        return [reason for reason in found if reason.place < _WEAK] or found

    @property
    def place(self) -> float:
        """Where its kind stands among :data:`KINDS`; kinds of one's own come before the weak ones."""
        return KINDS.index(self.kind) if self.kind in KINDS else _WEAK - 0.5
