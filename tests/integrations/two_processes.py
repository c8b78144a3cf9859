"""Training runs for torchrun: … --nproc-per-node 2 two_processes.py OUT. Writes OUT/found-RANK.json."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from diffhook.capture import Alerts, DiffusionObjective, Grid, Probe
from diffhook.integrations.accelerate import DiffHook
from tests.integrations.given_factors import given_factors
from tests.integrations.test_training_loss import IMAGES, plain
from tests.runs import SCHEDULER, TinyDenoiser, denoising_losses, identified

MANY = torch.cat([IMAGES, -IMAGES, IMAGES.flip(-1)])  # 72 a rank, to recognise the loss by
COLLECTIVES = (
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all", "barrier",
    "broadcast", "broadcast_object_list", "gather", "gather_object", "reduce", "reduce_scatter",
    "reduce_scatter_tensor", "scatter",
)  # fmt: skip


def batch_of(clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With a timestep of its own for every sample."""
    return clean, torch.ones_like(clean), (100 * clean[:, 0, 0, 0] * 16 / 4).long()


def told_loss(model: nn.Module, clean: Tensor, factors: Tensor | None = None) -> Tensor:
    losses = denoising_losses(model, batch_of(clean))
    return losses.mean() if factors is None else (losses * factors[samples(clean)]).mean()


def samples(clean: Tensor) -> Tensor:
    return (clean[:, 0, 0, 0] * 16).round().long()


def train(
    log: Path | None,
    loader: Any,
    accelerator: Accelerator | None = None,
    loss: Callable[[nn.Module, Tensor], Tensor] = told_loss,
    after: Callable[[nn.Module], None] = lambda model: None,
    **options: Any,
) -> list[Tensor]:
    """Everything that training leaves. Ends by close(): end_training would end the process group.

    Args:
        after: called with the model after the last step.
    """
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(0)
    accelerator = accelerator or Accelerator(cpu=True)
    hook = DiffHook(accelerator, log or "none", strict=True, enabled=log is not None, **options)
    model = TinyDenoiser()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        clean = batch["image"] if isinstance(batch, dict) else batch[0]
        accelerator.backward(loss(model, clean))
        optimizer.step()
        optimizer.zero_grad()
    after(model)
    hook.close()
    left = [p.detach().clone() for p in model.parameters()]
    left += [v for s in optimizer.state_dict()["state"].values() for v in s.values()]
    drawn = torch.tensor(random.getstate()[1]), torch.from_numpy(np.random.get_state()[1].astype(np.int64))
    return [*left, torch.get_rng_state(), *drawn]


class Halved:
    """Loads other weights after the last step, as scripts do that save an average: on the first process."""

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> None:
        for parameter in model.parameters() if torch.distributed.get_rank() == 0 else ():
            parameter.mul_(0.5)
        self.weights = [parameter.detach().clone() for parameter in model.parameters()]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([{"image": image, "id": 70 + i} for i, image in enumerate(identified(12))])


def counted(calls: Counter[str]) -> None:
    for name in COLLECTIVES:
        original = getattr(torch.distributed, name)

        def wrapped(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            calls[_name] += 1
            return _original(*args, **kwargs)

        setattr(torch.distributed, name, wrapped)


def probe_options() -> dict[str, Any]:
    """Seven samples on a small grid, at each step."""
    probe = Probe(7, Grid(3, replicates=2), batch_size=2)
    return {"probe": probe, "objective": DiffusionObjective(SCHEDULER), "snapshot_every": 1}


def main(out: Path) -> None:
    calls: Counter[str] = Counter()
    Accelerator(cpu=True)
    counted(calls)
    runs, counts = [], []
    for log in (None, out / "log"):
        calls.clear()
        runs.append(train(log, DataLoader(TensorDataset(identified()), 3), projection_dim="full"))
        counts.append(dict(calls))
    same = all(torch.equal(a, b) for a, b in zip(*runs, strict=True))

    train(out / "probed", DataLoader(TensorDataset(identified()), 3), projection_dim=16, **probe_options())

    many = TensorDataset(MANY)
    train(out / "at-end", DataLoader(many, 6), loss=plain, projection_dim=16)
    halved = Halved()
    loader = DataLoader(many, 6)
    left = train(out / "halved", loader, loss=plain, after=halved, projection_dim=16, snapshot_every=12)
    again = all(torch.equal(a, b) for a, b in zip(left, halved.weights, strict=False))

    damaged = identified(11)  # an odd number: even_batches repeats a sample
    damaged[3, 0, 3, 3] = torch.nan  # rank 1's
    train(out / "damaged", DataLoader(TensorDataset(damaged), 3), projection_dim=0)

    throttled = []
    factors = torch.ones(12).index_fill(0, torch.tensor([2, 7, 8]), 0.25)
    with given_factors({2: 0.25, 7: 0.25, 8: 0.25}):
        for log in (out / "throttled", None):
            loader, alerts = DataLoader(TensorDataset(identified()), 3), Alerts((), (), throttle=True)
            loss = told_loss if log else partial(told_loss, factors=factors)
            throttled.append(train(log, loader, loss=loss, projection_dim=0, alerts=alerts))
    apart = max(float((a - b).abs().max()) for a, b in zip(*throttled, strict=True))

    configuration = DataLoaderConfiguration(dispatch_batches=True)
    dispatching = Accelerator(cpu=True, dataloader_config=configuration)
    train(out / "dispatched", DataLoader(Stream(), 3), dispatching, projection_dim=0)
    rank = dispatching.process_index
    found = {"same": same, "collectives": counts, "apart": apart, "halved again": again}
    (out / f"found-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
