"""With what weight each checkpoint counts: the summed learning rate since the one before."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from diffhook.capture.checkpoints.finding import Checkpoint
from diffhook.errors import ConfigurationError

OPTIMIZER, EQUAL, GIVEN = "optimizer", "equal", "given"
_FILES = ("optimizer.bin", "optimizer.pt", "optimizer.pth")
_KEYS = (
    *("optimizer", "optimizer_state_dict", "optimizer_state", "optimizer_states", "optimizers"),
    *("optim", "optim_state_dict", "opt", "opt_state_dict", "opt_state"),
)


@dataclass(frozen=True)
class Rate:
    """What a checkpoint says of the learning rate.

    Attributes:
        lr: of its last step, or of the next.
        initial: before any schedule.
        total: the sum since the checkpoint before, where it is known exactly: of a log's snapshots.
    """

    lr: float
    initial: float
    total: float | None = None


def learning_rates(
    checkpoints: Sequence[Checkpoint],
    given: Sequence[float] | None = None,
    since: tuple[int, float] | None = None,
) -> tuple[list[tuple[float, float]], str]:
    """The rate at each checkpoint and the sum since the one before, and where they come from: "optimizer",
    where every checkpoint has an optimiser's state, "given", or "equal".

    Between two checkpoints the rate is taken to go straight from the one's to the other's.

    Args:
        checkpoints: by step.
        given: the sums themselves.
        since: step and rate of a checkpoint before all of them; None: they are the training's first.

    Raises:
        ConfigurationError: other than one given for each, or none positive.
    """
    if given is not None:
        sums = [float(value) for value in given]
        if len(sums) != len(checkpoints) or not all(0 <= s < float("inf") for s in sums) or not any(sums):
            raise ConfigurationError(
                f"there are {len(sums)} learning rates for {len(checkpoints)} checkpoints; expected one "
                "each, none negative, not all zero"
            )
        return [(value, value) for value in sums], GIVEN
    rates = [read_rate(checkpoint) for checkpoint in checkpoints]
    known = [rate for rate in rates if rate is not None]
    if len(known) == len(checkpoints):
        sums = _sums([checkpoint.step for checkpoint in checkpoints], known, since or (0, known[0].initial))
        if all(value > 0 for value in sums):
            return [(rate.lr, value) for rate, value in zip(known, sums, strict=True)], OPTIMIZER
    return [(1.0, 1.0)] * len(checkpoints), EQUAL


def _sums(steps: Sequence[int], rates: Sequence[Rate], since: tuple[int, float]) -> list[float]:
    before = [since, *((step, rate.lr) for step, rate in zip(steps, rates, strict=True))]
    straight = [(b - a) * (lr + last) / 2 for (a, last), (b, lr) in pairwise(before)]
    return [s if rate.total is None else rate.total for s, rate in zip(straight, rates, strict=True)]


def read_rate(checkpoint: Checkpoint) -> Rate | None:
    """None where the checkpoint keeps no optimiser's state that can be read."""
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    described = folder / "snapshot.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(described.read_text())
        return Rate(float(found["lr"]), float(found["lr"]), float(found["lr_sum"]))
    if checkpoint.path.is_file() and checkpoint.path.suffix != ".safetensors":
        return _of_state(_read(checkpoint.path))
    for place in (folder, folder.parent):  # of a file in the folder "unet", say
        for name in _FILES:
            if (place / name).is_file():
                return _of_state(_read(place / name))
        if place == checkpoint.path:
            return None
    return None


def _read(path: Any) -> Any:
    with suppress(OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return None


def _only_state(held: Mapping[Any, Any]) -> Any:
    """An optimiser's state under whatever name, where there is one alone."""
    found = [value for value in held.values() if isinstance(value, Mapping) and "param_groups" in value]
    return found[0] if len(found) == 1 else None


def _of_state(state: Any) -> Rate | None:
    while isinstance(state, Mapping) and "param_groups" not in state:
        state = next((state[key] for key in _KEYS if key in state), None) or _only_state(state)
        state = state[0] if isinstance(state, list) and state else state
    if not isinstance(state, Mapping) or not state["param_groups"]:
        return None
    group = state["param_groups"][0]
    with suppress(KeyError, TypeError, ValueError):
        lr = float(group["lr"])
        return Rate(lr, float(group.get("initial_lr", lr)))
    return None
