"""Put the committed results into the README: python examples/readme_tables.py [--check]

A block between ``<!-- NAME -->`` and ``<!-- end -->`` is made from examples/results/NAME.json.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def mnist(result: dict[str, Any]) -> str:
    """The example's outcome."""
    found, pull = result["outliers"], result["self_influence_tracin"]
    lines = [
        "| finding the 100 planted samples among 5,042 | AUROC | average precision |",
        "|---|---|---|",
    ]
    for kind, words in (
        ("all", "all"),
        ("patches", "50 photographic patches"),
        ("damaged", "50 damaged digits"),
    ):
        lines.append(
            f"| all signals together: {words} | {found[f'auroc_{kind}']:.3f} | {found[f'ap_{kind}']:.3f} |"
        )
    lines.append(f"| TracIn self-influence: all | {pull['auroc_all']:.3f} | {pull['ap_all']:.3f} |")
    lines += ["", "| influence on 8 + 8 queries, training events | TracIn | ReTrac |", "|---|---|---|"]
    for name in ("held-out", "generated"):
        for words, key in (
            ("top-10 cardinality", "cardinality"),
            ("top-10 with the query's label", "label_share"),
        ):
            values = [f"{result[f'{key}_{name}_{method}']:.3f}" for method in ("tracin", "retrac")]
            lines.append(f"| {words}, {name} digits | {' | '.join(values)} |")
    lines += ["", _provenance(result, "python examples/mnist.py", f", {result['seconds']:.0f} s in all")]
    return "\n".join(lines)


def capture(result: dict[str, Any]) -> str:
    """What per-sample gradients cost."""
    models = result["results"]
    lines = [
        "| time (and peak memory) as multiples of plain forward + backward | "
        + " | ".join(model["title"] for model in models)
        + " |",
        "|---" * (len(models) + 1) + "|",
    ]
    methods = dict.fromkeys(row["method"] for model in models for row in model["rows"])
    for method in methods:
        rows = [next((r for r in model["rows"] if r["method"] == method), None) for model in models]
        lines.append(f"| {method} | {' | '.join('–' if row is None else _cell(row) for row in rows)} |")
    errors = [
        row["error"]
        for model in models
        for row in model["rows"]
        if row["error"] is not None and row["method"].startswith("diffhook")
    ]
    lines += [
        "",
        f"Largest error of a norm of ours against float64: {max(errors):.0e}. "
        + "; ".join(dict.fromkeys(_measured(model) for model in models))
        + ".",
    ]
    return "\n".join(lines)


def _measured(model: dict[str, Any]) -> str:
    return (
        f"`python examples/benchmarks/capture.py`, {model['date']}, {model['machine']}; "
        f"medians of {model['repeats']}"
    )


def _cell(row: dict[str, Any]) -> str:
    if row["ratio"] is None:
        return row["note"].partition(":")[0] or "–"
    memory = "" if row["peak_ratio"] is None else f" ({row['peak_ratio']:.2f})"
    wrong = f", {row['error']:.0%} wrong" if row["error"] is not None and row["error"] > 1e-3 else ""
    return f"{row['ratio']:.2f}{memory}{wrong}"


def quality(result: dict[str, Any]) -> str:
    """What projections and half precision lose."""
    lines = [
        "| rank correlation with exact values over pairs of samples | inner products "
        "| dense projection | cosines | dense projection |",
        "|---|---|---|---|---|",
    ]
    for model in result["results"]:
        for sketch in model["sketches"]:
            values = [
                sketch[who][what] for what in ("inner_products", "cosines") for who in ("ours", "dense")
            ]
            cells = " | ".join(f"{value:.4f}" for value in values)
            lines.append(f"| {model['model']}, D = {sketch['dim']} | {cells} |")
    lines += [
        "",
        "| largest relative error under autocast | norm | autograd's norm | gradient | autograd's |",
        "|---|---|---|---|---|",
    ]
    for model in result["results"]:
        for dtype, errors in model["half"].items():
            names = ("norm", "norm_autograd", "gradient", "gradient_autograd")
            cells = " | ".join(f"{errors[name]:.1e}" for name in names)
            lines.append(f"| {model['model']}, {dtype} | {cells} |")
    samples = result["results"][0]["samples"]
    more = f"; {samples} samples at random timesteps, after {result['results'][0]['steps']} training steps"
    lines += ["", _provenance(result, "python examples/benchmarks/quality.py", more)]
    return "\n".join(lines)


