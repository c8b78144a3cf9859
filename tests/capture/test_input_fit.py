"""Whether what is trained is the batch that came last: never denied where it is, found out if not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffhook.capture.loop.tracing.input_fit import InputFit

COUNT, BATCHES = 64, 14
Generator = torch.Generator


def _smooth(count: int, side: int, generator: Generator) -> Tensor:
    images = torch.randn(count, 3, side, side, generator=generator)
    for _ in range(3):
        images = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return images / images.std()


DATA: dict[str, Callable[[int, Generator], Tensor]] = {
    "white": lambda side, g: torch.randn(COUNT, 3, side, side, generator=g),
    "smooth": lambda side, g: _smooth(COUNT, side, g),
    "aligned": lambda side, g: _smooth(1, side, g) + 0.7 * _smooth(COUNT, side, g),
    "two-valued": lambda side, g: (_smooth(COUNT, side, g) > 0.8) * 2.0 - 1,
}
WEAK: dict[str, Callable[[int, Generator], Tensor]] = {
    "nearly equal": lambda side, g: _smooth(1, side, g) + 1e-3 * _smooth(COUNT, side, g),
    "blank": lambda side, g: torch.rand(COUNT, 1, 1, 1, generator=g).expand(COUNT, 3, side, side).clone(),
    "of low contrast": lambda side, g: 0.3 + 0.02 * _smooth(COUNT, side, g),
}


def _ddpm(t: Tensor) -> tuple[Tensor, Tensor]:
    kept = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)[(t * 999).long()]
    return kept.sqrt(), (1 - kept).sqrt()


SCHEDULES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "ddpm": _ddpm,
    "flow": lambda t: (1 - t, t),
    "cosine": lambda t: ((t * math.pi / 2).cos(), (t * math.pi / 2).sin()),
}


def _verdicts(
    data: Tensor,
    schedule: str,
    batch: int,
    generator: Generator,
    *,
    trained: Callable[[Tensor], Tensor] = lambda clean: clean,
    noise: float = 0.0,
    stale: bool = False,
) -> list[bool | None]:
    """After each batch, of a loop that trains on it, or on a cache of its own while the last one stays."""
    fit, found = InputFit(), []
    for _ in range(BATCHES):
        own = data[torch.randperm(len(data), generator=generator)[:batch]]
        used = trained(own)
        signal, spread = SCHEDULES[schedule](torch.rand(batch, generator=generator))
        drawn = torch.randn(used.shape, generator=generator) * (1 + noise)
        fit.add(
            data[:batch] if stale else own,
            signal[:, None, None, None] * used + spread[:, None, None, None] * drawn,
        )
        found.append(fit.verdict)
    return found


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "as they are": lambda clean: clean,
    "scaled": lambda clean: 0.18215 * clean,
    "shifted": lambda clean: 2 * clean - 1,
    "flipped": lambda clean: clean.flip(-1),
    "flipped by row": lambda clean: torch.cat([clean[::2].flip(-1), clean[1::2]])[
        torch.argsort(torch.cat([torch.arange(len(clean))[::2], torch.arange(len(clean))[1::2]]))
    ],
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", [*DATA, *WEAK])
def test_inputs_of_the_batch_are_never_denied(kind: str, schedule: str) -> None:
    generator = torch.Generator().manual_seed(1)
    for number, way in enumerate(WAYS):
        for batch in (2, 5):
            data = (DATA | WEAK)[kind]([8, 16][number % 2], generator)
            data = data * (5.49 if way == "scaled" else 1)
            noise = 0.1 * (number % 2)
            found = _verdicts(data, schedule, batch, generator, trained=WAYS[way], noise=noise)
            assert False not in found, (way, batch)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", DATA)
def test_inputs_of_the_batch_are_recognised(kind: str, schedule: str) -> None:
    generator = torch.Generator().manual_seed(2)
    assert _verdicts(DATA[kind](16, generator), schedule, 8, generator)[-1] is True


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", DATA)
def test_inputs_from_elsewhere_are_found_out_within_a_few_batches(kind: str, schedule: str) -> None:
    first = []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        data = DATA[kind](16, generator)

        def cached(own: Tensor, data: Tensor = data, generator: Generator = generator) -> Tensor:
            return data[torch.randperm(COUNT, generator=generator)[: len(own)]]

        found = _verdicts(data, schedule, 8, generator, trained=cached, stale=seed % 2 > 0)
        assert found.count(True) == 0, "inputs from elsewhere are never taken for the batch's own"
        first.append(found.index(False) if False in found else BATCHES)
    assert sorted(first)[3] < 8, first


def test_a_loop_that_turns_to_a_cache_of_its_own_is_found_out() -> None:
    generator, fit = torch.Generator().manual_seed(4), InputFit()
    data = torch.randn(COUNT, 3, 16, 16, generator=generator)
    for step in range(200):
        own = data[torch.randperm(COUNT, generator=generator)[:8]]
        used = own if step < 60 else data[torch.randperm(COUNT, generator=generator)[:8]]
        fit.add(own, 0.7 * used + 0.7 * torch.randn(used.shape, generator=generator))
        if step == 59:
            assert fit.verdict is True
    assert fit.verdict is False


def test_other_shapes_and_what_is_not_finite_tell_nothing() -> None:
    fit = InputFit()
    for _ in range(20):
        fit.add(torch.rand(4, 3, 8, 8), torch.rand(4, 4, 8, 8))
        fit.add(torch.rand(4, 3, 8, 8), torch.full((4, 3, 8, 8), torch.nan))
        fit.add(torch.zeros(4, 3, 8, 8), torch.rand(4, 3, 8, 8))
        fit.add(torch.rand(4, 3, 8, 8), torch.zeros(4, 3, 8, 8))
        fit.add(torch.zeros(0, 3, 8, 8), torch.zeros(0, 3, 8, 8))
        fit.add(torch.randint(0, 255, (4, 3, 8, 8)), torch.rand(4, 3, 8, 8))
    assert fit.verdict is None


def test_nothing_random_is_drawn_and_nothing_given_is_changed() -> None:
    clean, noisy = torch.randn(4, 3, 8, 8, requires_grad=True), torch.randn(4, 3, 8, 8)
    before, state = noisy.clone(), torch.random.get_rng_state()
    InputFit().add(clean, noisy)
    assert torch.equal(before, noisy)
    assert torch.equal(state, torch.random.get_rng_state())


def test_rows_that_have_changed_places_are_seen_in_the_batch_in_which_they_did() -> None:
    """Also where every batch before was in order."""
    generator = Generator().manual_seed(0)
    data, fit = DATA["smooth"](16, generator), InputFit()
    for number in range(BATCHES):
        clean = data[torch.randperm(COUNT, generator=generator)[:8]]
        noisy = 0.8 * clean + 0.6 * torch.randn(clean.shape, generator=generator)
        assert fit.add(clean, noisy), number
    assert fit.verdict is True
    assert not fit.add(clean, noisy.flip(0))
    assert fit.verdict is True
