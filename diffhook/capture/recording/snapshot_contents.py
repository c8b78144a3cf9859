"""What a snapshot holds: the trainable parameters, and what Adam divides by."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from diffhook.capture.recording.tensor_file import safetensors_of
from diffhook.gradients import PerSampleGradients
from diffhook.gradients.sharding import gathered, is_sharded, shapes_of
from diffhook.log import Content

logger = logging.getLogger("diffhook")

Preconditioner = Callable[[Mapping[str, nn.Parameter]], Mapping[str, Tensor]]


class SnapshotContents:
    """Makes the files of snapshots.

    Of a sharded model all processes gather the parameters together, tensor by tensor, each on its training
    thread; the first one then holds them in memory until they are written.

    Args:
        engine: on the trained model.
        dtype: that parameters are written in; None: their own.
        preconditioner: what snapshots keep of the optimiser, see
            :func:`~diffhook.capture.recording.preconditioner.adam_preconditioner`; None: nothing.
        meet: whether all processes have come to the point that a word names, so that none of them waits in a
            collective for one that does not come.
    """

    def __init__(
        self,
        engine: PerSampleGradients,
        dtype: torch.dtype | None,
        preconditioner: Preconditioner | None,
        meet: Callable[[str], bool],
    ) -> None:
        self._engine, self._dtype, self._meet = engine, dtype, meet
        self._preconditioner = preconditioner
        self._sharded = is_sharded(engine.model)
        self._reasons: set[str] = set()  # told, why there is no preconditioner

    @property
    def size(self) -> int:
        """Bytes of a snapshot's files."""
        kept = sum(s.numel() for s in self._engine.shapes.values()) if self._preconditioner else 0
        trained = self._engine.trained
        shapes = shapes_of(self._engine.model, trained)
        like = {n: torch.empty(shapes[n], dtype=p.dtype, device="meta") for n, p in trained.items()}
        return 4 * kept + safetensors_of(like, dtype=self._dtype).size

    def of(self, step: int, *, keep: bool) -> tuple[Content, Content | None] | None:
        """Of the parameters as they are after so many steps.

        Args:
            keep: whether this process writes the snapshot.

        Returns:
            Parameters, and the preconditioner if there is one. None: another process writes it, or it cannot
            be taken, which is told.
        """
        trained: Mapping[str, Tensor] = self._engine.trained
        if self._sharded:
            if not self._meet(f"snapshot-{step}"):
                if keep:
                    logger.warning(
                        "diffhook leaves out the snapshot of step %d: the parameters are sharded, and not "
                        "all processes came to gather them. Where one of them alone saves a checkpoint, or "
                        "closes the hook, let all do so",
                        step,
                    )
                return None
            trained = gathered(self._engine.model, trained, self._dtype, keep=keep)
        if not keep:
            return None
        for device in {parameter.device for parameter in trained.values()}:
            torch.get_device_module(device).synchronize()  # they are read in another thread
        return safetensors_of(trained, dtype=self._dtype), self._divisors(step)

    def _divisors(self, step: int) -> Content | None:
        if self._preconditioner is None:
            return None
        try:
            if self._sharded:
                raise ValueError("the optimiser's state is sharded over processes")
            factors = self._preconditioner(self._engine.parameters)
        except ValueError as reason:
            if str(reason) not in self._reasons:
                self._reasons.add(str(reason))
                logger.warning("snapshots keep no preconditioner (from step %d on), because %s", step, reason)
            return None
        return safetensors_of(factors, like=self._engine.parameters, dtype=torch.float32)