def overhead(result: dict[str, Any]) -> str:
    """What a budget keeps to."""
    return (
        f"Asked to stay within {result['asked']:.0%}, capture of the MNIST example added "
        f"**{result['overhead']:.1%}** to {result['steps']} training steps (its own account: "
        f"{result['told']:.1%}) with a stride of {result['stride']}, calibration and snapshots included. "
        + _provenance(result, "python examples/benchmarks/overhead.py")
    )


def log(result: dict[str, Any]) -> str:
    """How fast the log is written, and what that does to a step."""
    durable, cached, stall = result["write"]["durable"], result["write"]["not_durable"], result["stall"]
    return (
        f"Shards of {result['shard_bytes'] >> 20} MiB are written at **{durable['ratio']:.2f}** of the rate "
        f"of plain files of the same bytes ({durable['log_MB_per_s']:.0f} against "
        f"{durable['plain_MB_per_s']:.0f} MB/s), content and names on the disk on both sides; at "
        f"{cached['ratio']:.2f} where neither side waits for the disk. With {stall['rows_a_step']} rows a "
        f"step, handing them over took **{stall['share_put_mean']:.2%}** of a training step of "
        f"{stall['step_ms']:.0f} ms, {stall['share_put_max']:.2%} at worst, and steps were "
        f"{stall['share_longer']:.1%} longer (± {stall['share_longer_spread']:.1%}) while "
        f"{stall['shards']} shards went to the disk. "
        + _provenance(result, "python examples/benchmarks/log.py", f"; medians of {result['repeats']}")
    )


def memory(result: dict[str, Any]) -> str:
    """Whether memory grows."""
    plain, hooked = result["results"]
    return (
        f"Over {result['steps']:,} steps of a small UNet, the peak of the resident memory grew by "
        f"{plain['bytes_per_step']:,.0f} bytes a step without diffhook and by "
        f"{hooked['bytes_per_step']:,.0f} with it, to {plain['last_quarter_mib']:.0f} and "
        f"{hooked['last_quarter_mib']:.0f} MiB. "
        + _provenance(result, "python examples/benchmarks/memory.py")
    )


def _provenance(result: dict[str, Any], command: str, more: str = "") -> str:
    return f"`{command}`, {result['date']}, {result['machine']}{more}."


TABLES = {
    "mnist": mnist,
    "capture": capture,
    "quality": quality,
    "overhead": overhead,
    "memory": memory,
    "log": log,
}


def fill(readme: str) -> str:
    """The README with every block made anew."""
    for name, table in TABLES.items():
        path = ROOT / "examples" / "results" / f"{name}.json"
        if not path.exists():
            continue  # not measured yet: its block stays empty
        block = f"<!-- {name} -->\n{table(json.loads(path.read_text()))}\n<!-- end -->"
        pattern = rf"<!-- {name} -->.*?<!-- end -->"
        readme, count = re.subn(pattern, lambda _, block=block: block, readme, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"README.md has {count} blocks named {name}; expected 1")
    return readme


def main() -> None:
    path = ROOT / "README.md"
    before = path.read_text()
    after = fill(before)
    if "--check" in sys.argv[1:]:
        sys.exit(0 if before == after else "README.md differs from examples/results: run readme_tables.py")
    path.write_text(after)


if __name__ == "__main__":
    main()
