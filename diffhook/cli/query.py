"""Compute the gradients of images at a run's snapshots, to ask for their influences.

example: diffhook query runs/butterflies --images generated/ --name generated
         diffhook query runs/butterflies --generate 8 --seed 0 --save generated/ --name generated
         diffhook query runs/lora --images mine/ --captions mine.txt --pipeline models/sd --name mine
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from typing import Any

from diffhook.cli.loss import add_captions, add_loss, device_of, named_objective
from diffhook.cli.pipeline import TRAINING, add_pipeline, open_pipeline
from diffhook.cli.printing import print_json
from diffhook.cli.values import integers
from diffhook.errors import ConfigurationError
from diffhook.log import RunLog, open_log
from diffhook.log.schema import differences, json_like
from diffhook.words import plural

logger = logging.getLogger("diffhook")


def arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--name", required=True, help="name of the query set")
    asked = command.add_mutually_exclusive_group(required=True)
    asked.add_argument(
        "--images",
        metavar="PATH",
        help="a folder, or .npy: integers in 0 … 255; floats in [0, 1], or in [−1, 1] if any is negative",
    )
    asked.add_argument("--generate", type=int, metavar="N", help="N images that the model makes")
    command.add_argument("--ids", metavar="I,J,…", help="only these of the images, by position")
    add_captions(command)

    model = command.add_argument_group("the model and its loss, where the log does not hold them")
    add_pipeline(model)
    model.add_argument(
        "--lora", metavar="PATH", help="LoRA, LoHa or LoKr file, or folder with an adapter_config.json"
    )
    add_loss(model)

    made = command.add_argument_group("generated images")
    made.add_argument("--seed", type=int, default=0, metavar="S", help="random seed of the first image (0)")
    made.add_argument("--steps", type=int, default=50, metavar="K", help="denoising steps (50)")
    made.add_argument(
        "--snapshot",
        type=int,
        metavar="STEP",
        help="step of the snapshot that makes them (default: the last)",
    )
    made.add_argument("--save", metavar="DIR", help="write the images to this folder")

    command.add_argument(
        "--preconditioned",
        nargs="?",
        const="full",
        choices=("full", "root"),
        help="divide by Adam's √v̂ + ε, for adam-tracin, adam-retrac; or, both sides, by its root",
    )
    grid = command.add_argument_group("the grid; by default that of the log's probes, or else 20 × 2 × 2")
    grid.add_argument("--timesteps", type=int, metavar="S", help="how many, evenly spaced")
    grid.add_argument("--draws", type=int, metavar="M", help="noise draws averaged in a row")
    grid.add_argument(
        "--replicates", type=int, metavar="R", help="rows at each timestep, each of other noise"
    )
    grid.add_argument(
        "--against",
        choices=("train", "probe", "both"),
        help="the rows they will be set against: the training's own, which need noise of the query's own; or "
        "probes, which share theirs with the query (default: those that the log holds)",
    )
    grid.add_argument("--batch-size", type=int, default=32, metavar="B", help="rows of a forward pass (32)")
    command.add_argument("--overwrite", action="store_true", help="replace other queries of that name")


def run(args: argparse.Namespace) -> None:
    from diffhook.queries.query import query
    from diffhook.queries.rebuilt import build_model

    log = open_log(args.log)
    device = device_of(args.device)
    pipeline = _pipeline(log, args)
    pictures = _pictures(log, args, pipeline) if args.images else None  # before a model is built
    objective = _objective(log, args, pipeline)
    model = build_model(log, pipeline, args.lora).to(device)
    details: dict[str, Any]
    if pictures is not None:
        samples, details = pictures, {"images": args.images}
    else:
        samples, details = _generated(log, args, pipeline, objective, model)
    table = query(
        log,
        samples,
        args.name,
        objective,
        ids=integers(args.ids, "--ids"),
        model=model,
        pipeline=pipeline,
        grid=_grid(log, args),
        against=("train", "probe") if args.against == "both" else args.against,
        preconditioned="root" if args.preconditioned == "root" else bool(args.preconditioned),
        batch_size=args.batch_size,
        overwrite=args.overwrite,
        details=details,
    )
    count = len(set(table["sample"].tolist()))
    steps = sorted(set(table["step"].tolist()))
    done = {"name": args.name, "queries": count, "snapshots": steps, **details}
    if args.json:
        print_json(done)
    else:
        print(
            f"{count:,} {'query' if count == 1 else 'queries'} at {plural(len(steps), 'snapshot')}; now: "
            f"diffhook influence {args.log} --queries {args.name}"
            + (" --method adam-retrac" if args.preconditioned == "full" else "")
        )


def _grid(log: RunLog, args: argparse.Namespace) -> Any:
    from diffhook.queries.query import default_grid

    named = {name: getattr(args, name) for name in ("timesteps", "draws", "replicates")}
    return replace(default_grid(log), **{name: value for name, value in named.items() if value is not None})


def _pipeline(log: RunLog, args: argparse.Namespace) -> Any:
    if args.pipeline is None:
        for option in ("lora", "captions", "caption", *TRAINING):
            if getattr(args, option) is not None:
                raise ConfigurationError(f"--{option.replace('_', '-')} needs --pipeline")
        return None
    return open_pipeline(args, log.config["identity"].get("pipeline"))


def _objective(log: RunLog, args: argparse.Namespace, pipeline: Any) -> Any:
    """The log's, unless the command line describes another, which is told."""
    from diffhook.queries.rebuilt import build_objective

    named = named_objective(args, pipeline, lambda: _schedule(log, pipeline))
    if named is None:
        return build_objective(log, pipeline)
    known = log.objective
    if known is not None and (others := list(differences(known, json_like(named.describe())))):
        logger.warning("the query is asked with another loss than the log's: %s", "; ".join(others))
    return named


def _schedule(log: RunLog, pipeline: Any) -> dict[str, Any]:
    """The configuration that a scheduler of another class starts from: its betas."""
    if pipeline is not None:
        return dict(pipeline.training_scheduler().config)
    return (log.objective or {}).get("scheduler_config", {})


def _pictures(log: RunLog, args: argparse.Namespace, pipeline: Any) -> Any:
    from diffhook.cli.pictures import Pictures, check_readable, model_format

    channels, size = model_format(log) if pipeline is None else (pipeline.channels, pipeline.size)
    labels = integers(args.class_labels, "--class-labels")
    pictures = Pictures(args.images, channels, size, pipeline, args.captions, args.caption, labels)
    check_readable(pictures.images)
    return pictures


def _generated(
    log: RunLog, args: argparse.Namespace, pipeline: Any, objective: Any, model: Any
) -> tuple[Any, dict[str, Any]]:
    from diffhook.cli.pictures import one_each, read_captions, save_pictures
    from diffhook.queries.generated import generate

    captions = [args.caption] * args.generate if args.caption is not None else None
    if args.captions is not None:
        captions = read_captions(args.captions, args.generate)
    labels = integers(args.class_labels, "--class-labels")
    made = generate(
        log,
        args.generate,
        seed=args.seed,
        steps=args.steps,
        captions=captions,
        class_labels=None if labels is None else one_each(labels, args.generate),
        objective=objective,
        model=model,
        pipeline=pipeline,
        step=args.snapshot,
    )
    if args.save is not None:
        save_pictures(args.save, made.images)
    return made.batch, dict(made.details)
