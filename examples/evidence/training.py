"""The small model of the experiments, trained by an ordinary Accelerate loop, with or without the hook."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from mlp import MLP
from sources import Samples
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

import diffhook
from diffhook.capture.objective.noise import noise_seed
from diffhook.integrations.accelerate import DiffHook

Ids = npt.NDArray[np.int64]
NOISING = DDPMScheduler(num_train_timesteps=1000)
LOSS = diffhook.DiffusionObjective(NOISING)


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Attributes:
        epochs: passes over whatever it is trained on.
        constant: whether the learning rate is; otherwise it rises to ``rate`` and falls to 0, in one cycle.
        widths: channels at each resolution; attention at the lowest.
        snapshots: of the trainable parameters in a watched run, evenly spaced.
        mlp: hidden width of an MLP in the UNet's place.
        dim: D of a watched run; None: the usual.
        paired: whether what a sample draws, its timesteps and noise, is of the seed, the epoch and the sample
            alone, so that leaving others out does not change it. Not in watched runs.
    """

    epochs: int
    batch: int = 32
    rate: float = 2e-3
    constant: bool = False
    widths: tuple[int, ...] = (16, 32, 32)
    snapshots: int = 4
    mlp: int | None = None
    dim: int | None = None
    paired: bool = False

    def quick(self) -> Recipe:
        """A training of seconds, which shows that an experiment runs."""
        small = 16 if self.mlp else None
        return replace(self, epochs=2, batch=16, widths=(8, 16), snapshots=2, mlp=small, dim=128)


class Training(Dataset[dict[str, Tensor]]):
    """Samples as a training loop wants them: ``images``, and ``class_labels`` where they have labels."""

    def __init__(self, samples: Samples) -> None:
        self.tensors = samples.batch()

    def __len__(self) -> int:
        return len(self.tensors["images"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[index] for name, values in self.tensors.items()}


class Order(torch.utils.data.Sampler[int]):
    """Samples in an order of each epoch's own, which leaving some of them out does not change."""

    def __init__(self, ids: Ids, seed: int) -> None:
        self.ids, self.seed, self.epoch = np.asarray(ids), seed, 0

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Any:
        self.epoch += 1
        keys = np.random.default_rng((self.seed, self.epoch)).random(int(self.ids.max()) + 1)
        return iter(self.ids[np.argsort(keys[self.ids])].tolist())


def make_model(samples: Samples, recipe: Recipe) -> nn.Module:
    """A UNet of 0.2 M parameters at the default widths, or an MLP."""
    if recipe.mlp:
        return MLP(samples.images.shape[1:], recipe.mlp, samples.classes)
    channels, size = samples.images.shape[1:3]
    levels = len(recipe.widths) - 1
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=recipe.widths,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * levels + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * levels,
        norm_num_groups=8,
        attention_head_dim=16,
        num_class_embeds=samples.classes,
    )


