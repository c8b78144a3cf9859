"""Whether a dataset's index stands for the same sample every time.

Bucketed datasets that make batches themselves, and shuffle anew at each epoch, give other samples under the
same indices; so do those that draw an item at random. The ids of their rows would be those of others.
"""

from __future__ import annotations

from torch import Tensor

from diffhook.capture.loop.identity.content import is_rich

_REMEMBERED = 1 << 16  # samples
_ROWS = 8  # of a batch that are looked at: a dataset that moves moves all
_NUMBERS = 256  # of a picture that are compared
_FOR_ONE_AGAINST = 4  # pictures that must have come again, for each that came under another index


class IndexCheck:
    """Compares the pictures that come under an index with those that came under it before.

    A picture that is new under its index, and known from another one, speaks against the dataset; one that
    comes again under its own speaks for it. Augmented ones say nothing; duplicates err now and then.
    """

    def __init__(self) -> None:
        self._content: dict[int, int] = {}  # index → what came last
        self._index: dict[int, int] = {}  # what came → the index under which it came first
        self._same = self._swapped = 0

    @property
    def believed(self) -> bool:
        """Whether indices stand for samples."""
        return self._swapped * _FOR_ONE_AGAINST <= self._same

    def see(self, indices: list[int], images: Tensor) -> None:
        """Look at the first rows of a batch.

        Args:
            indices: of the rows.
            images: (B, …) the rows.
        """
        flat = images[:_ROWS].detach().flatten(1)
        flat = flat[:, :: -(-flat.shape[1] // _NUMBERS) | 1].cpu()
        for index, row in zip(indices, flat, strict=False):
            if is_rich(row):
                self._note(index, hash(tuple(row.tolist())))

    def _note(self, index: int, content: int) -> None:
        before = self._content.get(index)
        if before == content:
            self._same += 1
        elif before is not None and self._index.get(content, index) != index:
            self._swapped += 1
        if len(self._content) < _REMEMBERED or before is not None:
            self._content[index] = content
            self._index.setdefault(content, index)
