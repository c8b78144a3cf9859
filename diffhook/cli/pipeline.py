"""Options that describe a saved pipeline and what its training chose, of several commands."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from diffhook.cli.loss import device_of
from diffhook.errors import ConfigurationError

TRAINING = ("resolution", "max_sequence_length", "guidance_scale")  #: what no file of a pipeline tells


def add_pipeline(group: Any, *, required: bool = False) -> None:
    """The pipeline, and what no file of it tells."""
    group.add_argument(
        "--pipeline", metavar="DIR", required=required, help="saved pipeline whose model was trained"
    )
    group.add_argument(
        "--resolution",
        type=int,
        metavar="N",
        help="of the training's images, in pixels a side (default: what the model was made for)",
    )
    group.add_argument(
        "--max-sequence-length",
        type=int,
        metavar="N",
        help="tokens of a caption (default: as in diffusers' script)",
    )
    group.add_argument(
        "--guidance-scale",
        type=float,
        metavar="G",
        help="guidance that Flux was told in training (default: 3.5)",
    )


def open_pipeline(args: argparse.Namespace, chosen: Mapping[str, Any] | None = None) -> Any:
    """The :class:`diffhook.SavedPipeline` that the options name, on the device of --device.

    Args:
        chosen: what the log knows of :data:`TRAINING`.

    Raises:
        ConfigurationError: an option says something else.
    """
    from diffhook.capture.model.pipeline import SavedPipeline

    told = {name: getattr(args, name) for name in TRAINING}
    kept = {name: value for name, value in (chosen or {}).items() if name in TRAINING}
    for name, known in kept.items():
        if told[name] not in (None, known):
            raise ConfigurationError(
                f"--{name.replace('_', '-')} is {told[name]}, and the log's samples were measured with "
                f"{'what the model was made for' if known is None else known}: leave it out"
            )
        told[name] = known
    return SavedPipeline(args.pipeline, device_of(args.device), **told)
