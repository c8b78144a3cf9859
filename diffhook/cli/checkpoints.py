"""Measure training samples at checkpoints of a training that is over.

Killed or ended, the same command goes on where it was. Started several times at once, the processes share the
work.

example: diffhook checkpoints runs/after --pipeline out/ --checkpoints 'out/checkpoint-*' --data data/
         diffhook checkpoints runs/lora --pipeline models/sd --checkpoints 'lora-*.safetensors' \\
             --data mine/ --captions mine/metadata.jsonl --samples 512
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from diffhook.cli.loss import add_captions, add_loss, named_objective
from diffhook.cli.pipeline import add_pipeline, open_pipeline
from diffhook.cli.printing import print_json
from diffhook.cli.values import integers, numbers
from diffhook.console import announce
from diffhook.errors import ConfigurationError
from diffhook.words import plural

logger = logging.getLogger("diffhook")


def arguments(command: argparse.ArgumentParser) -> None:
    add_pipeline(command, required=True)
    command.add_argument(
        "--checkpoints",
        metavar="PATTERN",
        nargs="+",
        required=True,
        help="folders of diffusers or accelerate, adapter files (LoRA, LoHa, LoKr), or state dicts",
    )
    command.add_argument(
        "--data",
        metavar="PATH",
        required=True,
        help="the training's images: a folder, a saved dataset, or .npy",
    )
    command.add_argument(
        "--samples", type=int, metavar="N", help="measure N of them, evenly spaced (default: all)"
    )
    command.add_argument("--ids", metavar="I,J,…", help="only these samples, by position")
    add_captions(command)

    trained = command.add_argument_group("the training")
    trained.add_argument("--ema", action="store_true", help="take the averaged weights")
    trained.add_argument(
        "--lora-alpha",
        type=float,
        metavar="α",
        help="the α of LoRA files that do not tell it (default: the rank)",
    )
    trained.add_argument(
        "--steps", metavar="S,T,…", help="steps of the checkpoints, where their names do not tell them"
    )
    trained.add_argument(
        "--learning-rates",
        metavar="A,B,…",
        help="each checkpoint's sum since the one before (default: from optimisers' states, or equal)",
    )
    trained.add_argument(
        "--train-batch-size", type=int, default=1, metavar="B", help="scales tracin and retrac scores (1)"
    )
    add_loss(trained)

    grid = command.add_argument_group("the grid (10 × 1 × 2)")
    grid.add_argument("--timesteps", type=int, default=10, metavar="S", help="how many, evenly spaced")
    grid.add_argument("--draws", type=int, default=1, metavar="M", help="noise draws averaged in a row")
    grid.add_argument(
        "--replicates", type=int, default=2, metavar="R", help="rows at each timestep, each of other noise"
    )
    grid.add_argument("--batch-size", type=int, default=32, metavar="B", help="rows of a forward pass (32)")
    grid.add_argument(
        "--projection-dim",
        type=int,
        metavar="D",
        help="length of projections (8192, less where that takes too much room)",
    )


def run(args: argparse.Namespace) -> None:
    from diffhook.capture import Grid, Probe
    from diffhook.capture.checkpoints import find_checkpoints, from_checkpoints

    found = find_checkpoints(args.checkpoints, ema=args.ema, steps=integers(args.steps, "--steps"))
    pipeline = open_pipeline(args)
    pictures = _pictures(args, pipeline)
    named = named_objective(args, pipeline, lambda: pipeline.training_scheduler().config)
    objective = pipeline.objective() if named is None else named
    ids = integers(args.ids, "--ids")
    if ids is not None and args.samples is not None:
        raise ConfigurationError("--ids and --samples both say which samples: give one")
    log = from_checkpoints(
        _model(pipeline, found, args.lora_alpha, args.json),
        found,
        pictures,
        objective,
        args.log,
        probe=Probe(
            args.samples if ids is None else ids,
            Grid(args.timesteps, draws=args.draws, replicates=args.replicates),
            batch_size=args.batch_size,
        ),
        names=pictures.names,
        learning_rates=numbers(args.learning_rates, "--learning-rates"),
        train_batch_size=args.train_batch_size,
        projection_dim=args.projection_dim,
        pipeline=pipeline,
        progress=not args.json,
    )
    steps = [snapshot.step for snapshot in log.snapshots]
    if args.json:
        print_json({"log": log.location, "rows": len(log.probe), "snapshots": steps})
    else:
        print(
            f"{len(log.probe):,} rows at {plural(len(steps), 'checkpoint')}; now: diffhook outliers "
            f"{args.log}, or diffhook query {args.log} --images … --name …"
        )


def _model(pipeline: Any, checkpoints: Any, alpha: float | None, quiet: bool) -> Any:
    """The pipeline's denoiser, with the adapter that the checkpoints are of, or wholly trainable."""
    from diffhook.capture.checkpoints import read_lora
    from diffhook.capture.model.adapter import add_adapters

    model = pipeline.denoiser
    adapters = read_lora(checkpoints[0].files, model, alpha)
    for described in () if quiet else adapters.values():
        announce(
            f"diffhook: adapter of rank {described['r']}, alpha {_alpha(described):g} "
            "(--lora-alpha names another)"
        )
    model.requires_grad_(not adapters)
    add_adapters(model, adapters)
    return model.to(pipeline.device)


def _alpha(described: Mapping[str, Any]) -> float:
    """LoRA calls it otherwise than LoHa and LoKr; 8 is peft's default."""
    return float(described.get("lora_alpha", described.get("alpha", 8)))


def _tell_left_out(pictures: Any) -> None:
    """A stray image beside class folders hides these."""
    orders = getattr(pictures.images, "orders", [()])
    more = max(map(len, orders)) - len(orders[0])
    if more:
        logger.warning(
            "%d images lie in the folder itself, and those alone count: %d more lie in its folders",
            len(orders[0]), more,
        )  # fmt: skip


def _pictures(args: argparse.Namespace, pipeline: Any) -> Any:
    from diffhook.cli.pictures import Pictures, check_readable, folder_labels

    labels = integers(args.class_labels, "--class-labels")
    pictures = Pictures(
        args.data, pipeline.channels, pipeline.size, pipeline, args.captions, args.caption, labels
    )
    _tell_left_out(pictures)
    check_readable(pictures.images)
    if pipeline.classes is not None and labels is None:
        files = [PurePath(name) for name in pictures.names.values()]
        pictures.class_labels = folder_labels(files, pipeline.classes)
    return pictures
