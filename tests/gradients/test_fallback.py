"""Parameters without a layer rule: exact all the same, or named."""

from __future__ import annotations

import copy
import gc
import warnings
from contextlib import nullcontext, suppress

import pytest
import torch
from torch import Tensor, nn

from diffhook.errors import RecheckNeeded
from diffhook.gradients import PerSampleGradients
from tests.gradients.odd_models import (
    BATCH,
    CASES,
    TOKENS,
    WIDTH,
    BareTables,
    Excursion,
    Folded,
    HiddenWeight,
    SamplesFirst,
    Tied,
    TokensFirst,
)
from tests.twins import relative_error, sample_gradients


def _losses(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
    return model(batch[0]).tanh().square().flatten(1).sum(1)


@pytest.mark.parametrize("weight_gradients", [True, False], ids=["in-step", "probe"])
@pytest.mark.parametrize("kind", CASES)
def test_every_parameter_is_exact(kind: type[nn.Module], weight_gradients: bool) -> None:
    torch.manual_seed(0)
    model = kind()
    engine = PerSampleGradients(model, projection_dim="full", weight_gradients=weight_gradients)
    for _ in range(3):  # the first pass surveys, later ones watch only what it found
        batch = (torch.randn(BATCH, TOKENS, WIDTH),)
        expected = sample_gradients(model, _losses, batch)
        with engine:
            _losses(model, batch).mean().backward()
        assert engine.coverage.complete
        assert relative_error(engine.projections, expected) < 1e-5
        assert relative_error(engine.norms[:, None], expected.norm(dim=1, keepdim=True)) < 1e-5


def test_a_hidden_weight_that_comes_elsewhere_in_the_forward_costs_its_pass_and_no_row_is_wrong() -> None:
    torch.manual_seed(0)
    model = HiddenWeight()
    engine = PerSampleGradients(model, projection_dim="full")
    for number in range(4):
        batch = (torch.randn(BATCH, TOKENS, WIDTH),)
        model.longer = number > 1
        with pytest.raises(RecheckNeeded) if number == 2 else nullcontext(), engine:
            _losses(model, batch).mean().backward()
        if number != 2:
            expected = sample_gradients(model, _losses, batch)
            assert relative_error(engine.projections, expected) < 1e-5
    assert engine.coverage.complete


@pytest.mark.parametrize("kind", CASES)
def test_autocast_does_not_make_the_survey_suspicious(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, batch = kind(), (torch.randn(BATCH, TOKENS, WIDTH),)
    expected = sample_gradients(model, _losses, batch)
    engine = PerSampleGradients(model, projection_dim="full")
    with engine, torch.autocast("cpu", torch.bfloat16):
        _losses(model, batch).mean().backward()
    assert engine.coverage.complete, engine.coverage
    # bfloat16 keeps 8 bits: the activations themselves are off by 1/256 or so.
    assert relative_error(engine.norms[:, None], expected.norm(dim=1, keepdim=True)) < 0.05


@pytest.mark.parametrize("kind", [BareTables, Tied])
def test_norms_are_exact_where_a_pass_ends_under_autocast(kind: type[nn.Module]) -> None:
    """The operations themselves are of float32 here: autocast begins when they have been differentiated."""
    torch.manual_seed(0)
    model, batch = kind(), (torch.randn(BATCH, TOKENS, WIDTH),)
    expected = sample_gradients(model, _losses, batch).norm(dim=1)
    engine = PerSampleGradients(model, projection_dim=64)
    engine.attach()
    engine.begin()
    _losses(model, batch).mean().backward()
    with torch.autocast("cpu", torch.bfloat16):
        engine.finish()
    engine.detach()
    torch.testing.assert_close(engine.norms, expected.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", CASES)
def test_the_survey_leaves_gradients_bit_identical(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, batch = kind(), (torch.randn(BATCH, TOKENS, WIDTH),)
    _losses(model, batch).mean().backward()
    plain = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    with PerSampleGradients(model):
        _losses(model, batch).mean().backward()
    watched = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


def test_what_cannot_be_split_by_sample_is_named_in_coverage_and_one_warning() -> None:
    class Regularised(nn.Module):
        """Its penalty reaches the loss without ever meeting a sample."""

        def __init__(self) -> None:
            super().__init__()
            self.penalised = nn.Parameter(torch.randn(WIDTH))
            self.inner = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            self.penalty = self.penalised.square().sum()
            return self.inner(x)

    model, batch = Regularised(), (torch.randn(BATCH, TOKENS, WIDTH),)
    engine = PerSampleGradients(model)
    with pytest.warns(UserWarning, match=r"leave out 1 of 3 .*penalised \(its uses never met"):
        with engine:
            (_losses(model, batch).mean() + model.penalty).backward()
    assert set(engine.coverage.missing) == {"penalised"}
    assert engine.coverage.ruled == ("inner.weight", "inner.bias")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with engine:
            (_losses(model, batch).mean() + model.penalty).backward()


@pytest.mark.parametrize("kind", CASES)
def test_no_tensor_outlives_the_pass(kind: type[nn.Module], request: pytest.FixtureRequest) -> None:
    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    gc.freeze()  # what is there already is neither collected nor counted, which takes long
    request.addfinalizer(gc.unfreeze)
    model = kind()
    engine = PerSampleGradients(model, weight_gradients=False)
    counts = []
    for _ in range(4):
        with engine:
            _losses(model, (torch.randn(BATCH, TOKENS, WIDTH),)).mean().backward()
        counts.append(alive())
    assert counts[1] == counts[-1], f"tensors alive after each pass: {counts}"


def _passes(model: nn.Module, batches: list[Tensor]) -> int:
    """Passes that were left out; the others are exact, and training is as it would be."""
    twin = copy.deepcopy(model)
    engine = PerSampleGradients(model, projection_dim="full")
    left_out = 0
    for batch in batches:
        expected = sample_gradients(model, _losses, (batch,))
        for each in (model, twin):
            each.zero_grad()
        _losses(twin, (batch,)).mean().backward()
        with suppress(RecheckNeeded):
            left_out += 1
            with engine:
                _losses(model, (batch,)).mean().backward()
            left_out -= 1
            assert engine.coverage.complete
            assert relative_error(engine.projections, expected) < 1e-5
        for one, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]
    return left_out


@pytest.mark.parametrize(
    ("sizes", "expected"), [((3, 5, 4, 3, 4), 0), ((4, 4, 4, 3, 5, 4), 1)], ids=["late", "at once"]
)
@pytest.mark.parametrize("kind", [TokensFirst, Folded, Excursion, SamplesFirst])
def test_a_batch_that_is_as_long_as_there_are_tokens_deceives_nobody(
    kind: type[nn.Module], sizes: tuple[int, ...], expected: int
) -> None:
    """An epoch's last batch may be of any length."""
    torch.manual_seed(0)
    batches = [torch.randn(size, TOKENS, WIDTH) for size in sizes]
    assert _passes(kind(), batches) == expected


def test_as_many_channels_as_samples_raise_no_doubt() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 3))
    passed: list[int] = []
    model[2].register_full_backward_hook(lambda *_: passed.append(1))
    engine = PerSampleGradients(model)
    for _ in range(2):  # the first is checked by two more backward passes of activations
        passed.clear()
        with engine:
            _losses(model, (torch.randn(8, 3, 6, 6),)).mean().backward()
    assert passed == [1], "outside of checked passes the user's own hooks run once"


def test_a_layer_that_is_called_on_other_rows_later_is_looked_at_anew() -> None:
    """Images first, then videos: frames fold into the batch."""

    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.flatten(0, 1)).tanh().view(x.shape)

    torch.manual_seed(0)
    assert _passes(Frames(), [torch.randn(BATCH, frames, WIDTH) for frames in (1, 1, 4, 4, 1, 4)]) == 1
