"""Stand-ins for trainers that people use: what is prepared, called, batched and reordered, in our own words.

Read in SimpleTuner, ai-toolkit, musubi-tuner and OneTrainer as of summer 2026. Every one trains for epochs of
four batches, from two buckets of two sizes, with one image repeated and two of them also flipped.
"""

from __future__ import annotations

import multiprocessing
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from diffhook.integrations.accelerate import DiffHook
from diffhook.integrations.torch import TorchHook
from tests.runs import SCHEDULER, TinyDenoiser

BATCH = 2
SMALL, WIDE = (1, 8, 8), (1, 8, 12)


@dataclass
class File:
    """An image on disk, of which the trainers have cached the latent."""

    path: str
    latent: Tensor
    loss_multiplier: float = 1.0


def files() -> list[list[File]]:
    """Two buckets of four entries: three images, one of them twice; and two images, each also flipped."""
    draws = torch.Generator().manual_seed(1)
    small = [File(f"photos/{name}.png", torch.randn(SMALL, generator=draws)) for name in "abc"]
    wide = [File(f"photos/wide/{name}.png", torch.randn(WIDE, generator=draws)) for name in "de"]
    flipped = [File(file.path, file.latent.flip(-1)) for file in wide]
    return [[*small, small[0]], [*wide, *flipped]]


class Low(nn.Module):
    """A low-rank update that takes the place of a frozen layer's forward."""

    def __init__(self, host: Any) -> None:
        super().__init__()
        self.up: nn.Module
        if isinstance(host, nn.Conv2d):
            self.down: nn.Module = nn.Conv2d(host.in_channels, 2, 3, padding=1, bias=False)
            self.up = nn.Conv2d(2, host.out_channels, 1, bias=False)
        else:
            self.down = nn.Linear(host.in_features, 2, bias=False)
            self.up = nn.Linear(2, host.out_features, bias=False)
        self.original = [host.forward]  # in a list: no submodule of ours
        host.forward = self.forward

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.original[0](inputs) + self.up(self.down(inputs))
        return found


@dataclass
class Visit:
    """One micro-batch, and the weights on which it was seen."""

    step: int
    names: list[str]
    weights: dict[str, Tensor]
    inputs: tuple[Tensor, Tensor, Tensor]  # noisy, timesteps, target


