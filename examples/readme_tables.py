"""Put the committed results into the documents: python examples/readme_tables.py [--check]

A block between ``<!-- NAME -->`` and ``<!-- end -->`` of the README, or of one in examples/evidence or
examples/benchmarks, is made from examples/results/NAME.json.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "evidence"))
import tables as evidence

ROOT = Path(__file__).parent.parent


def emoji(result: dict[str, Any]) -> str:
    """The example's outcome."""
    lines = [
        f"| planted among {result['pictures']:,} emoji | AUROC | average precision | first page | found by |",
        "|---" * 5 + "|",
    ]
    for fault, found in result["faults"].items():
        cells = f"{found['auroc']:.3f} | {found['average_precision']:.3f}"
        page = f"{found['on_first_page']} of {found['planted']}"
        lines.append(f"| {fault} | {cells} | {page} | {found['by']} |")
    siblings = result["siblings"]
    lines += [
        "",
        "| who made a held-out emoji? | precision@5 of its siblings | the default's lead |",
        "|---|---|---|",
    ]
    for name, found in siblings["precision"].items():
        lead = siblings["lead"].get(name)
        ahead = f"{lead['mean']:+.2f} ± {lead['error']:.2f}".replace("-", "−") if lead else "–"
        lines.append(f"| {name} | {found['mean']:.2f} ± {found['error']:.2f} | {ahead} |")
    more = (
        f", {result['seconds']:.0f} s in all; {siblings['queries']} held-out emoji with five siblings each, "
        f"by chance {siblings['chance']:.3f}; errors by bootstrap over them; "
        "copies are sought among emoji without siblings"
    )
    return "\n".join([*lines, "", _provenance(result, "python examples/emoji.py --record", more)])


def capture(result: dict[str, Any], command: str = "capture.py") -> str:
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
        + "; ".join(_measured(models, command))
        + ".",
    ]
    return "\n".join(lines)


def stable_diffusion(result: dict[str, Any]) -> str:
    """What a captured step costs at a size that people train, in a sentence."""
    models = {model["model"]: model for model in result["results"]}
    whole, lora = (models[name] for name in ("sd15_whole", "sd15_lora"))
    (time, memory), (time_of_lora, memory_of_lora) = (
        next(
            (r["ratio"], r["peak_ratio"])
            for r in model["rows"]
            if r["method"].endswith("in step, norms + D = 2048")
        )
        for model in (whole, lora)
    )
    return (
        f"A captured step of Stable Diffusion 1.5's whole UNet (860 M) takes **{time:.2f}** times as long as "
        f"a plain one and {memory:.2f} times its memory; of LoRA on it, **{time_of_lora:.2f}** and "
        f"{memory_of_lora:.2f}. {'; '.join(_measured([whole, lora], 'large.py'))}."
    )


def _measured(models: list[dict[str, Any]], command: str) -> list[str]:
    """By date and machine, over how many passes medians are."""
    repeats: dict[str, set[int]] = {}
    for model in models:
        repeats.setdefault(f"{model['date']}, {model['machine']}", set()).add(model["repeats"])
    return [
        f"`python examples/benchmarks/{command}`, {where}; medians of {' to '.join(map(str, _ends(found)))}"
        for where, found in repeats.items()
    ]


def _ends(values: set[int]) -> list[int]:
    return sorted({min(values), max(values)})


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
            cells = " | ".join(
                _spread(sketch[who], what)
                for what in ("inner_products", "cosines")
                for who in ("ours", "dense")
            )
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
    first = result["results"][0]
    more = f"; {samples} samples at random timesteps, after {first['steps']} training steps"
    if "seeds" in first:
        more += f"; mean ± standard deviation over {first['seeds']} seeds"
    lines += ["", _provenance(result, "python examples/benchmarks/quality.py", more)]
    return "\n".join(lines)


def _spread(found: dict[str, float], what: str) -> str:
    """A mean, and its deviation where there were several seeds."""
    deviation = found.get(f"{what}_std")
    return f"{found[what]:.4f}" + ("" if deviation is None else f" ± {deviation:.4f}")


def overhead(result: dict[str, Any]) -> str:
    """What a budget keeps to."""
    return (
        f"Asked to stay within {result['asked']:.0%}, capture of a UNet on MNIST digits added "
        f"**{result['overhead']:.1%}** to {result['steps']} training steps (its own account: "
        f"{result['told']:.1%}) with a stride of {result['stride']}, calibration, snapshots and the end "
        "included. " + _provenance(result, "python examples/benchmarks/overhead.py")
    )


