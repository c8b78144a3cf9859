"""Rows are right where the rows of a layer are not the samples: reordered, mixed, coupled; also later on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffhook.errors import RecheckNeeded
from diffhook.gradients import PerSampleGradients
from tests.gradients.passes import BATCH, WIDTH, Layers, alone, passes, sample_losses, within_batch
from tests.twins import double, relative_error, sample_gradients


class _Around(nn.Module):
    """Two layers, and something done to the batch between, which is undone at the end."""

    def __init__(self, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH)
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.inner(self.before(self.first(x).tanh()))).sin()
        return self.last(self.after(hidden))


class _Sorted(_Around):
    """By length, as packed sequences are, and sorted back."""

    def __init__(self) -> None:
        super().__init__(lambda x: x, lambda x: x)

    def forward(self, x: Tensor) -> Tensor:
        order = x.flatten(1).sum(1).argsort()
        hidden = self.inner(x[order].cos()).sin()
        return self.last(self.norm(self.first(hidden)).index_select(0, order.argsort()))


class _Table(nn.Module):
    """Called on a table first, which has as many rows as the batch by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, table: Tensor, x: Tensor) -> Tensor:
        return self.inner((x + self.table(table).sin()[: x.shape[1]]).tanh())


REORDERED: dict[str, Layers] = {
    "sorted": _Sorted,
    "rolled": lambda: _Around(lambda x: x.roll(1, 0), lambda x: x.roll(-1, 0)),
    "flipped": lambda: _Around(lambda x: x.flip(0), lambda x: x.flip(0)),
    "pairs-swapped": lambda: _Around(_swap_two, _swap_two),
}


def _swap_two(x: Tensor) -> Tensor:
    return torch.cat([x[:2], x[3:4], x[2:3], x[4:]])


@pytest.mark.parametrize("tokens", [(), (3,)], ids=["flat", "tokens"])
@pytest.mark.parametrize("name", REORDERED)
def test_samples_that_the_model_reorders_are_followed(name: str, tokens: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    engine = PerSampleGradients(REORDERED[name](), projection_dim="full")
    batches = [(torch.randn(BATCH, *tokens, WIDTH),) for _ in range(4)]
    assert passes(engine, batches, alone) == 1
    assert engine.coverage.inseparable


def test_a_table_as_long_as_the_batch_is_no_batch() -> None:
    torch.manual_seed(0)
    engine = PerSampleGradients(_Table(), projection_dim="full")
    table = torch.randn(BATCH, WIDTH)
    batches = [(table, torch.randn(BATCH, BATCH, WIDTH)) for _ in range(3)]

    def expected(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return sample_gradients(model, lambda m, b: sample_losses(m, (double(table), *b)), batch[1:])

    assert passes(engine, batches, expected) == 1


class _MeanSubtracted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


class _MinibatchDeviation(nn.Module):
    """As progressive GANs append it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x.std(0).mean().expand(len(x), 1, *x.shape[2:])], 1)


class _Mixed(nn.Module):
    """Manifold mixup."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.7 * x + 0.3 * x[torch.arange(len(x)).roll(2)]


COUPLED: dict[str, Layers] = {
    "batchnorm2d": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 3, 1),
    ),
    "batchnorm2d-inplace": lambda: nn.Sequential(
        nn.Conv2d(2, BATCH, 3), nn.BatchNorm2d(BATCH), nn.ReLU(inplace=True), nn.Conv2d(BATCH, 3, 1)
    ),
    "batchnorm1d": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(72, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)
    ),
    "syncbatchnorm": lambda: nn.SyncBatchNorm.convert_sync_batchnorm(
        nn.Sequential(nn.Flatten(), nn.Linear(72, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
    ),
    "batchnorm3d": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2)), nn.Conv3d(1, 4, (2, 3, 3)), nn.BatchNorm3d(4), nn.SiLU(), nn.Conv3d(4, 2, 1)
    ),
    "batchnorm-no-statistics": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.SiLU(), nn.Conv2d(4, 2, 1)
    ).eval(),
    "batch-mean": lambda: nn.Sequential(nn.Conv2d(2, 4, 3), _MeanSubtracted(), nn.SiLU(), nn.Conv2d(4, 2, 1)),
    "minibatch-deviation": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3), _MinibatchDeviation(), nn.SiLU(), nn.Conv2d(5, 2, 1)
    ),
    "mixup": lambda: nn.Sequential(nn.Conv2d(2, 4, 3), _Mixed(), nn.SiLU(), nn.Conv2d(4, 2, 1)),
}  # fmt: skip


