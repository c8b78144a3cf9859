"""Which checkpoints a pattern names, of which steps, and which of their files hold weights."""

from __future__ import annotations

import glob
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from diffhook.errors import ConfigurationError
from diffhook.words import brief, plural

logger = logging.getLogger("diffhook")

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_MODELS = ("unet", "transformer")  # of a pipeline, or of a checkpoint of diffusers' scripts
_NAMES = (
    "pytorch_lora_weights",  # what diffusers, peft and accelerate call weights, the most telling first
    "adapter_model",
    "diffusion_pytorch_model",
    "model",
    "pytorch_model",
    "parameters",  # of a log's snapshot
)
_OTHERS = re.compile(
    r"optimizer|scheduler|scaler|random_states|sampler|rng_state|training_args|dataloader", re.I
)
_STEP = re.compile(r"steps?[-_=]?0*(\d+)", re.IGNORECASE)

Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]] | Mapping[int, str | os.PathLike[str]]


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint, nothing of it read yet.

    Attributes:
        step: optimiser steps taken before it, as its name tells.
        path: a folder, or a file of weights.
        files: of its weights.
        ema: whether the averaged weights are meant.
    """

    step: int
    path: Path
    files: tuple[Path, ...]
    ema: bool = False


def find_checkpoints(
    paths: Paths, *, ema: bool = False, steps: Sequence[int] | None = None
) -> list[Checkpoint]:
    """The checkpoints by step. What matches a pattern and holds no weights is left out, and told.

    Args:
        paths: a pattern such as "out/checkpoint-*", or several; paths; or a mapping from step to path.
        ema: take the averaged weights.
        steps: of the paths, in the order in which they are given or found; by default the number in each
            name.

    Raises:
        ConfigurationError: there are none, or their steps cannot be told.
    """
    if isinstance(paths, Mapping):
        steps, paths = [int(step) for step in paths], list(paths.values())
    found = _matching([paths] if isinstance(paths, str | os.PathLike) else paths)
    files = {path: weight_files(path, ema=ema) for path in found}
    empty = [path for path, held in files.items() if not held]
    if empty:
        logger.warning(
            "left out, because no weights of a model are in them: %s", ", ".join(map(str, empty[:5]))
        )
    held = [path for path in found if files[path]]
    if not held:
        what = f"{', '.join(map(str, empty[:3]))} without weights" if empty else f"nothing at {brief(paths)}"
        raise ConfigurationError(
            f"there are no checkpoints: found {what}; expected folders of diffusers or accelerate, such as "
            f"'out/checkpoint-*', or files {', '.join(SUFFIXES)}"
        )
    numbers = _steps(held) if steps is None else _given(steps, held)
    made = [Checkpoint(n, path, tuple(files[path]), ema) for n, path in zip(numbers, held, strict=True)]
    return sorted(made, key=lambda checkpoint: checkpoint.step)


def _matching(patterns: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Each path once; of a pattern, by name."""
    found: dict[Path, None] = {}
    for given in patterns:
        pattern = os.path.expanduser(os.fspath(given))
        matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern))
        found |= dict.fromkeys(Path(match) for match in matches)
    return list(found)


def _given(steps: Sequence[int], paths: Sequence[Path]) -> list[int]:
    if len(steps) != len(paths) or len(set(steps)) != len(steps) or min(steps) < 0:
        raise ConfigurationError(
            f"there are {len(steps)} steps ({brief(list(steps))}) for {plural(len(paths), 'checkpoint')}; "
            "expected one each, all different"
        )
    return list(steps)


def _steps(paths: Sequence[Path]) -> list[int]:
    found = _told([path.stem if path.suffix in SUFFIXES else path.name for path in paths])
    folders = [path.parent.name for path in paths]
    if all(step is None for step in found) and len(set(folders)) == len(paths):
        found = _told(folders)
    without = [path for path, step in zip(paths, found, strict=True) if step is None]
    if without and len(without) < len(paths):
        raise ConfigurationError(
            f"the name of {without[0]} tells no step, those of others do: name it with steps= (--steps), or "
            "leave it out"
        )
    numbers = [position + 1 if step is None else step for position, step in enumerate(found)]
    if without:
        told = "it counts as step 1" if len(paths) == 1 else f"they count as steps 1 to {len(paths)}, by name"
        logger.warning("the names of the checkpoints tell no steps (--steps): %s", told)
    for position, number in enumerate(numbers):
        if number in numbers[:position]:
            other = paths[numbers.index(number)]
            raise ConfigurationError(
                f"{other} and {paths[position]} are both of step {number}: leave one out, or name steps= "
                "(--steps)"
            )
    return numbers


def _told(names: Sequence[str]) -> list[int | None]:
    """The number in each name: of "step", or else the last of those that not all begin with."""
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    shared = "".join(letters[0] for letters in alike).rstrip("0123456789") if len(names) > 1 else ""
    found: list[int | None] = []
    for name in names:
        own = name[len(shared) :]
        numbers = _STEP.findall(name) or re.findall(r"\d+", own)
        found.append(int(numbers[-1]) if numbers else None)
    return found


def weight_files(path: Path, *, ema: bool = False) -> list[Path]:
    """The files of weights in a checkpoint, shards included; [] where there are none.

    Raises:
        ConfigurationError: several, of which one must be named.
    """
    if path.is_file():
        return [path] if path.suffix in SUFFIXES else []
    folders = [path / f"{name}_ema" for name in _MODELS] if ema else []
    for folder in (*folders, *(path / name for name in _MODELS), path):
        if held := _in_folder(folder):
            return held
    return []


def _in_folder(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    for name in _NAMES:
        for suffix in SUFFIXES:
            index = folder / f"{name}{suffix}.index.json"
            if index.is_file():
                return [folder / shard for shard in _shards(index)]
            if (folder / f"{name}{suffix}").is_file():
                return [folder / f"{name}{suffix}"]
    others = [
        file
        for file in sorted(folder.iterdir())
        if file.suffix in SUFFIXES and file.is_file() and not _OTHERS.search(file.name)
    ]
    if len(others) > 1:
        raise ConfigurationError(
            f"{folder} holds several files of weights ({', '.join(file.name for file in others[:4])}): name "
            f"one, such as '{folder.parent}/*/{others[0].name}'"
        )
    return others


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"{index} is damaged: it names no shards ({error})") from error
