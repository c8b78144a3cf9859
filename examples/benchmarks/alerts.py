"""Do alerts keep what they promise? False alarms on clean digits, planted samples, and what a bad sink costs.

    python examples/benchmarks/alerts.py [--epochs 5] [--limit 5000]

Prints the findings and saves them to examples/results/alerts.json. About seven minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import digits, patches
from machine import machine
from models import digits_unet

from diffhook import Alerts, open_log
from diffhook.capture import (
    Alert,
    Detector,
    Dominating,
    Drift,
    InputOutlier,
    LossOutlier,
    NormOutlier,
    RepeatedOffender,
)
from diffhook.capture.alerts import Sink
from diffhook.capture.alerts.replay import replayed_steps
from diffhook.integrations.accelerate import DiffHook
from diffhook.log import RunLog

RESULT = Path(__file__).parents[1] / "results" / "alerts.json"
RATE = 1e-3
VISITS = (1, 2, 3, 5)  # within which planted samples are named
PLANTED = 10  # inverted, and as many photographic
FIRST = 5  # steps of a run that are not timed
FLOOD = 1000  # lines for each alert


def train(
    images: np.ndarray, log: Path, epochs: int, alerts: Alerts, seed: int = 0, steps: int | None = None
) -> list[float]:
    """A plain loop that, like many, skips a step whose gradient is not finite. Returns seconds per step."""
    torch.manual_seed(seed)
    loader = DataLoader(TensorDataset(torch.from_numpy(images)[:, None]), 32, shuffle=True)
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    model = digits_unet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    accelerator = Accelerator()
    DiffHook(accelerator, log, projection_dim=0, alerts=alerts, strict=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    seconds: list[float] = []
    began = time.perf_counter()
    for _ in range(epochs):
        for (clean,) in loader:
            noise = torch.randn_like(clean)
            timesteps = torch.randint(0, 1000, (len(clean),))
            loss = F.mse_loss(model(scheduler.add_noise(clean, noise, timesteps), timesteps).sample, noise)
            accelerator.backward(loss)
            if accelerator.clip_grad_norm_(model.parameters(), 1.0).isfinite():
                optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - began)
            began = time.perf_counter()
            if len(seconds) == steps:
                accelerator.end_training()
                return seconds
    accelerator.end_training()
    return seconds


def false_alarms(folder: Path, images: np.ndarray, epochs: int, seed: int) -> list[dict[str, Any]]:
    """Alarms per judgement, before any are held back, on a run in which nothing is wrong."""
    train(images, folder / "clean", epochs, Alerts(detectors=()), seed)
    log = open_log(folder / "clean")
    rows = len(log.train)
    steps = list(replayed_steps(log, 0, most=rows))
    kinds = dict.fromkeys((NormOutlier, LossOutlier, InputOutlier, RepeatedOffender), ("row", rows))
    kinds |= dict.fromkeys((Dominating, Drift), ("step", len(steps)))
    found = []
    for rate in (RATE, 1e-2):
        for kind, (unit, judged) in kinds.items():
            detector = kind(rate)
            alarms = sum(1 for step in steps for _ in detector.look(step))
            row = {"detector": kind.kind, "rate": rate, "per": unit, "judged": judged}
            found.append(row | {"alarms": alarms, "measured": alarms / judged})
    return found


def planted(folder: Path, images: np.ndarray, epochs: int, seed: int) -> dict[str, Any]:
    """At which visit planted samples are named, by whatever alert, in a run as users have it."""
    images = images.copy()
    groups = {
        "NaN pixel": [0],
        "inverted": list(range(1, 1 + PLANTED)),
        "photographic": list(range(1 + PLANTED, 1 + 2 * PLANTED)),
    }
    images[0, 14, 14] = np.nan
    images[groups["inverted"]] *= -1
    images[groups["photographic"]] = patches(PLANTED, np.random.default_rng(seed))
    train(images, folder / "planted", epochs, Alerts(rate=RATE), seed)
    log = open_log(folder / "planted")
    step, sample = log.train["step"], log.train["sample"]
    found: dict[str, Any] = {}
    for name, members in groups.items():
        visits = [_visits_until(log, s, step[sample == s]) for s in members]
        named = {within: sum(v is not None and v <= within for v in visits) for within in VISITS}
        found[name] = {"planted": len(members), "named_within": named, "visits": visits}
    clean = {s for alert in log.alerts() for s in alert["samples"] if s > 2 * PLANTED}
    return {"groups": found, "clean samples named": len(clean), "samples": len(images)}


def _visits_until(log: RunLog, sample: int, steps: np.ndarray) -> int | None:
    """How often a sample had been seen when an alert first named it."""
    first = min((a["step"] for a in log.alerts() if sample in a["samples"]), default=None)
    return None if first is None else int((np.sort(steps) <= first).sum())


class EveryFifthStep(Detector):
    """Raises as many alerts as are let through by default, 20 in 100 steps, evenly."""

    def look(self, rows: Any) -> Iterator[Alert]:
        step = int(rows["step"][0])
        if step % 5 == 0:
            yield Alert("made-up", "warning", [step], step, 0.0, 1.0, 0.0, "an alert that nobody needs")


def hanging(alert: Alert) -> None:
    time.sleep(3600)


def raising(alert: Alert) -> None:
    raise ConnectionError("nobody there")


def flooding(path: Path, alert: Alert) -> None:
    with path.open("a") as file:
        for _ in range(FLOOD):
            print(alert.message, file=file, flush=True)


def bad_sinks(folder: Path, images: np.ndarray, rounds: int, steps: int) -> dict[str, float]:
    """Time of a run with an alert in each fifth step and a bad sink over that of one without a sink.

    In every round one short run of each; the median of the rounds' ratios.
    """
    sinks: dict[str, list[Sink]] = {
        "none": [],
        "hanging": [hanging],
        "raising": [raising],
        "flooding": [partial(flooding, folder / "flood.txt")],
    }
    seconds: dict[str, list[float]] = {name: [] for name in sinks}
    for number in range(rounds):
        names = deque(sinks)
        names.rotate(number)  # another is first each time
        for name in names:
            alerts = Alerts([EveryFifthStep()], sinks[name], timeout=2.0)
            taken = train(images, folder / f"{name}-{number}", 99, alerts, steps=FIRST + steps)
            seconds[name].append(sum(taken[FIRST:]))
    return {
        name: statistics.median(np.divide(seconds[name], seconds["none"]).tolist())
        for name in sinks
        if name != "none"
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--epochs", type=int, default=max(VISITS))
    parser.add_argument("--limit", type=int, default=5000, help="use this many digits")
    parser.add_argument("--rounds", type=int, default=5, help="of runs with and without a bad sink")
    parser.add_argument("--steps", type=int, default=20, help="that are timed of each of these runs")
    parser.add_argument("--seed", type=int, default=10, help="of digits, patches, model and noise")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument(
        "--sinks", action="store_true", help="only those, and keep what --out has of the rest"
    )
    args = parser.parse_args()
    order = np.random.default_rng(args.seed).permutation(5000)[: args.limit]
    images = digits()[0][order]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        result: dict[str, Any] = json.loads(args.out.read_text()) if args.sinks else {}
        if not args.sinks:
            result["false_alarms"] = false_alarms(folder, images, args.epochs, args.seed)
            result["planted"] = planted(folder, images, args.epochs, args.seed)
        result["bad_sinks"] = bad_sinks(folder, images, args.rounds, args.steps)
    result |= {
        "epochs": args.epochs,
        "digits": len(images),
        "seed": args.seed,
        "rate": RATE,
        "date": date.today().isoformat(),
        "machine": machine(),
    }
    for row in result["false_alarms"]:
        print(
            f"{row['detector']:<20} asked {row['rate']:.3f}  raised {row['measured']:.5f} ({row['alarms']})"
        )
    for name, group in result["planted"]["groups"].items():
        named = ", ".join(f"{count} within {visits}" for visits, count in group["named_within"].items())
        print(f"{name:<20} of {group['planted']} named: {named} visits")
    print(f"clean samples named  {result['planted']['clean samples named']}")
    for name, ratio in result["bad_sinks"].items():
        print(f"{name:<20} step time × {ratio:.3f}")
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
