"""Training of sharded models, for torchrun: … two_sharded.py OUT. Writes OUT/found-RANK.json."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from diffhook.gradients.accumulator import PassAccumulator
from diffhook.integrations.accelerate import DiffHook
from tests.integrations.two_processes import counted, told_loss
from tests.runs import TinyDenoiser, identified

KEPT: dict[str, Any] = {"projection_dim": "full", "snapshot_every": 2}


class Gate(nn.Module):
    """A block of a bare parameter, which its last operation uses, and of a layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Conv2d(channels, channels, 3, padding=1)
        self.gate = nn.Parameter(torch.linspace(0.5, 1.5, channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x + self.inner(x)) * self.gate[:, None, None]


class GatedDenoiser(nn.Module):
    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.config = {"channels": channels}
        self.time = nn.Linear(2, channels)
        self.inward = nn.Conv2d(1, channels, 3, padding=1)
        self.blocks = nn.ModuleList(Gate(channels) for _ in range(2))
        self.outward = nn.Conv2d(channels, 1, 3, padding=1)
        self.shift = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> Any:
        angle = timestep.to(sample.dtype)[:, None] / 100
        hidden = self.inward(sample) + self.shift
        hidden = hidden + self.time(torch.cat([angle.sin(), angle.cos()], 1))[:, :, None, None]
        for block in self.blocks:
            hidden = block(hidden)
        return (self.outward(hidden),)


def sharding(version: int = 2, kinds: Sequence[str] = ("Gate",)) -> Accelerator:
    """Accelerate shards on accelerators only; the preparation itself runs anywhere."""
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.device = torch.device("cpu")  # not cpu:0, which the old FSDP takes for another
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=kinds,
        use_orig_params=True,
        cpu_ram_efficient_loading=False,
    )
    return accelerator


def train(
    log: Path | None,
    loader: Any,
    accelerator: Accelerator,
    make_model: Callable[[], nn.Module] = GatedDenoiser,
    **options: Any,
) -> list[Tensor]:
    """Everything that training leaves on this process."""
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(0)
    options = {"strict": True, **options}
    hook = DiffHook(accelerator, log or "none", enabled=log is not None, **options)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for _ in range(2):
        for (clean,) in loader:
            value = told_loss(model, clean)
            losses.append(value.detach())
            accelerator.backward(value)
            optimizer.step()
            optimizer.zero_grad()
    hook.close()
    left = [p.detach().clone() for p in model.parameters()]
    left += [v for s in optimizer.state.values() for v in s.values()]
    left = [value.to_local() if isinstance(value, DTensor) else value for value in left]
    drawn = torch.tensor(random.getstate()[1]), torch.from_numpy(np.random.get_state()[1].astype(np.int64))
    return [*left, *losses, torch.get_rng_state(), *drawn]


def loader(batch: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(identified()), batch)


def alone(log: Path) -> None:
    """The main process asks for its state, and the others do not hear of it."""
    hook = DiffHook(accelerator := sharding(), log, strict=True, every=1, **{**KEPT, "snapshot_every": 3})
    model, data = GatedDenoiser(), loader(3)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    for clean in [clean for _ in range(2) for (clean,) in data]:
        accelerator.backward(told_loss(model, clean))
        optimizer.step()
        optimizer.zero_grad()
        if hook.capture.session.steps.count == 1 and accelerator.is_main_process:
            hook.capture.state()
    hook.close()


@contextmanager
def broken(rank: int) -> Iterator[None]:
    """In which every other pass fails in us in the midst of its backward, on one process."""
    calls, original = count(), PassAccumulator.add_layer

    def failing(self: PassAccumulator, *args: Any) -> None:
        if torch.distributed.get_rank() == rank and next(calls) % 12 == 8:
            raise RuntimeError("ours")
        original(self, *args)

    with mock.patch.object(PassAccumulator, "add_layer", failing):
        yield


def main(out: Path) -> None:
    found: dict[str, Any] = {}
    calls: Counter[str] = Counter()
    Accelerator(cpu=True)
    rank = torch.distributed.get_rank()
    counted(calls)
    for version in (1, 2):
        ways: dict[str, dict[str, Any]] = {
            "log": {"every": 1, **KEPT},
            "uneven": {"every": 1 + 2 * rank, "projection_dim": 16},
            "ruled": {"every": 1, "projection_dim": 16},
            "failing": {"every": 1, "projection_dim": 16, "strict": False},
        }
        for way, options in ways.items():
            calls.clear()
            kinds, make = (["Conv2d"], TinyDenoiser) if way == "ruled" else (["Gate"], GatedDenoiser)
            plain, collectives = train(None, loader(3), sharding(version, kinds), make), dict(calls)
            calls.clear()
            with broken(1) if way == "failing" else nullcontext():
                left = train(out / f"{way}-{version}", loader(3), sharding(version, kinds), make, **options)
            found[f"{way}-{version}"] = [equal(plain, left), dict(calls) == collectives]
    alone(out / "alone")
    (out / f"found-{rank}.json").write_text(json.dumps(found))


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
