"""Compute the gradients of images at a run's snapshots, to ask for their influences.

example: diffhook query runs/butterflies --images generated/ --name generated
"""

from __future__ import annotations

import argparse
from typing import Any

from diffhook.cli.printing import print_json
from diffhook.errors import ConfigurationError
from diffhook.log import RunLog, open_log
from diffhook.report.images import load_images, to_image


def arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--images", required=True, metavar="PATH", help="a folder or .npy array")
    command.add_argument("--name", required=True, help="name of the query set")
    command.add_argument(
        "--scheduler",
        metavar="CLASS",
        help="a diffusers scheduler, such as DDPMScheduler, where the log records no training loss",
    )
    command.add_argument("--timesteps", type=int, default=10, metavar="S", help="default 10")
    command.add_argument("--draws", type=int, default=4, metavar="M", help="noise draws per timestep (4)")
    command.add_argument("--batch-size", type=int, default=32, metavar="B", help="rows of a forward (32)")
    command.add_argument("--overwrite", action="store_true", help="replace queries of that name")


def run(args: argparse.Namespace) -> None:
    from diffhook.analysis.query import query
    from diffhook.capture import Grid

    log = open_log(args.log)
    objective = _objective(log, args.scheduler)
    samples = _tensor(log, args.images)
    query(
        log,
        samples,
        args.name,
        objective,
        grid=Grid(args.timesteps, args.draws),
        batch_size=args.batch_size,
        overwrite=args.overwrite,
    )
    done = {"name": args.name, "queries": len(samples), "snapshots": [s.step for s in log.snapshots]}
    if args.json:
        print_json(done)
    else:
        print(
            f"{len(samples)} queries at {len(done['snapshots'])} snapshots; now: "
            f"diffhook influence {args.log} --queries {args.name}"
        )


def _objective(log: RunLog, scheduler: str | None) -> Any:
    from diffhook.capture import DiffusionObjective
    from diffhook.capture.diffusion import make_scheduler

    described = log.config["identity"]["objective"]
    if scheduler is not None:
        return DiffusionObjective(make_scheduler(scheduler, {}))
    if described is None:
        raise ConfigurationError(
            "the log does not record the training loss: name its scheduler with --scheduler, or call "
            "diffhook.query(..., objective=...)"
        )
    return DiffusionObjective.from_description(described)


def _tensor(log: RunLog, path: str) -> Any:
    """(Q, C, H, W) float32 in [−1, 1], of the model's size and channels."""
    import numpy as np
    import torch

    config = log.config["identity"]["model"].get("config", {})
    channels, size = config.get("in_channels"), config.get("sample_size")
    if channels not in (1, 3) or not isinstance(size, int):
        raise ConfigurationError(
            f"the model takes {channels} channels of size {size}, which images are not: call "
            "diffhook.query(...) with its inputs"
        )
    arrays = []
    for image in load_images(path):
        picture = to_image(image).convert("L" if channels == 1 else "RGB").resize((size, size))
        arrays.append(np.asarray(picture, np.float32).reshape(size, size, channels) / 127.5 - 1)
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
