"""What the report's page weighs, and how long its map takes for a frame.

    python examples/benchmarks/page.py [--samples 1000 10000] [--out FOLDER]

Writes the page of a synthetic log whose samples have photographs, opens it in a headless Chromium without a
GPU, moves and zooms the map for some seconds, and prints the time from frame to frame. Saves the table to
examples/results/page.json, and with --out the pages.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from playwright.sync_api import sync_playwright
from sklearn.datasets import load_sample_images

from diffhook.analysis.execution import Execution
from diffhook.log import LogWriter, RunLog, open_log
from diffhook.report import write_page

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import machine

RESULT = Path(__file__).parents[1] / "results" / "page.json"
DIM, VISITS, GROUPS, SIDE = 64, 2, 40, 96
_FLAGS = ("--no-sandbox", "--disable-gpu")

# Moves or zooms by a little in each frame, as a hand does, and gives the milliseconds between frames.
_MOVE = """async (zooms) => {
  const stage = document.getElementById("stage"), times = [];
  const press = (key) => stage.dispatchEvent(new KeyboardEvent("keydown", { key }));
  const frame = () => new Promise(requestAnimationFrame);
  press("0");
  for (let n = 0; n < (zooms ? 0 : 3); n++) press("+");
  let before = await frame();
  for (let n = 0; n < 180; n++) {
    const back = Math.floor(n / 15) % 2;
    if (zooms) press(back ? "-" : "+");
    else press(back ? "ArrowLeft" : "ArrowRight");
    const now = await frame();
    times.push(now - before);
    before = now;
  }
  return times;
}"""


def make_log(path: Path, samples: int) -> RunLog:
    """Gradients in groups that overlap; one in fifty far out."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((GROUPS, DIM))
    sample = np.tile(np.arange(samples), VISITS)
    own = centres[rng.integers(0, GROUPS, samples)] + 0.7 * rng.standard_normal((samples, DIM))
    projection = own[sample] + rng.standard_normal((len(sample), DIM))
    projection /= np.linalg.norm(projection, axis=1, keepdims=True)
    ones = np.ones(len(sample), np.float32)
    norm = np.exp(rng.normal(0, 0.3, len(sample))) * np.where(sample % 50 == 7, 20, 1)
    kind = {"dim": DIM, "seed": 0, "kind": "sketch"}
    identity = {"projection": kind, "parameters": [], "model": {"class": "none"}, "objective": None}
    writer = LogWriter(path, {"identity": identity})
    rows = {
        "sample": sample, "step": np.arange(len(sample)) // 32, "timestep": rng.uniform(0, 1000, len(sample)),
        "noise_seed": np.full(len(sample), -1), "lr": ones, "loss": rng.random(len(sample)), "weight": ones,
        "grad_norm": norm, "projection": projection.astype(np.float16),
    }  # fmt: skip
    for start in range(0, len(sample), 2048):
        writer.put("train", {name: column[start : start + 2048] for name, column in rows.items()})
    writer.close()
    return open_log(path)


def photographs(count: int) -> npt.NDArray[np.uint8]:
    """(count, SIDE, SIDE, 3) pieces of scikit-learn's two photographs, no two alike."""
    rng = np.random.default_rng(1)
    photos = load_sample_images().images
    pieces = np.empty((count, SIDE, SIDE, 3), np.uint8)
    for piece in pieces:
        photo = photos[rng.integers(len(photos))]
        top, left = (rng.integers(side - SIDE) for side in photo.shape[:2])
        piece[:] = photo[top : top + SIDE, left : left + SIDE]
    return pieces


def frames(page: Path) -> dict[str, list[float]]:
    """Milliseconds between frames while the map is moved, and while it is zoomed."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=list(_FLAGS))
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.goto(page.as_uri())
        tab.locator("#stage").scroll_into_view_if_needed()
        tab.wait_for_timeout(1000)
        taken = {name: tab.evaluate(_MOVE, zooms) for name, zooms in (("moved", False), ("zoomed", True))}
        browser.close()
    return taken


def measure(samples: int, folder: Path) -> dict[str, Any]:
    log, pictures = make_log(folder / f"log-{samples}", samples), photographs(samples)
    page = folder / f"page-{samples}.html"
    began = time.perf_counter()
    size = write_page(
        page, log, images=lambda sample: pictures[sample], queries={}, execution=Execution(progress=False)
    )
    result: dict[str, Any] = {
        "samples": samples,
        "bytes": size,
        "write_seconds": round(time.perf_counter() - began, 1),
    }
    for name, times in frames(page).items():
        tenths = statistics.quantiles(times, n=20)
        result[name] = {
            "median_ms": round(statistics.median(times), 1),
            "p95_ms": round(tenths[-1], 1),
            "worst_ms": round(max(times), 1),
            "frames_per_second": round(1000 * len(times) / sum(times), 1),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--out", type=Path, help="keep the pages here")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for samples in args.samples:
            rows.append(measure(samples, folder))
            print(json.dumps(rows[-1]))
    result = {"date": date.today().isoformat(), "machine": machine(), "rows": rows}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