class Trainer(ABC):
    """What all of them share.

    Args:
        log: None: without us.
        checkpoint: a folder that an earlier one has saved to: training goes on from there.
    """

    low_rank = True

    def __init__(self, log: Path | None, checkpoint: Path | None = None) -> None:
        torch.manual_seed(0)
        self.unet: Any = TinyDenoiser()
        self.lows = nn.ModuleList()
        if self.low_rank:
            self.unet.requires_grad_(False)
            hosts = [m for m in self.unet.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
            self.lows = nn.ModuleList([Low(host) for host in hosts])
        self.trained: nn.Module = self.lows if self.low_rank else self.unet
        self.optimizer: Any = torch.optim.AdamW(self.trained.parameters(), 1e-2)
        self.visits: list[Visit] = []
        self.steps = 0
        self.set_up(log, checkpoint)

    @abstractmethod
    def set_up(self, log: Path | None, checkpoint: Path | None) -> None:
        """Attach the hook as the recipe says, prepare, and load the checkpoint."""

    @abstractmethod
    def epoch(self, number: int) -> None: ...

    @abstractmethod
    def save(self, folder: Path) -> None: ...

    @abstractmethod
    def end(self) -> None: ...

    def train(self, *epochs: int) -> Trainer:
        for number in epochs:
            torch.manual_seed(100 + number)
            random.seed(number)
            self.epoch(number)
        return self

    def losses(self, noisy: Tensor, timesteps: Tensor, target: Tensor) -> Tensor:
        return (self.unet(noisy, timesteps)[0] - target).square().flatten(1).mean(1)

    def note(self, names: list[str], *inputs: Any) -> None:
        weights = {name: value.clone() for name, value in self.trained.state_dict().items()}
        self.visits.append(Visit(self.steps, list(names), weights, inputs))  # type: ignore[arg-type]

    def expected(self) -> list[tuple[int, str, float, float]]:
        """(step, name, timestep, norm) of each row, by a batch-1 loop in float64; after :meth:`end`."""
        self.unet.double()
        self.lows.double()
        found = []
        for visit in self.visits:
            self.trained.load_state_dict(visit.weights)
            noisy, timesteps, target = visit.inputs
            for row, name in enumerate(visit.names):
                alone = slice(row, row + 1)
                loss = self.losses(noisy[alone].double(), timesteps[alone], target[alone].double()).sum()
                shares = torch.autograd.grad(loss, list(self.trained.parameters()))
                norm = float(torch.cat([share.flatten() for share in shares]).norm())
                found.append((visit.step, name, float(timesteps[row]), norm))
        return sorted(found)


def hooked(log: Path | None, accelerator: Accelerator) -> None:
    """What `diffhook run` does once the trainer has made its Accelerator."""
    if log is not None:
        DiffHook(accelerator, log, projection_dim=0, strict=True, alerts=())


# ── SimpleTuner: unprepared backends, an iterator for every batch ─────────────────────────────────


class _Drawn(Sampler[Any]):
    """Keeps its place from one iterator to the next, and yields whole batches of one bucket."""

    def __init__(self, buckets: list[list[File]]) -> None:
        self.buckets, self.queue = buckets, list[list[File]]()

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[list[File]]:
        while True:
            if not self.queue:
                for bucket in self.buckets:
                    mixed = random.sample(bucket, len(bucket))
                    self.queue += [mixed[start : start + BATCH] for start in range(0, len(mixed), BATCH)]
                random.shuffle(self.queue)
            yield self.queue.pop()


class _Examples(Dataset[Any]):
    """Is asked for samples by themselves, not by number."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, samples: Any) -> dict[str, Any]:
        return {"training_samples": [{"image_path": s.path, "latent": s.latent} for s in samples]}


def _gathered(batch: list[dict[str, Any]]) -> dict[str, Any]:
    examples = batch[0]["training_samples"]
    return {
        "latent_batch": torch.stack([example["latent"] for example in examples]),
        "filepaths": [example["image_path"] for example in examples],
        "prompts": ["a photo"] * len(examples),
        "is_regularisation_data": False,
    }


class SimpleTuner(Trainer):
    low_rank = False

    def set_up(self, log: Path | None, checkpoint: Path | None) -> None:
        self.accelerator = Accelerator(cpu=True)
        hooked(log, self.accelerator)
        self.backends = {
            f"backend-{number}": DataLoader(
                _Examples(), batch_size=1, sampler=_Drawn([bucket]), collate_fn=_gathered
            )
            for number, bucket in enumerate(files())
        }
        first, second = self.backends.values()
        rates = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1.0)
        placement = [True] * 4
        self.unet, rates, self.optimizer, _ = self.accelerator.prepare(
            self.unet, rates, self.optimizer, first, device_placement=placement
        )
        self.accelerator.prepare(second)
        if checkpoint is not None:
            self.accelerator.load_state(str(checkpoint))

    def epoch(self, number: int) -> None:
        for step in range(4):
            batch = self.prepared(next(iter(self.backends[f"backend-{step % 2}"])))
            with self.accelerator.accumulate(self.unet):
                inputs = batch["noisy_latents"], batch["timesteps"], batch["noise"]
                self.note(batch["filepaths"], *inputs)
                self.accelerator.backward(self.losses(*inputs).mean())
                self.accelerator.clip_grad_norm_(self.unet.parameters(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
            self.steps += 1

    def prepared(self, batch: dict[str, Any]) -> dict[str, Any]:
        batch["latents"] = batch["latent_batch"].to(dtype=torch.float32)
        batch["noise"] = torch.randn_like(batch["latents"])
        batch["timesteps"] = torch.multinomial(torch.ones(1000), len(batch["latents"]), replacement=True)
        batch["noisy_latents"] = SCHEDULER.add_noise(batch["latents"], batch["noise"], batch["timesteps"])
        return batch

    def save(self, folder: Path) -> None:
        self.accelerator.save_state(str(folder))

    def end(self) -> None:
        self.accelerator.end_training()


# ── ai-toolkit: an unprepared loader, batches that are objects, and fetched ahead ─────────────────


class _Bucketed(Dataset[Any]):
    """Makes batches itself; the loader joins nothing."""

    def __init__(self, bucket: list[File]) -> None:
        self.bucket = bucket

    def __len__(self) -> int:
        return len(self.bucket) // BATCH

    def __getitem__(self, index: int) -> list[File]:
        return self.bucket[index * BATCH : (index + 1) * BATCH]


class _Transfer:
    """A batch that is no mapping."""

    def __init__(self, file_items: list[File]) -> None:
        self.file_items = file_items
        self.tensor: Tensor | None = None
        self.latents = torch.cat([item.latent.unsqueeze(0) for item in file_items])


class AiToolkit(Trainer):
    def set_up(self, log: Path | None, checkpoint: Path | None) -> None:
        self.accelerator = Accelerator(cpu=True)
        hooked(log, self.accelerator)
        if checkpoint is not None:
            saved = torch.load(checkpoint / "optimizer.pt")
            self.trained.load_state_dict(saved["weights"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.steps = saved["step"]
        self.accelerator.prepare(self.unet)
        self.accelerator.prepare(self.trained)
        self.optimizer = self.accelerator.prepare(self.optimizer)
        self.loader: Any = DataLoader(
            ConcatDataset([_Bucketed(bucket) for bucket in files()]),
            batch_size=None,
            shuffle=True,
            collate_fn=_Transfer,
        )

    def epoch(self, number: int) -> None:
        batches = iter(self.loader)
        for _ in range(2):
            together = [next(batches), next(batches)]  # gradient_accumulation: 2
            with self.accelerator.accumulate([self.unet, self.trained]):
                self.optimizer.zero_grad()
                for batch in together:
                    self.accelerate(batch)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
            self.steps += 1

    def accelerate(self, batch: _Transfer) -> None:
        latents = batch.latents.to(dtype=torch.float32)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (len(latents),))
        weight = torch.tensor([item.loss_multiplier for item in batch.file_items]).mean()
        inputs = SCHEDULER.add_noise(latents, noise, timesteps), timesteps, noise
        self.note([item.path for item in batch.file_items], *inputs)
        self.accelerator.backward(self.losses(*inputs).mean() * weight)

    def save(self, folder: Path) -> None:
        folder.mkdir()
        state = {"weights": self.trained.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save({**state, "step": self.steps}, folder / "optimizer.pt")

    def end(self) -> None:
        self.accelerator.end_training()


# ── musubi-tuner: prepared ready batches without names, reshuffled by the collation ───────────────


class BucketBatchManager:
    def __init__(self, buckets: list[list[File]]) -> None:
        self.buckets, self.batch_size = dict(enumerate(buckets)), BATCH
        self.bucket_batch_indices = [
            (key, i) for key in self.buckets for i in range(len(buckets[0]) // BATCH)
        ]

    def shuffle(self) -> None:
        for bucket in self.buckets.values():
            random.shuffle(bucket)
        random.shuffle(self.bucket_batch_indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        key, number = self.bucket_batch_indices[index]
        own = self.buckets[key][number * BATCH : (number + 1) * BATCH]
        return {"latents": torch.stack([item.latent for item in own]), "timesteps": None}


class NamedBatches(BucketBatchManager):
    """As the recipe has it."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        key, number = self.bucket_batch_indices[index]
        own = self.buckets[key][number * self.batch_size :][: self.batch_size]
        return super().__getitem__(index) | {"item_keys": [item.path for item in own]}


class _Managed(Dataset[Any]):
    def __init__(self, manager: BucketBatchManager) -> None:
        self.manager, self.current_epoch = manager, -1

    def __len__(self) -> int:
        return len(self.manager.bucket_batch_indices)

    def __getitem__(self, index: int) -> Any:
        return self.manager[index]

    def set_current_epoch(self, epoch: int) -> None:
        while self.current_epoch < epoch:
            self.current_epoch += 1
            random.seed(self.current_epoch)
            self.manager.shuffle()


class _Collator:
    """Where a new epoch is told to the dataset, in a worker perhaps: after its first batch was made."""

    def __init__(self, epoch: Any, dataset: _Managed) -> None:
        self.epoch, self.dataset = epoch, dataset

    def __call__(self, examples: list[Any]) -> Any:
        worker = get_worker_info()
        dataset: Any = self.dataset if worker is None else worker.dataset
        dataset.set_current_epoch(self.epoch.value)
        return examples[0]


class Musubi(Trainer):
    manager: Callable[..., BucketBatchManager] = NamedBatches
    workers = 0

    def set_up(self, log: Path | None, checkpoint: Path | None) -> None:
        self.accelerator = Accelerator(cpu=True)
        hooked(log, self.accelerator)
        self.dataset = _Managed(self.manager(files()))
        self.unet = self.accelerator.prepare(self.unet)
        self.current_epoch = multiprocessing.Value("i", -1)
        loader: Any = DataLoader(
            self.dataset,
            batch_size=1,
            shuffle=True,
            collate_fn=_Collator(self.current_epoch, self.dataset),
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
        )
        rates = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1.0)
        self.trained, self.optimizer, self.loader, rates = self.accelerator.prepare(
            self.trained, self.optimizer, loader, rates
        )
        self.unet.eval()
        if checkpoint is not None:
            self.dataset.set_current_epoch(0)
            self.accelerator.load_state(str(checkpoint))

    def epoch(self, number: int) -> None:
        self.current_epoch.value = number  # type: ignore[attr-defined]
        for batch in self.loader:
            latents = batch["latents"]
            names = self.names_of(latents)
            with self.accelerator.accumulate(self.trained):
                noise = torch.randn_like(latents)
                t = torch.rand(len(latents))
                share = t[:, None, None, None]
                inputs = (1 - share) * latents + share * noise, t * 1000 + 1, noise - latents
                self.note(names, *inputs)
                self.accelerator.backward(self.losses(*inputs).mean())
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
            self.steps += 1

    def names_of(self, latents: Tensor) -> list[str]:
        """By what is in them."""
        known = [file for bucket in files() for file in bucket]
        return [next(f.path for f in known if torch.equal(f.latent, latent)) for latent in latents]

    def save(self, folder: Path) -> None:
        self.accelerator.save_state(str(folder))

    def end(self) -> None:
        self.accelerator.end_training()