@pytest.mark.parametrize("weight_gradients", [True, False], ids=["in-step", "probe"])
@pytest.mark.parametrize("name", COUPLED)
def test_where_the_model_couples_samples_a_row_is_of_the_sample_within_its_batch(
    name: str, weight_gradients: bool
) -> None:
    torch.manual_seed(0)
    model = COUPLED[name]()
    engine = PerSampleGradients(model, projection_dim="full", weight_gradients=weight_gradients)
    outcomes = []
    for _ in range(4):
        batch = (torch.randn(BATCH, 2, 6, 6),)
        expected = within_batch(model, batch)
        try:
            with engine:
                sample_losses(model, batch).mean().backward()
        except RecheckNeeded as again:
            outcomes.append(again.law)
            continue
        outcomes.append("exact")
        assert engine.coverage.complete
        assert relative_error(engine.projections, expected) < 1e-5
    assert outcomes == ["separability", "exact", "exact", "exact"]
    assert engine.coverage.inseparable, "samples are coupled, and nothing says so"
    if "batchnorm" in name:
        assert all("BatchNorm" in why for why in engine.coverage.inseparable.values())


def test_coupled_samples_are_told_in_one_warning() -> None:
    model = COUPLED["batchnorm2d"]()
    engine, batch = PerSampleGradients(model), (torch.randn(BATCH, 2, 6, 6),)
    with pytest.raises(RecheckNeeded), engine:
        sample_losses(model, batch).mean().backward()
    with pytest.warns(UserWarning, match=r"within its batch: 1 \(BatchNorm2d couples samples"), engine:
        sample_losses(model, batch).mean().backward()


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_statistics_that_are_not_of_the_batch_couple_nothing(kind: Any) -> None:
    torch.manual_seed(0)
    norm = kind(4, affine=True, track_running_stats=True)
    if kind is nn.BatchNorm2d:
        norm.eval()
    model = nn.Sequential(nn.Conv2d(2, 4, 3), norm, nn.SiLU(), nn.Conv2d(4, 2, 1))
    engine = PerSampleGradients(model, projection_dim="full")
    batches = [(torch.randn(BATCH, 2, 6, 6),) for _ in range(3)]
    assert passes(engine, batches, alone) == 0
    assert not engine.coverage.inseparable


def test_a_batch_of_one_says_nothing_about_others() -> None:
    torch.manual_seed(0)
    engine = PerSampleGradients(_Sorted(), projection_dim="full")
    batches = [(torch.randn(rows, WIDTH),) for rows in (1, 1, 5, 5, 5, 1, 4)]
    assert passes(engine, batches, alone) == 2, "one finds out about rows, one about what happens to them"


def test_what_begins_to_couple_samples_later_is_found_by_a_spot_check() -> None:
    class Later(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.rolls = False

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.inner(x.roll(1, 0) if self.rolls else x).sin()
            return self.last(hidden.roll(-1, 0) if self.rolls else hidden)

    torch.manual_seed(0)
    model, batch = Later(), (torch.randn(BATCH, WIDTH),)
    engine = PerSampleGradients(model, projection_dim="full")
    assert passes(engine, [batch] * 10, alone) == 0
    model.rolls = True
    outcomes = []
    for _ in range(10):
        try:
            with engine:
                sample_losses(model, batch).mean().backward()
            outcomes.append(relative_error(engine.projections, alone(model, batch)) < 1e-5)
        except RecheckNeeded as again:
            outcomes.append(again.law)
    assert outcomes == [False] * 5 + ["separability"] + [True] * 4


@pytest.mark.parametrize("reentrant", [False, True])
def test_checks_leave_dropout_and_statistics_of_checkpointed_blocks_alone(reentrant: bool) -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(WIDTH, WIDTH)
            self.block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5), nn.Tanh())
            self.register_buffer("calls", torch.zeros(()))

        def _run(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.block(x)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            options = {} if reentrant else {"preserve_rng_state": False}
            return checkpoint(self._run, hidden, use_reentrant=reentrant, **options)

    results = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = Blocks()
        engine = PerSampleGradients(model, projection_dim=16)
        for _ in range(2):
            model.zero_grad()
            if watched:
                with engine:
                    sample_losses(model, (torch.ones(BATCH, WIDTH),)).mean().backward()
            else:
                sample_losses(model, (torch.ones(BATCH, WIDTH),)).mean().backward()
        results.append([model.calls, torch.rand(3), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert (engine.coverage.unchecked is not None) == reentrant


def test_a_wrapper_that_returns_its_loss_is_checked_inside() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = COUPLED["batchnorm2d"]()

        def forward(self, x: Tensor) -> Tensor:
            return sample_losses(self.model, (x,)).mean()

    engine = PerSampleGradients(Wrapper())
    with pytest.raises(RecheckNeeded) as raised, engine:
        engine.model(torch.randn(BATCH, 2, 6, 6)).backward()
    assert raised.value.law == "separability"
