"""Why a sample is pointed out."""

from __future__ import annotations


class Reason(str):
    """A sentence, which it is wherever text is wanted, with what one can sort and filter by.

    Attributes:
        kind: what all such reasons have in common, such as "loss"; no numbers.
        brief: a few words with the strength, "loss × 3.1".
    """

    __slots__ = ("brief", "kind")

    kind: str
    brief: str

    def __new__(cls, sentence: str, kind: str, brief: str) -> Reason:
        made = super().__new__(cls, sentence)
        made.kind, made.brief = kind, brief
        return made

    def __reduce__(self) -> tuple[type[Reason], tuple[str, str, str]]:
        return Reason, (str(self), self.kind, self.brief)

    @classmethod
    def of(cls, text: str) -> Reason:
        """One that is none yet is a note of its own."""
        return text if isinstance(text, cls) else cls(text, "note", text)
