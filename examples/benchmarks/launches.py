"""What a captured step would ask of a GPU, beside a plain one: counted, and estimated; not measured.

    python examples/benchmarks/launches.py [--models sd15_lora …]

The real engine runs on real diffusers configurations, on meta tensors: kernels, operations, bytes and live
memory of forward and backward are counted, and a roofline with an H100's assumed figures makes a time of
them. Saves examples/results/launches.json, where other models keep their results.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any
from unittest import mock

from configurations import CONFIGURATIONS, Configuration
from counting import Count, Counting, without_values

sys.path.insert(0, str(Path(__file__).parents[1]))

from diffhook.gradients import PerSampleGradients
from diffhook.gradients.accumulator import PassAccumulator

RESULT = Path(__file__).parents[1] / "results" / "launches.json"


@contextmanager
def _by_kind(counting: Counting) -> Iterator[None]:
    """Count what a layer's products and projections cost under the kind of the layer."""
    original = PassAccumulator.add_layer

    def add_layer(accumulator: PassAccumulator, layer: str, *rest: Any) -> None:
        counting.kind = type(accumulator._layers[layer].module).__name__
        original(accumulator, layer, *rest)
        counting.kind = None

    with mock.patch.object(PassAccumulator, "add_layer", add_layer):
        yield


def plain(configuration: Configuration) -> Count:
    """One forward and backward; the second, when gradients have memory."""
    for _ in range(2):
        configuration.model.zero_grad()
        with Counting() as counting:
            configuration.loss().backward()
    return counting.count


def captured(configuration: Configuration, dim: int) -> Count:
    """The same under the engine; the second pass, as the first is checked."""
    engine = PerSampleGradients(configuration.model, projection_dim=dim)
    for _ in range(2):
        configuration.model.zero_grad()
        with Counting() as counting, _by_kind(counting):
            with engine:
                configuration.loss().backward()
            engine.norms, engine.projections  # noqa: B018
    assert engine.coverage.complete, engine.coverage
    return counting.count


def measure(name: str, dim: int = 2048) -> dict[str, Any]:
    configuration = CONFIGURATIONS[name]()
    trained = sum(p.numel() for p in configuration.model.parameters() if p.requires_grad)
    with without_values():
        counts = {"plain": plain(configuration), "captured": captured(configuration, dim)}
    return {
        "name": name,
        "title": configuration.title,
        "trained": trained,
        "dim": dim,
        **{which: asdict(count) for which, count in counts.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    for name in args.models:
        result = measure(name)
        _print(result)
        save(result, args.out)


def _print(result: dict[str, Any]) -> None:
    plain, captured = result["plain"], result["captured"]
    ratios = [
        f"{key} × {captured[key] / plain[key]:.2f}" for key in ("operations", "bytes", "peak", "seconds")
    ]
    counts = f"{result['trained'] / 1e6:7.1f} M  launches {plain['launches']:>6} → {captured['launches']:>6}"
    print(f"{result['title']:<32} {counts}  {'  '.join(ratios)}", flush=True)
    for kind, (launches, seconds) in captured["kinds"].items():
        print(f"    {kind:<20} {launches:>6} launches, {1e3 * seconds:8.2f} ms")


def save(result: dict[str, Any], path: Path) -> None:
    """Write the result, in the order of the configurations; those that were not counted stay."""
    kept = json.loads(path.read_text())["results"] if path.exists() else []
    found = {each["name"]: each for each in [*kept, result]}
    ordered = [found[name] for name in CONFIGURATIONS if name in found]
    document = {"date": date.today().isoformat(), "results": ordered}
    path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
