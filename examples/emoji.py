"""Train a diffusion model on emoji in which faults are planted; find them; ask what made others.

    python examples/emoji.py

Under ten minutes on two CPU cores. The training loop is an ordinary one; the two lines of diffhook are
marked. Everything lands in runs/emoji: images/, the log, page.html, outliers.csv and result.json.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from machine import machine
from openmoji import CATEGORIES
from planting import FAULTS, Collection, emoji, plant
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

import diffhook
from diffhook.analysis.evaluation import detection
from diffhook.analysis.evaluation.estimate import estimate
from diffhook.analysis.execution import Execution
from diffhook.integrations.accelerate import DiffHook
from diffhook.log.samples import name_id
from diffhook.report import write_page

RECORD = Path(__file__).parent / "results" / "emoji.json"
NOISING = DDPMScheduler(num_train_timesteps=1000)
SIBLINGS = 5  # of a held-out member of a family of six
METHODS = ("whitened-retrac", "tracin", "retrac")
FIRST_PAGE = 60  # pictures
_RANKED_BY = {"exact copy": "duplicate", "near copy": "duplicate", "wrong label": "label"}  # else the score


class Pictures(Dataset[dict[str, Any]]):
    """A collection as a training loop wants it: image, class label, and the file's name."""

    def __init__(self, collection: Collection) -> None:
        self.collection = collection
        self.images = tensors(collection.pixels)

    def __len__(self) -> int:
        return len(self.collection)

    def __getitem__(self, index: int) -> dict[str, Any]:
        label = int(self.collection.labels[index])
        return {"image": self.images[index], "class_labels": label, "file_name": self.collection.names[index]}


def tensors(pixels: npt.NDArray[np.uint8]) -> Tensor:
    """(N, 3, H, W) in [−1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def make_model(size: int) -> UNet2DModel:
    """0.9 M parameters, three resolutions, attention at the lowest."""
    return UNet2DModel(
        sample_size=size,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=16,
        num_class_embeds=len(CATEGORIES),
    )


def train(data: Collection, log: Path, epochs: int, batch_size: int) -> UNet2DModel:
    """A plain Accelerate loop."""
    torch.manual_seed(0)
    loader = DataLoader(Pictures(data), batch_size, shuffle=True)
    model = make_model(data.pixels.shape[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    steps = epochs * len(loader)
    rates = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)

    accelerator = Accelerator()
    DiffHook(accelerator, log, thumbnails=32)  # line two of two; the first imports it
    model, optimizer, loader, rates = accelerator.prepare(model, optimizer, loader, rates)

    bar = tqdm(total=steps, desc="training", disable=None)
    for _ in range(epochs):
        for batch in loader:
            noise = torch.randn_like(batch["image"])
            timesteps = torch.randint(0, 1000, (len(noise),), device=noise.device)
            noisy = NOISING.add_noise(batch["image"], noise, timesteps)
            loss = F.mse_loss(model(noisy, timesteps, batch["class_labels"]).sample, noise)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
            bar.update()
    bar.close()
    accelerator.end_training()
    return accelerator.unwrap_model(model)


@torch.no_grad()
def generate(model: UNet2DModel, steps: int = 50) -> dict[str, Tensor]:
    """One picture of each category, sampled with DDIM, as a batch."""
    scheduler = DDIMScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(steps)
    size, device = model.config.sample_size, model.device
    labels = torch.arange(len(CATEGORIES), device=device)
    noise = torch.randn(len(labels), 3, size, size, generator=torch.Generator().manual_seed(7))
    images = noise.to(device)
    for timestep in tqdm(scheduler.timesteps, desc="sampling", disable=None, leave=False):
        images = scheduler.step(model(images, timestep, labels).sample, timestep, images).prev_sample
    return {"image": images.clamp(-1, 1).cpu(), "class_labels": labels.cpu()}


def find(ranking: diffhook.analysis.Ranking, data: Collection) -> dict[str, dict[str, float]]:
    """AUROC and average precision of each kind of fault among the sound pictures, by what is to find it; of
    copies among those without siblings, which are near copies by nature, and not the originals of others;
    without what takes probes, or losses under other labels, where the budget had none."""
    found = {}
    for fault in FAULTS:
        among = np.isin(data.faults, ["", fault])
        if fault.endswith("copy"):
            others = np.array(data.copied)[data.faults != fault]
            among &= (data.families < 0) & ~np.isin(data.names, others)
        kept = [name_id(data.names[i]) for i in np.flatnonzero(among)]
        by = _RANKED_BY.get(fault)
        if by is not None and by not in ranking.signals:
            continue
        scores = ranking.scores if by is None else np.nan_to_num(ranking.signals[by], nan=-np.inf)
        chosen = np.isin(ranking.sample_ids, kept)
        ids, values = ranking.sample_ids[chosen], scores[chosen]
        of_kind = diffhook.analysis.Ranking.sort(ids, values, [[] for _ in ids], fault)
        names = [data.names[i] for i in np.flatnonzero(data.faults == fault)]
        if fault.endswith("copy"):  # of two that are alike, nothing tells which is the copy
            names += [data.copied[i] for i in np.flatnonzero(data.faults == fault)]
        planted = [name_id(name) for name in names]
        result = detection(of_kind, planted)
        first = np.isin(planted, ranking.sample_ids[:FIRST_PAGE]).sum()
        found[fault] = {
            "by": by or "all signals together",
            "auroc": result.auroc,
            "average_precision": result.average_precision,
            "on_first_page": int(first),
            "planted": len(planted),
        }
    return found


def trace(log: diffhook.log.RunLog, data: Collection, asked: Collection) -> dict[str, Any]:
    """Precision@5: how many of a held-out picture's first five are its siblings. Means with bootstrap errors
    over queries; the default method's lead over each other one is taken query by query."""
    family = {name_id(name): number for name, number in zip(data.names, data.families, strict=True)}
    tops = {
        method: np.array([[family[int(sample)] for sample in row] for row in scores.top(SIBLINGS).sample_ids])
        for method in METHODS
        for scores in [diffhook.influence(log, "held-out", method, execution=Execution(progress=True))]
    }
    flat = data.pixels.reshape(len(data), -1).astype(np.float64)
    apart = ((asked.pixels.reshape(len(asked), 1, -1) - flat[None]) ** 2).sum(2)
    tops["pixels"] = data.families[np.argsort(apart, axis=1)[:, :SIBLINGS]]
    shares = {name: (top == asked.families[:, None]).mean(1) for name, top in tops.items()}
    best = shares[METHODS[0]]
    leads = {name: estimate(best - each)._asdict() for name, each in shares.items() if name != METHODS[0]}
    chance = float(np.mean([(data.families == number).mean() for number in asked.families]))
    precision = {name: estimate(each)._asdict() for name, each in shares.items()}
    return {"precision": precision, "lead": leads, "chance": chance, "queries": len(asked)}


