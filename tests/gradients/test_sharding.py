"""Parameters that FSDP spreads over two gloo processes: rows are what one process has of the whole model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.utils.checkpoint import checkpoint

from diffhook.errors import CaptureError, RecheckNeeded
from diffhook.gradients import PerSampleGradients
from diffhook.gradients.sharding import gathered, own_share
from tests import forked
from tests.twins import relative_error, sample_gradients

BATCH, TOKENS, WIDTH = 3, 5, 6


class _Block(nn.Module):
    """A bare table whose use is the block's last operation, as in adaLN's gates."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale_shift_table = nn.Parameter(torch.randn(2, WIDTH))
        self.checkpointed = False

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._run, x, use_reentrant=False) if self.checkpointed else self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table[None] + x.mean(1)[:, None]).chunk(2, dim=1)
        return x + self.inner(self.norm(x) * (1 + scale) + shift).tanh() * self.scale_shift_table[0]


class Model(nn.Module):
    """Parameters of the root's own, of the blocks', and frozen ones; one is of fewer rows than processes."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, TOKENS, WIDTH))
        self.inward = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.blocks = nn.ModuleList([_Block(), _Block()])
        self.last = nn.Linear(WIDTH, WIDTH)
        self.gain = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inward(x) + self.position
        for block in self.blocks:
            x = block(x)
        return self.last(x) * self.gain


def losses_of(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
    return model(batch[0]).tanh().square().flatten(1).sum(1)


def _blocks_and_root(model: Model) -> nn.Module:
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def _layers_themselves(model: Model) -> nn.Module:
    for layer in (model.last, *(block.inner for block in model.blocks)):
        fully_shard(layer)
    return fully_shard(model, reshard_after_forward=True)


def _checkpointed(model: Model) -> nn.Module:
    for block in model.blocks:
        block.checkpointed = True
    return _blocks_and_root(model)


def _old(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def _old_blocks_and_root(model: Model) -> nn.Module:
    model.blocks = nn.ModuleList(map(_old, model.blocks))
    return _old(model)


def _old_and_checkpointed(model: Model) -> nn.Module:
    for block in model.blocks:
        block.checkpointed = True
    return _old_blocks_and_root(model)


def _replicated(model: Model) -> nn.Module:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _unsynchronised(model: Model) -> nn.Module:
    sharded = _blocks_and_root(model)
    assert isinstance(sharded, FSDPModule)
    sharded.set_requires_gradient_sync(False)
    return model


WAYS: dict[str, Callable[[Model], nn.Module]] = {
    "blocks": _blocks_and_root,
    "root": fully_shard,
    "layers": _layers_themselves,
    "checkpointed": _checkpointed,
    "replicated": _replicated,
    "unsynchronised": _unsynchronised,
    "FSDP1": _old_blocks_and_root,
    "FSDP1, root": _old,
    "FSDP1, checkpointed": _old_and_checkpointed,
}


def _train(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save({way: _trained(WAYS[way], rank) for way in WAYS}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def _trained(shard: Callable[[Model], nn.Module], rank: int) -> dict[str, Any]:
    torch.manual_seed(0)
    twin = Model()
    model: nn.Module = Model()
    model.load_state_dict(twin.state_dict())
    model = shard(model)  # type: ignore[arg-type]
    engine = PerSampleGradients(model, projection_dim="full")
    whole = PerSampleGradients(twin, projection_dim=64)
    small = PerSampleGradients(model, projection_dim=64)
    rates = torch.optim.SGD(model.parameters(), 0.1)
    torch.manual_seed(1 + rank)
    errors = []
    for step in range(4):
        batch = ((1 + 2 * rank) * torch.randn(BATCH + step % 2, TOKENS, WIDTH),)
        if step == 2:  # a pass that is given up between forward and backward leaves nothing
            engine.begin()
            engine.attach()
            loss = losses_of(model, batch).mean()
            engine.abandon()
            loss.backward()
            rates.zero_grad()
        used = small if step == 3 else engine
        with used:
            losses_of(model, batch).mean().backward()
        twin.load_state_dict(gathered(model, engine.trained, None, keep=True), strict=False)
        if step == 3:
            with whole:
                losses_of(twin, batch).mean().backward()
            errors.append(relative_error(small.projections, whole.projections))
        else:
            rows = sample_gradients(twin, losses_of, batch)
            errors.append(relative_error(engine.projections, rows))
        rates.step()
        rates.zero_grad()
    return {
        "errors": errors,
        "parameters": list(engine.shapes.items()),
        "expected": list(whole.shapes.items()),
        "missing": dict(engine.coverage.missing),
        "fallback": engine.coverage.fallback,
        "unchecked": engine.coverage.unchecked,
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("sharded")
    forked.run(_train, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


class _Table(nn.Module):
    """A unit whose answer is computed of parameters alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(WIDTH))

    def forward(self) -> Tensor:
        return 2 * self.table


class _Tabled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = _Table(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.table())


class _Normalised(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv1d(TOKENS, WIDTH, 1), nn.BatchNorm1d(WIDTH), nn.Conv1d(WIDTH, 2, 1))


def _left_out(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = {}
    for make in (_Tabled, _Normalised):
        torch.manual_seed(0)
        models: list[nn.Module] = [make(), make()]
        models[1].load_state_dict(models[0].state_dict())
        for model in models:
            for child in model.children():
                fully_shard(child)
            fully_shard(model)
        engine = PerSampleGradients(models[1], projection_dim="full")
        torch.manual_seed(1 + rank)
        gradients: list[list[Tensor]] = [[], []]
        for _ in range(3):
            batch = (torch.randn(BATCH, TOKENS, WIDTH),)
            for model, kept in zip(models, gradients, strict=True):
                with suppress(CaptureError, RecheckNeeded), engine if model is models[1] else nullcontext():
                    losses_of(model, batch).mean().backward()
                kept += [own_share(p.grad) for p in model.parameters() if p.grad is not None]
                model.zero_grad()
        same = all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
        found[make.__name__] = same, sorted(engine.coverage.missing), list(engine.coverage.inseparable)
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_what_cannot_be_followed_is_left_out_by_name(tmp_path: Path) -> None:
    """A unit's answer goes through functions of FSDP's, whose backward must not be run for a look; nor is
    it seen how far batch statistics couple samples. Training is bit-identical all the same.
    """
    forked.run(_left_out, str(tmp_path))
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert found["_Tabled"] == (True, ["table.table"], [])
        same, missing, inseparable = found["_Normalised"]
        assert same
        assert missing == ["0.bias", "0.weight", "1.bias", "1.weight", "2.bias", "2.weight"]
        assert inseparable == ["1"]


@pytest.mark.parametrize("way", WAYS)
def test_rows_are_those_of_the_whole_model(found: list[dict[str, Any]], way: str) -> None:
    for rank in (0, 1):
        seen = found[rank][way]
        assert max(seen["errors"]) < 1e-5, f"rank {rank}: {seen['errors']}"
        assert seen["parameters"] == seen["expected"]
        assert seen["missing"] == {}
