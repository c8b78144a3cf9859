"""What a run will write, against what the disk takes."""

from __future__ import annotations

from dataclasses import dataclass

from diffhook import words
from diffhook.capture.plan import Plan
from diffhook.capture.recording.recorder import Recorder
from diffhook.log.store import free_bytes

_FEW = 3  # snapshots; a disk that takes no more is told of, whatever the length of the run


@dataclass(frozen=True)
class Volume:
    """Bytes of a run whose length is not known: loops do not tell it.

    Attributes:
        rows: bytes of a step's rows, of all steps on average.
        snapshot: bytes of a snapshot.
        snapshot_every: steps, where the user says so.
        epoch: steps of an epoch, where the length of the data is known; as many at most where several
            micro-batches make a step.
        free: bytes on the log's disk; None: on a network.
    """

    rows: float
    snapshot: int
    snapshot_every: int | None
    epoch: int | None
    free: int | None

    @classmethod
    def of(
        cls, plan: Plan, recorder: Recorder, batch: int, epoch: int | None, snapshot_every: int | None
    ) -> Volume:
        """What a plan makes of a run: ``batch`` rows a step, of all processes."""
        rows = batch * recorder.writer.bytes_per_row / plan.stride
        return cls(rows, recorder.snapshot_bytes, snapshot_every, epoch, free_bytes(recorder.writer.store))

    @property
    def step(self) -> float:
        """Bytes of a step, with its share of a snapshot."""
        return self.rows + (self.snapshot / self.snapshot_every if self.snapshot_every else 0.0)

    def snapshots_text(self) -> str:
        """When snapshots are taken, and how large they are."""
        text = f"snapshots of {words.size(self.snapshot)}: at each save_state, at the end"
        if not self.snapshot_every:
            return text
        each = f", every {self.snapshot_every} steps"
        count = (self.epoch or 0) // self.snapshot_every
        return text + each + (f", {words.size(count * self.snapshot)} an epoch" if count else "")

    def room_text(self) -> str | None:
        """How long the disk takes it; None where it is a network."""
        if self.free is None:
            return None
        return f"the disk has {words.size(self.free)} free, enough for {self.free / self.step:,.0f} steps"

    def shortage(self) -> str | None:
        """What the disk does not take, if so."""
        if self.free is None:
            return None
        needed, of = (self.epoch or 0) * self.step, "an epoch of rows and snapshots needs"
        if needed < _FEW * self.snapshot:
            needed, of = _FEW * self.snapshot, f"{_FEW} snapshots need"
        if needed <= self.free:
            return None
        return (
            f"{of} {words.size(needed)}, and the log's disk has {words.size(self.free)} free: what does not "
            "fit is left out. Take fewer snapshots (snapshot_every=) or rows (every=), keep snapshots in "
            'half precision (snapshot_dtype="bfloat16"), or log elsewhere'
        )
