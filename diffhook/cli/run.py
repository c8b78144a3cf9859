"""Run a training script with the hook on its Accelerator; the script stays as it is.

example: diffhook run --log runs/butterflies train.py --its --own arguments
         accelerate launch -m diffhook.run --log runs/butterflies train.py --its --own arguments
         torchrun --nproc-per-node 2 -m diffhook.run -l runs/butterflies train.py --its --own arguments
         (torchrun would take --log for an abbreviation of its own --log-dir)
"""

from __future__ import annotations

import argparse
from importlib import import_module

import diffhook


def arguments(command: argparse.ArgumentParser) -> None:
    _add_log(command)
    _add_capture(command)
    _add_training(command)
    command.add_argument("-m", "--module", action="store_true", help="SCRIPT is a module, as with python -m")
    command.add_argument("script", metavar="SCRIPT")
    command.add_argument(
        "script_arguments", nargs=argparse.REMAINDER, metavar="...", help="its own arguments"
    )


def _add_log(command: argparse.ArgumentParser) -> None:
    """What the log holds of a row, a snapshot and a sample."""
    command.add_argument("-l", "--log", required=True, metavar="LOG", help="a folder or URL to write")
    command.add_argument(
        "--projection-dim",
        type=dimension,
        metavar="D",
        help='length of projections (8192, less for large datasets); 0: norms only; "full": whole gradients',
    )
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of the projection (0)")
    command.add_argument(
        "--snapshot-dtype",
        choices=("float16", "bfloat16"),
        help="keep the parameters in snapshots in half precision",
    )
    command.add_argument(
        "--keep-preconditioner", action="store_true", help="snapshots also hold Adam's 1/(√v̂ + ε)"
    )
    command.add_argument(
        "--thumbnails",
        type=int,
        default=0,
        metavar="PIXELS",
        help="keep an image of each sample, at most so wide or high (0: none)",
    )


def _add_capture(command: argparse.ArgumentParser) -> None:
    """Which samples, modules and steps are measured."""
    command.add_argument("--sample-ids", metavar="KEY", help="key of the batch that holds sample ids")
    command.add_argument(
        "--layers",
        metavar="NAME",
        action="append",
        help="only modules of this name count, * for any part of it; may be repeated",
    )
    command.add_argument("--every", type=int, metavar="N", help="capture one optimiser step in N")
    command.add_argument(
        "--overhead",
        type=float,
        metavar="SHARE",
        help="of the training time that all of it may add (default: 0.1, and 5 min on top)",
    )
    command.add_argument("--snapshot-every", type=int, metavar="N", help="optimiser steps between snapshots")
    probes = command.add_mutually_exclusive_group()
    probes.add_argument("--probe", type=int, metavar="N", help="probe N of the samples at each snapshot")
    probes.add_argument("--no-probe", action="store_true", help="probe nothing, not even at the end")


def _add_training(command: argparse.ArgumentParser) -> None:
    """What the training and its trackers see of it."""
    command.add_argument(
        "--table-every", type=int, metavar="N", help="optimiser steps between tables of samples in trackers"
    )
    command.add_argument(
        "--throttle",
        action="store_true",
        help="let samples whose losses stay far above others' count less in the training",
    )
    command.add_argument(
        "--reuse-products",
        action="store_true",
        help="cheaper for most models; the training then differs by rounding",
    )
    command.add_argument(
        "--workspace", type=int, metavar="BYTES", help="of per-sample products that may be alive at once"
    )
    command.add_argument("--strict", action="store_true", help="let an error of diffhook's end the run")


def run(args: argparse.Namespace) -> None:
    # By name: nothing under integrations/ is imported unless a training is to be watched.
    launcher = import_module("diffhook.integrations.launcher")
    names = (
        "projection_dim", "seed", "every", "overhead", "snapshot_every", "snapshot_dtype",
        "keep_preconditioner", "sample_ids", "thumbnails", "layers", "reuse_products", "workspace", "strict",
        "table_every",
    )  # fmt: skip
    settings = {name: getattr(args, name) for name in names}
    if args.probe is not None:
        settings["probe"] = diffhook.Probe(args.probe)
    elif args.no_probe:
        settings["probe"] = False
    if args.throttle:
        settings["alerts"] = diffhook.Alerts(throttle=True)
    launcher.launch(args.script, args.script_arguments, args.log, module=args.module, **settings)


def dimension(text: str) -> int | str:
    """A projection dimension, by the name that argparse gives it in messages."""
    return text if text == "full" else int(text)
