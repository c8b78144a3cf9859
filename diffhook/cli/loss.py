"""Options that describe the model's training loss and where it computes, of several commands."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from diffhook.errors import ConfigurationError


def add_loss(group: Any) -> None:
    """Options of the loss and the device."""
    group.add_argument(
        "--scheduler",
        metavar="CLASS",
        help="a diffusers scheduler, such as DDPMScheduler, with the betas of the pipeline or the log",
    )
    group.add_argument("--prediction-type", metavar="TYPE", help="epsilon, v_prediction, sample …")
    weights = group.add_mutually_exclusive_group()
    weights.add_argument(
        "--snr-gamma", type=float, metavar="γ", help="the loss had min-SNR weights with this γ"
    )
    weights.add_argument(
        "--weighting",
        metavar="NAME",
        help="the loss had these weights: uniform, sigma_sqrt, cosmap, debiased, preconditioned (σ², "
        "Stable Diffusion 3's default) …",
    )
    group.add_argument("--device", help="where to compute; default: a GPU if there is one")


def add_captions(command: argparse.ArgumentParser) -> None:
    """Options of what the model is told of images."""
    text = command.add_mutually_exclusive_group()
    text.add_argument(
        "--captions", metavar="FILE", help="a caption a line, or .jsonl with file_name and text"
    )
    text.add_argument("--caption", metavar="TEXT", help="one caption for all images")
    command.add_argument(
        "--class-labels", metavar="C,D,…", help="of a class-conditional model: one for each image, or for all"
    )


def named_objective(
    args: argparse.Namespace, pipeline: Any, schedule: Callable[[], Mapping[str, Any]]
) -> Any | None:
    """The loss that the options describe; None where they describe none.

    Args:
        schedule: gives the configuration that a scheduler of another class starts from: its betas.
    """
    from diffhook.capture import DiffusionObjective, MinSNR
    from diffhook.capture.objective.schedulers import make_scheduler

    weighting = args.weighting if args.snr_gamma is None else MinSNR(args.snr_gamma)
    if (args.scheduler, args.prediction_type, weighting) == (None, None, None):
        return None
    if args.scheduler is not None:
        scheduler = make_scheduler(args.scheduler, dict(schedule()))
    elif pipeline is None:
        raise ConfigurationError(
            "--prediction-type, --snr-gamma and --weighting need --scheduler or --pipeline"
        )
    else:
        scheduler = None
    if pipeline is not None:
        return pipeline.objective(scheduler, args.prediction_type, weighting)
    return DiffusionObjective(scheduler, prediction_type=args.prediction_type, weighting=weighting)


def device_of(name: str | None) -> Any:
    """The device of --device.

    Raises:
        ConfigurationError: there is none of that name.
    """
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
        return device
    except (RuntimeError, AssertionError) as error:  # the latter: torch was built without it
        raise ConfigurationError(f"--device {name}: {str(error).splitlines()[0]}") from error
