"""Each process checks its own samples, whatever data-parallel training makes of the gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations

from diffhook.gradients import PerSampleGradients
from tests import forked
from tests.twins import relative_error, sample_gradients

BATCH, TOKENS, WIDTH = 3, 4, 6


class _Tables(nn.Module):
    """Bare parameters as PixArt keeps them, and a derived weight."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, TOKENS, WIDTH))
        self.scale_shift_table = nn.Parameter(torch.randn(2, WIDTH))
        self.inner, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        parametrizations.weight_norm(self.last)

    def forward(self, x: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table[None] + x.mean(1)[:, None]).chunk(2, dim=1)
        return self.last(self.inner((x + self.position) * (1 + scale) + shift).tanh())


def _losses(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
    return model(batch[0]).tanh().square().flatten(1).sum(1)


def _train(rank: int, folder: str, bucket_view: bool) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = _Tables()
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=bucket_view)
    engine = PerSampleGradients(parallel, projection_dim="full")
    torch.manual_seed(1 + rank)
    errors = []
    for _ in range(3):
        parallel.zero_grad()
        batch = ((1 + 2 * rank) * torch.randn(BATCH, TOKENS, WIDTH),)
        with engine:
            _losses(parallel, batch).mean().backward()
        twin = _Tables()
        twin.load_state_dict(model.state_dict())
        errors.append(relative_error(engine.projections, sample_gradients(twin, _losses, batch)))
    torch.save((errors, engine.coverage.missing, engine.coverage.ruled), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.parametrize("bucket_view", [False, True])
def test_averaging_of_gradients_is_not_taken_for_an_error(bucket_view: bool, tmp_path: Path) -> None:
    forked.run(_train, str(tmp_path), bucket_view)
    for rank in range(2):
        errors, missing, ruled = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert max(errors) < 1e-5, f"rank {rank}"
        assert (missing, ruled) == ({}, ("inner.weight", "inner.bias", "last.bias"))