# ── OneTrainer: no Accelerate, a pipeline of its own, noise by the number of the step ─────────────


class _Pipeline(IterableDataset[Any]):
    def __init__(self) -> None:
        self.epoch = 0

    def start_next_epoch(self) -> None:
        self.epoch += 1

    def __iter__(self) -> Iterator[dict[str, Any]]:
        draws = random.Random(self.epoch)
        batches = []
        for bucket in files():
            mixed = draws.sample(bucket, len(bucket))
            batches += [mixed[start : start + BATCH] for start in range(0, len(mixed), BATCH)]
        draws.shuffle(batches)
        for batch in batches:
            for file in batch:
                yield {"image_path": file.path, "latent_image": file.latent, "loss_weight": 1.0}


class _PipelineLoader(DataLoader[Any]):
    def __init__(self, dataset: _Pipeline) -> None:
        super().__init__(dataset, batch_size=BATCH, drop_last=True)


class OneTrainer(Trainer):
    accumulation = 2

    def set_up(self, log: Path | None, checkpoint: Path | None) -> None:
        self.loader = _PipelineLoader(_Pipeline())
        self.batches = 0  # that is the trainer's global step
        self.hook: Any = None
        if checkpoint is not None:
            saved = torch.load(checkpoint / "backup.pt")
            self.trained.load_state_dict(saved["weights"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.batches, self.steps, self.loader.dataset.epoch = saved["progress"]  # type: ignore[attr-defined]
        if log is not None:
            options = {"projection_dim": 0, "strict": True, "alerts": ()}
            watched = self.unet, self.trained, self.optimizer, self.loader
            self.hook = TorchHook(log, *watched, **options)

    def epoch(self, number: int) -> None:
        self.loader.dataset.start_next_epoch()  # type: ignore[attr-defined]
        for batch in self.loader:
            draws = torch.Generator().manual_seed(self.batches)
            latents = batch["latent_image"] * 1.0
            timesteps = torch.randint(0, 1000, (len(latents),), generator=draws)
            noise = torch.randn(latents.shape, generator=draws)
            inputs = SCHEDULER.add_noise(latents, noise, timesteps), timesteps, noise
            self.note(batch["image_path"], *inputs)
            loss = (self.losses(*inputs) * batch["loss_weight"]).float().mean()
            (loss / self.accumulation).backward()
            self.batches += 1
            if self.batches % self.accumulation == 0:
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                self.steps += 1

    def save(self, folder: Path) -> None:
        folder.mkdir()
        progress = self.batches, self.steps, self.loader.dataset.epoch  # type: ignore[attr-defined]
        state = {"weights": self.trained.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save({**state, "progress": progress}, folder / "backup.pt")

    def end(self) -> None:
        if self.hook is not None:
            self.hook.close()


TRAINERS: dict[str, type[Trainer]] = {
    "SimpleTuner": SimpleTuner,
    "ai-toolkit": AiToolkit,
    "musubi-tuner": Musubi,
    "OneTrainer": OneTrainer,
}
