"""Whether the samples that are to be measured are the log's, by their names and by what they look like."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch.utils.data import default_collate

from diffhook.appearance import COLUMNS, FEW, look_alike, on_scale, usual_differences
from diffhook.capture.model.borrowing import undrawn
from diffhook.capture.probes.probe import Probe
from diffhook.capture.samples.appearance import appearance, images_of
from diffhook.errors import LogError
from diffhook.log import RunLog

_COMPARED = 16  # samples; of fewer than half as many nothing is concluded
_EXACT = 1e-3  # of what half of the samples differ by


def check_names(log: RunLog, names: Mapping[int, str]) -> None:
    """Raises a LogError where samples are called otherwise in the log."""
    known = log.names()
    for sample in sorted(known.keys() & names.keys()):
        if known[sample] != names[sample]:
            raise LogError(
                f"the log at {log.location} belongs to another dataset: sample {sample} is {known[sample]!r} "
                f"there and {names[sample]!r} here. Choose another log, or name the data that it was made of"
            )


def check_appearance(log: RunLog, probe: Probe) -> None:
    """Raises a LogError where hardly any sample looks as in the log. Random crops leave some near what
    they were."""
    block = next(log.probe.blocks(), None)
    if block is None or len(log.probe) == 0:
        return
    ids, first = np.unique(log.probe.read(block, "sample"), return_index=True)
    known = on_scale(np.stack([log.probe.read(block, name)[first] for name in COLUMNS], 1))
    ids, known = ids[np.isfinite(known).all(1)], known[np.isfinite(known).all(1)]
    chosen = np.unique(np.linspace(0, len(ids) - 1, min(_COMPARED, len(ids))).round().astype(int))
    if 2 * len(chosen) < _COMPARED or ids.max() >= len(probe.dataset):
        return
    collate = probe.collate or default_collate
    with undrawn():
        clean = images_of(collate([probe.dataset[int(i)] for i in ids[chosen]]))
    if clean is None:
        return
    seen, usual = on_scale(appearance(clean).cpu().numpy()), usual_differences(known)
    exact = np.abs(seen - known[chosen]) <= _EXACT * usual + 1e-4
    alike = look_alike(seen, known[chosen], usual)
    if not exact.all(1).any() and alike.mean() <= FEW:
        raise LogError(
            f"the log at {log.location} belongs to another dataset, or to one that was prepared otherwise: "
            f"of {len(chosen)} samples, {int(alike.sum()) or 'none'} look as they did (mean, contrast, "
            "roughness). Choose another log, or name the data that it was made of"
        )