def train(
    samples: Samples,
    recipe: Recipe,
    *,
    seed: int,
    ids: Ids | None = None,
    log: Path | None = None,
    progress: bool = True,
    **options: Any,
) -> nn.Module:
    """A model trained on the samples with the given ids (by default all); watched where there is a log.

    A log that an earlier run finished is taken up: the model is that of its last snapshot.

    Args:
        options: of the hook.
    """
    torch.manual_seed(seed)
    model = make_model(samples, recipe)
    if log is not None and finished(log, recipe):
        return restored(model, log)
    order = Order(np.arange(len(samples)) if ids is None else ids, seed)
    steps = recipe.epochs * -(-len(order) // recipe.batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, fused=True)
    rates = _rates(optimizer, recipe, steps)
    bar = tqdm(total=steps, desc="training", disable=None if progress else True, leave=False)
    with bar:
        training = _Training(samples, recipe, model, order, optimizer, rates, bar)
        return training.plain() if log is None else training.watched(log, options)


def finished(path: Path, recipe: Recipe) -> bool:
    """Whether an earlier run left a whole log."""
    return path.exists() and len(diffhook.open_log(path).snapshots) == recipe.snapshots


def restored(model: nn.Module, path: Path) -> nn.Module:
    """The model with the parameters of a log's last snapshot, which is that of the training's end."""
    model.load_state_dict(safetensors.torch.load(diffhook.open_log(path).snapshots[-1].parameters()))
    return model


@dataclass
class _Training:
    """One that is ready to begin."""

    samples: Samples
    recipe: Recipe
    model: nn.Module
    order: Order
    optimizer: torch.optim.Optimizer
    rates: Any
    bar: Any

    def watched(self, log: Path, options: dict[str, Any]) -> nn.Module:
        AcceleratorState._reset_state(reset_partial_state=True)  # many trainings in one process
        accelerator = Accelerator()
        apart = max(self.bar.total // self.recipe.snapshots, 1)
        # Every step, and no probe unless asked for: not what a budget makes of them.
        options = {"projection_dim": self.recipe.dim, "every": 1, "probe": False, **options}
        DiffHook(accelerator, log, snapshot_every=apart, alerts=(), strict=True, **options)
        loader = DataLoader(Training(self.samples), batch_size=self.recipe.batch, sampler=self.order)
        prepared = accelerator.prepare(self.model, self.optimizer, loader, self.rates)
        model, optimizer, loader, rates = prepared
        for _ in range(self.recipe.epochs):
            for batch in loader:
                accelerator.backward(_loss(model, batch, *_drawn(batch["images"])))
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                rates.step()
                optimizer.zero_grad()
                self.bar.update()
        accelerator.end_training()
        trained: nn.Module = accelerator.unwrap_model(model)
        return trained

    def plain(self) -> nn.Module:
        """The same steps without Accelerate and a DataLoader, which take as long as the MLP itself."""
        tensors, model = self.samples.batch(), self.model
        for epoch in range(self.recipe.epochs):
            drawn = self._paired(epoch, tensors["images"]) if self.recipe.paired else None
            for ids in torch.tensor(list(self.order)).split(self.recipe.batch):
                batch = {name: values[ids] for name, values in tensors.items()}
                own = [values[ids] for values in drawn] if drawn else _drawn(batch["images"])
                _loss(model, batch, *own).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                self.optimizer.step()
                self.rates.step()
                self.optimizer.zero_grad()
                self.bar.update()
        return model

    def _paired(self, epoch: int, images: Tensor) -> tuple[Tensor, Tensor]:
        """What every sample draws in an epoch, whether or not it is trained on."""
        seed = noise_seed(self.order.seed, 0.0, epoch)
        return _drawn(images, torch.Generator().manual_seed(seed))


def _rates(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int) -> Any:
    if recipe.constant:
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, steps, pct_start=0.1)


def _drawn(clean: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Noise like the images, and (B,) timesteps."""
    noise = torch.randn(clean.shape, generator=generator, device=clean.device)
    return noise, torch.randint(0, 1000, (len(clean),), generator=generator, device=clean.device)


def _loss(model: nn.Module, batch: dict[str, Tensor], noise: Tensor, timesteps: Tensor) -> Tensor:
    clean = batch["images"]
    predicted = model(NOISING.add_noise(clean, noise, timesteps), timesteps, batch.get("class_labels"))
    return F.mse_loss(predicted.sample, noise)


@torch.no_grad()
def losses(model: nn.Module, asked: Samples, timesteps: int = 16, draws: int = 4) -> npt.NDArray[np.float64]:
    """(Q,) the denoising loss of each query over a grid of timesteps, with the same noise for every model."""
    count = len(asked)
    batch = {name: values.repeat_interleave(draws, 0) for name, values in asked.batch().items()}
    model.eval()
    total = torch.zeros(count, dtype=torch.float64)
    for t in np.linspace(1, 999, timesteps).round().astype(int).tolist():
        seeds = torch.tensor([noise_seed(10_000, t, draw) for draw in range(draws)]).repeat(count)
        found = LOSS(model, batch, torch.full((count * draws,), t), seeds)
        total += found.double().view(count, draws).mean(1)
    return (total / timesteps).numpy()


@torch.no_grad()
def generate(
    model: nn.Module, like: Samples, count: int, seed: int = 7, steps: int = 50, ancestral: bool = False
) -> Samples:
    """Samples made with DDIM, or with DDPM; of each class in turn, where the model knows classes."""
    scheduler = (DDPMScheduler if ancestral else DDIMScheduler)(num_train_timesteps=1000)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn((count, *like.images.shape[1:]), generator=generator)
    labels = None if like.classes is None else torch.arange(count) % like.classes
    arguments = {} if labels is None else {"class_labels": labels}
    drawing = {"generator": generator} if ancestral else {}
    model.eval()
    for timestep in scheduler.timesteps:
        predicted = model(images, timestep, **arguments).sample
        images = scheduler.step(predicted, timestep, images, **drawing).prev_sample
    return Samples(images.clamp(-1, 1).numpy(), None if labels is None else labels.numpy(), like.classes)
