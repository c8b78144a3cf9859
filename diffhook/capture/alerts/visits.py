"""What samples were found to be like when they last came by."""

from __future__ import annotations

from array import array


class VisitHistory:
    """A few numbers for each of many samples, in flat arrays.

    Args:
        last: numbers that are kept of a sample, the newest.
        most: samples that are remembered; beyond it, those first seen longest ago are forgotten.
    """

    def __init__(self, last: int, most: int) -> None:
        self._last, self._most = last, most
        self._rows: dict[int, int] = {}  # sample → its row in the arrays
        self._samples = array("q")
        self._counts = array("L")  # numbers since the sample was met, or forgotten
        self._numbers = array("f")  # `last` of each row, in a ring
        self._oldest = 0  # the row that is given to another sample next, once there are `most`

    def add(self, sample: int, number: float) -> array[float]:
        """The sample's last numbers, in whatever order, once this one is among them."""
        row = self._rows.get(sample)
        if row is None:
            row = self._rows[sample] = self._free_row(sample)
        self._numbers[row * self._last + self._counts[row] % self._last] = number
        self._counts[row] += 1
        return self.of(sample)

    def of(self, sample: int) -> array[float]:
        """The sample's last numbers, in whatever order."""
        row = self._rows.get(sample)
        if row is None:
            return array("f")
        first = row * self._last
        return self._numbers[first : first + min(self._counts[row], self._last)]

    def forget(self, sample: int) -> None:
        """Drop the sample's numbers."""
        if sample in self._rows:
            self._counts[self._rows[sample]] = 0

    def _free_row(self, sample: int) -> int:
        row = len(self._samples)
        if row < self._most:
            self._samples.append(sample)
            self._counts.append(0)
            self._numbers.extend([0.0] * self._last)
            return row
        row, self._oldest = self._oldest, (self._oldest + 1) % self._most
        del self._rows[self._samples[row]]
        self._samples[row], self._counts[row] = sample, 0
        return row