def label_shares(log: diffhook.log.RunLog, data: Collection, labels: Tensor) -> dict[str, float]:
    """Of what was generated nothing is known but the category asked for: the share of it in the top 5."""
    of = dict(zip(map(name_id, data.names), data.labels.tolist(), strict=True))
    shares = {}
    for method in METHODS:
        top = diffhook.influence(log, "generated", method).top(SIBLINGS).sample_ids
        own = [
            [of[int(sample)] == label for sample in row]
            for row, label in zip(top, labels.tolist(), strict=True)
        ]
        shares[method] = float(np.mean(own))
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--size", type=int, default=16, help="pixels of a side")
    parser.add_argument("--families", type=int, default=90, help="of six emoji each")
    parser.add_argument("--singles", type=int, default=320, help="emoji without siblings")
    parser.add_argument("--planted", type=int, default=10, help="faults of each kind")
    parser.add_argument("--held-out", type=int, default=40, help="members of families to ask about")
    parser.add_argument("--record", action="store_true", help="keep the result for the README, too")
    args = parser.parse_args()
    began = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)

    sound, asked = emoji(args.families, args.singles, args.held_out, args.size)
    data = plant(sound, args.planted)
    data.save(args.out / "images")
    print(
        f"{len(data):,} emoji in {args.out / 'images'}, {args.planted} of each fault planted. Now: training"
    )
    model = train(data, args.out / "log", args.epochs, args.batch_size)

    log = diffhook.open_log(args.out / "log")
    print("Now: which pictures stand out?")
    ranking = diffhook.outliers(log, execution=Execution(progress=True))
    ranking.to_csv(args.out / "outliers.csv")
    result: dict[str, Any] = {"faults": find(ranking, data), "pictures": len(data)}
    print("Now: what made the held-out and the generated emoji?")
    generated = generate(model)
    held_out = {"image": tensors(asked.pixels), "class_labels": torch.from_numpy(asked.labels)}
    for name, batch in (("held-out", held_out), ("generated", generated)):
        diffhook.query(log, batch, name, batch_size=64, overwrite=True)
    log = diffhook.open_log(args.out / "log")
    result |= {
        "siblings": trace(log, data, asked),
        "generated": label_shares(log, data, generated["class_labels"]),
    }
    print("Now: writing the page")
    pictures = {"held-out": asked.pixels, "generated": generated["image"]}
    title = "diffhook: emoji with planted faults"
    write_page(args.out / "page.html", log, ranking, args.out / "images", queries=pictures, title=title)
    result["seconds"] = round(time.perf_counter() - began, 1)
    result |= {
        "date": date.today().isoformat(),
        "machine": machine(),
        "epochs": args.epochs,
        "size": args.size,
    }
    text = json.dumps(result, indent=1) + "\n"
    (args.out / "result.json").write_text(text)
    if args.record:
        RECORD.write_text(text)
    show(result, args.out)


def show(result: dict[str, Any], out: Path) -> None:
    """The numbers, whatever they turned out to be."""
    print(f"\n{'planted':<12} AUROC   AP      on the first page   found by")
    for fault, found in result["faults"].items():
        page = f"{found['on_first_page']} of {found['planted']}"
        print(
            f"{fault:<12} {found['auroc']:.3f}   {found['average_precision']:.3f}   {page:<19} {found['by']}"
        )
    if missing := [fault for fault in FAULTS if fault not in result["faults"]]:
        print(f"not looked for, since the budget did not afford what finds it: {', '.join(missing)}")
    siblings = result["siblings"]
    print(
        f"\nprecision@5 of siblings, {siblings['queries']} held-out emoji; by chance {siblings['chance']:.3f}"
    )
    for name, found in siblings["precision"].items():
        lead = siblings["lead"].get(name)
        beside = f"   {METHODS[0]} is ahead by {lead['mean']:+.2f} ± {lead['error']:.2f}" if lead else ""
        print(f"  {name:<16} {found['mean']:.2f} ± {found['error']:.2f}{beside}")
    shares = ", ".join(f"{name} {share:.2f}" for name, share in result["generated"].items())
    print(f"\ngenerated emoji: share of the top 5 in the category asked for: {shares}")
    print(f"\n{result['seconds']:.0f} s in all. Now: open {out / 'page.html'}")


if __name__ == "__main__":
    main()
