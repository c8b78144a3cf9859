"""What hooks compute in is theirs: the training's own flags are as before, whatever they were set by."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from diffhook.gradients.precision import exactly, without_tf32


@pytest.fixture(autouse=True)
def flags_as_before() -> Iterator[None]:
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products


def _by_older_names() -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True


def _by_matmul_precision() -> None:
    torch.set_float32_matmul_precision("high")


def _not_at_all() -> None:
    pass


@pytest.mark.parametrize("set_flags", [_not_at_all, _by_older_names, _by_matmul_precision])
def test_no_tf32_inside_and_as_before_outside(set_flags: Callable[[], None]) -> None:
    set_flags()
    before = _flags()
    inside: list[tuple[bool, bool]] = []
    with pytest.raises(ZeroDivisionError):
        _look_and_fail(inside)
    assert inside == [(False, False)]
    assert _flags() == before


def _look_and_fail(inside: list[tuple[bool, bool]]) -> None:
    with without_tf32():
        inside.append(_allowed())
        raise ZeroDivisionError


def test_nothing_is_entered_where_nothing_rounds() -> None:
    with torch.no_grad():
        assert exactly(torch.zeros(1)) is exactly(torch.zeros(2))


def _flags() -> tuple[bool, bool, str]:
    """As a training reads them."""
    products = torch.backends.cuda.matmul.allow_tf32
    return torch.backends.cudnn.allow_tf32, products, torch.get_float32_matmul_precision()


def _allowed() -> tuple[bool, bool]:
    """Inside, where the older names of torch from 2.9 on may refuse to answer."""
    convolutions, products = getattr(torch.backends.cudnn, "conv", None), torch.backends.cuda.matmul
    if hasattr(convolutions, "fp32_precision"):
        return convolutions.fp32_precision != "ieee", products.fp32_precision != "ieee"
    return torch.backends.cudnn.allow_tf32, products.allow_tf32