def launches(result: dict[str, Any]) -> str:
    """What a captured step would ask of a GPU."""
    lines = [
        "| D = 2048 | trained parameters | kernels, plain → captured | operations | bytes | live memory "
        "| time, estimated |",
        "|---" * 7 + "|",
    ]
    for model in result["results"]:
        plain, captured = model["plain"], model["captured"]
        keys = ("operations", "bytes", "peak", "seconds")
        ratios = " | ".join(f"× {captured[key] / plain[key]:.2f}" for key in keys)
        counts = f"{plain['launches']:,} → {captured['launches']:,}"
        lines.append(f"| {model['title']} | {model['trained'] / 1e6:.1f} M | {counts} | {ratios} |")
    kinds = list(dict.fromkeys(kind for model in result["results"] for kind in model["captured"]["kinds"]))
    lines += ["", f"| kernels of ours, and ms | {' | '.join(kinds)} |", "|---" * (1 + len(kinds)) + "|"]
    for model in result["results"]:
        found = [model["captured"]["kinds"].get(kind) for kind in kinds]
        cells = ("–" if each is None else f"{each[0]:,}, {1e3 * each[1]:.1f}" for each in found)
        lines.append(f"| {model['title']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"`python examples/benchmarks/launches.py`, {result['date']}."])


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


def score(result: dict[str, Any]) -> str:
    """What scoring costs, and what it holds."""
    main, growth = result["main"], result["growth"]
    tasks = [name for name in growth[0] if name != "rows"]
    size, ratio = main["bytes"] / 1e9, main["speed_against_numpy_over_shards"]
    columns = " | ".join(f"{task}: time, peak memory" for task in tasks)
    lines = [
        f"The top 10 of 64 queries among {main['rows']:,} rows of D = 2048, {size:.1f} GB, take "
        f"{main['seconds']['diffhook, top 10']:.1f} s; all their scores, **{ratio:.2f} ×** the speed of "
        "numpy that reads the same shards and multiplies.",
        "",
        f"| rows of D = 64, of 10,000 samples | {columns} |",
        "|---" * (1 + len(tasks)) + "|",
    ]
    for row in growth:
        cells = (f"{row[task]['seconds']:.1f} s, {row[task]['peak'] / 1e6:.0f} MB" for task in tasks)
        lines.append(f"| {row['rows']:,} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _provenance(result, "python examples/benchmarks/score.py")])


def alerts(result: dict[str, Any]) -> str:
    """How often alarms are false, how soon what is planted is named, and what a bad sink costs."""
    groups = result["planted"]["groups"]
    rates = sorted({row["rate"] for row in result["false_alarms"]})
    asked = " | ".join(f"asked for {rate:g}" for rate in rates)
    lines = [f"| false alarms of a clean run | {asked} |", "|---" * (1 + len(rates)) + "|"]
    for detector in dict.fromkeys(row["detector"] for row in result["false_alarms"]):
        rows = {row["rate"]: row for row in result["false_alarms"] if row["detector"] == detector}
        cells = " | ".join(f"{rows[rate]['measured']:.5f}" for rate in rates)
        lines.append(f"| {detector}, per {rows[rates[0]]['per']} | {cells} |")
    visits = next(iter(groups.values()))["named_within"]
    heads = " | ".join(f"within {count}" for count in visits)
    lines += ["", f"| planted, named within so many visits | {heads} |", "|---" * (1 + len(visits)) + "|"]
    for name, group in groups.items():
        cells = " | ".join(f"{named} of {group['planted']}" for named in group["named_within"].values())
        lines.append(f"| {name} | {cells} |")
    slowest = max(result["bad_sinks"].values())
    more = (
        f"; {result['digits']:,} digits, {result['epochs']} visits each, planted ones named at a rate of "
        f"{result['rate']:g}; beside a sink that hangs, raises or floods a step takes at most "
        f"{slowest:.3f} times as long"
    )
    return "\n".join([*lines, "", _provenance(result, "python examples/benchmarks/alerts.py", more)])


def page(result: dict[str, Any]) -> str:
    """The report's page: its size, and how long its map takes for a frame."""
    lines = ["| samples, with pictures | file | written in | moved | zoomed |", "|---" * 5 + "|"]
    for row in result["rows"]:
        rates = (
            f"{row[how]['frames_per_second']:.0f}, {row[how]['p95_ms']:.0f}" for how in ("moved", "zoomed")
        )
        lines.append(
            f"| {row['samples']:,} | {row['bytes'] / 1e6:.1f} MB | {row['write_seconds']:.0f} s | "
            f"{' | '.join(rates)} |"
        )
    lines += ["", "Moved, zoomed: frames a second, and the milliseconds that 95% of the frames took at most."]
    told = _provenance(result, "python examples/benchmarks/page.py", ", Chromium without a GPU")
    return "\n".join([*lines, "", told])


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


EVIDENCE = (
    "specificity",
    "own_pictures",
    "bias",
    "tracing",
    "outliers",
    "lds",
    "counterfactual",
    "ablations",
)
TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "emoji": emoji,
    "capture": capture,
    "large": partial(capture, command="large.py"),
    "stable_diffusion": stable_diffusion,
    "quality": quality,
    "overhead": overhead,
    "launches": launches,
    "memory": memory,
    "page": page,
    "alerts": alerts,
    "log": log,
    "score": score,
    **{name: getattr(evidence, name) for name in EVIDENCE},
}
RESULTS = {"stable_diffusion": "large"}  #: blocks whose results have another name
DOCUMENTS = tuple(ROOT / folder / "README.md" for folder in (".", "examples/evidence", "examples/benchmarks"))


def fill(text: str) -> str:
    """A document with every block made anew."""
    return re.sub(r"<!-- (\w+) -->.*?<!-- end -->", lambda found: _block(found[1]), text, flags=re.DOTALL)


def _block(name: str) -> str:
    if name not in TABLES:
        raise SystemExit(f"a block is named {name!r}; there are {', '.join(TABLES)}")
    path = ROOT / "examples" / "results" / f"{RESULTS.get(name, name)}.json"
    if not path.exists():
        return f"<!-- {name} -->\n<!-- end -->"  # not measured yet
    return f"<!-- {name} -->\n{TABLES[name](json.loads(path.read_text()))}\n<!-- end -->"


def main() -> None:
    for path in DOCUMENTS:
        before = path.read_text()
        after = fill(before)
        if "--check" not in sys.argv[1:]:
            path.write_text(after)
        elif before != after:
            sys.exit(f"{path.name} differs from examples/results: run readme_tables.py")
    shown = "".join(path.read_text() for path in DOCUMENTS)
    missing = [name for name in TABLES if f"<!-- {name} -->" not in shown]
    if missing:
        sys.exit(f"no document has a block named {', '.join(missing)}")


if __name__ == "__main__":
    main()
