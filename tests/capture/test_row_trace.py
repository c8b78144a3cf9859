"""Rows are followed through torch functions: what is known of a row is what its numbers say."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from diffhook.capture.loop.tracing.row_trace import RowTrace

ROWS = 4


def _traced(first: int = 0, *, on: bool = True) -> tuple[RowTrace, Tensor]:
    """A trace, and a batch (4, 2, 3, 3) whose row r holds first + r everywhere."""
    trace = RowTrace(lambda function, *args: function(*args))
    return trace, _batch(trace, first)


def _batch(trace: RowTrace, first: int = 0) -> Tensor:
    ids = torch.arange(first, first + ROWS)
    batch = ids.float()[:, None, None, None].expand(ROWS, 2, 3, 3).clone()
    trace.note(batch, torch.stack([ids, ids], 1))
    return batch


def _after(trace: RowTrace, operation: Callable[[], Any]) -> Any:
    trace.start()
    try:
        return operation()
    finally:
        trace.stop()


MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "slice": lambda x: x[1:],
    "step": lambda x: x[::2],
    "index": lambda x: x[torch.randperm(len(x))],
    "mask": lambda x: x[torch.arange(len(x)) % 2 == 0] if len(x) > 1 else x,
    "list": lambda x: x[list(range(len(x)))[::-1]],
    "inner": lambda x: x[:, :1, ..., None, 0],
    "flip": lambda x: x.flip(0),
    "flip other": lambda x: torch.flip(x, [-1]),
    "roll": lambda x: torch.roll(x, 1, 0),
    "roll other": lambda x: x.roll(1, dims=-1),
    "select": lambda x: x.index_select(0, torch.randint(len(x), (3,))),
    "repeat": lambda x: x.repeat(2, 1, 1, 1),
    "interleave": lambda x: x.repeat_interleave(2, 0),
    "interleave by": lambda x: torch.repeat_interleave(x, 2, dim=0),
    "narrow": lambda x: x.narrow(0, 0, 1),
    "cat": lambda x: torch.cat([x, x.flip(0)]),
    "cat other": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "stack": lambda x: torch.stack([row * 1.0 for row in x]),
    "stack reversed": lambda x: torch.stack(list(x)[::-1]),
    "chunk": lambda x: torch.cat(x.chunk(2)[::-1]),
    "split": lambda x: torch.cat(torch.split(x, 1)[::-1]),
    "unbind": lambda x: torch.stack(x.unbind(0)[::-1]),
    "regroup": lambda x: x.reshape(len(x) * x.shape[1], *x.shape[2:]).view(x.shape),
    "flatten": lambda x: x.flatten(1).unflatten(1, x.shape[1:]),
    "turn": lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2),
    "transposed": lambda x: x.transpose(2, 3),
    "new axis": lambda x: x.unsqueeze(0).squeeze(0),
    "scale": lambda x: (x * 2 + x) / 3,
    "in place": lambda x: x.clone().mul_(1.0).add_(0),
    "pool": lambda x: functional.interpolate(x, x.shape[2:]),
    "convert": lambda x: x.double().to(torch.float32).contiguous().detach(),
    "conv": lambda x: functional.conv2d(x, torch.eye(x.shape[1])[:, :, None, None]),
    "sort": lambda x: x.sort(dim=0, descending=True).values,
    "gather": lambda x: x.gather(0, torch.zeros_like(x, dtype=torch.int64)),
    "put": lambda x: _put(x),
    "copied": lambda x: torch.empty_like(x).copy_(x.flip(0)),
}


def _permuted(x: Tensor) -> Tensor:
    """(B, B), which puts rows in another order."""
    return torch.eye(len(x)).flip(0)


MIXES: dict[str, Callable[[Tensor], Tensor]] = {
    "matmul": lambda x: (_permuted(x) @ x.flatten(1)).view_as(x),
    "addmm": lambda x: torch.addmm(torch.zeros(1), _permuted(x), x.flatten(1)).reshape(x.shape),
    "bmm": lambda x: torch.bmm(_permuted(x)[None], x.flatten(1)[None])[0].view_as(x),
    "einsum": lambda x: torch.einsum("ab,bcij->acij", _permuted(x), x),
    "tensordot": lambda x: torch.tensordot(_permuted(x), x, dims=1),
    "linear": lambda x: functional.linear(_permuted(x), x.flatten(1).T).view_as(x),
    "embedding": lambda x: functional.embedding(torch.arange(len(x)).flip(0), x.flatten(1)).view_as(x),
    "shift": lambda x: torch.fft.fftshift(x),
    "cumulative": lambda x: x.flip(0).cumsum(0).diff(dim=0, prepend=torch.zeros_like(x[:1])),
    "index put": lambda x: torch.zeros_like(x).index_put((torch.arange(len(x)).flip(0),), x),
    "slice scatter": lambda x: x.slice_scatter(x.flip(0)[:2], 0, 0, 2),
    "strided": lambda x: x.flip(0).as_strided(x.shape, x.stride()),
    "set data": lambda x: _with_data(x),
    "data of another": lambda x: _written_by_data(x),
    "view of before": lambda x: _stale_view(x),
    "swap like a list": lambda x: _swapped(x),
    "shuffled by numpy": lambda x: _shuffled_by_numpy(x),
    "rows of a buffer": lambda x: torch.where(_first_two(x), torch.full_like(x, 7.0), x),
}


def _first_two(x: Tensor) -> Tensor:
    return (torch.arange(len(x)) < 2)[:, None, None, None]


def _with_data(x: Tensor) -> Tensor:
    held = x.clone()
    held.data = x.flip(0)
    return held


def _written_by_data(x: Tensor) -> Tensor:
    held = x.clone()
    held.data.copy_(x.flip(0))
    return held


def _stale_view(x: Tensor) -> Tensor:
    held = x.clone()
    view = held.view(x.shape)
    held.copy_(x.flip(0))
    return view


def _swapped(x: Tensor) -> Tensor:
    """As ``random.shuffle`` does it, which doubles rows of a tensor."""
    held = x.clone()
    held[0], held[1] = held[1], held[0]
    return held


def _shuffled_by_numpy(x: Tensor) -> Tensor:
    held = x.clone()
    held.numpy()[:] = x.flip(0).numpy()
    return held


@pytest.mark.parametrize("name", MIXES)
def test_of_what_mixes_rows_nothing_wrong_is_known(name: str) -> None:
    trace, batch = _traced()
    result = _after(trace, lambda: MIXES[name](batch))
    codes = trace.codes(result)
    for code, row in zip([] if codes is None else codes.tolist(), result, strict=codes is not None):
        assert code[1] == -1 or set(row.flatten().tolist()) == {float(code[0])}


def test_a_part_of_every_row_that_is_written_over_leaves_rows_theirs_unless_it_is_of_others() -> None:
    for erase in (lambda x: _write(x, 0.0), lambda x: _write(x, torch.randn(x[..., 1:, 1:].shape))):
        trace, batch = _traced()
        codes = trace.codes(_after(trace, lambda erase=erase, batch=batch: erase(batch)))
        assert codes is not None
        assert codes[:, 0].tolist() == list(range(ROWS))
    trace, batch = _traced()
    for other in (lambda: _write(batch, batch.flip(0)[..., 1:, 1:]), lambda: _paste(batch)):
        codes = trace.codes(_after(trace, other))
        assert codes is not None
        assert codes[:, 1].tolist() == [-1] * ROWS


def _write(x: Tensor, value: Any) -> Tensor:
    held = x.clone()
    held[..., 1:, 1:] = value
    return held


def _paste(x: Tensor) -> Tensor:
    held = x.clone()
    held[:, :, :2] = x.flip(0)[:, :, :2]
    return held


def test_what_is_read_through_numpy_stays_known() -> None:
    trace, batch = _traced()
    _after(trace, lambda: batch.numpy().mean())
    assert trace.codes(batch) is not None


def test_compiled_functions_of_the_loop_give_what_they_give_without_us() -> None:
    trace, batch = _traced()
    compiled = torch.compile(lambda x, y: (x - y).square().mean(), backend="eager")
    loss = _after(trace, lambda: compiled(batch, torch.zeros_like(batch)))
    assert loss.shape == ()


def _put(x: Tensor) -> Tensor:
    held = torch.zeros_like(x)
    held[: len(x) // 2] = x[: len(x) // 2]
    held[len(x) // 2 :] = x[len(x) // 2 :].flip(0)
    return held


@pytest.mark.parametrize("name", MOVES)
def test_what_is_known_of_rows_after_a_function_is_what_they_hold(name: str) -> None:
    trace, batch = _traced()
    result = _after(trace, lambda: MOVES[name](batch))
    codes = trace.codes(result)
    if name in ("sort", "gather"):
        assert codes is None, "numbers of several rows are mixed"
        return
    assert codes is not None
    assert codes[:, 0].tolist() == result.flatten(1)[:, 0].tolist()


@pytest.mark.parametrize("seed", range(60))
def test_rows_are_right_or_unknown_after_many_functions(seed: int) -> None:
    torch.manual_seed(seed)
    draw = random.Random(seed)
    trace, batch = _traced()
    other = _batch(trace, 10)

    def run() -> Tensor:
        value = batch
        for _ in range(6):
            value = MOVES[draw.choice([name for name in MOVES if name != "inner"])](value)
            if draw.random() < 0.3:
                value = torch.cat([value, other])
            if len(value) > 40:
                value = value[:7]
        return value

    result = _after(trace, run)
    codes = trace.codes(result)
    if codes is not None:
        assert len(codes) == len(result)
        for code, row in zip(codes.tolist(), result, strict=True):
            assert code[1] == -1 or set(row.flatten().tolist()) == {float(code[0])}


def test_a_row_that_is_mixed_of_two_samples_is_unknown() -> None:
    trace, batch = _traced()
    mixed = _after(trace, lambda: 0.5 * batch + 0.5 * batch.flip(0))
    codes = trace.codes(mixed)
    assert codes is not None
    assert codes[:, 1].tolist() == [-1] * ROWS


def test_noise_of_the_same_shape_is_no_sample() -> None:
    trace, batch = _traced()
    assert trace.codes(_after(trace, lambda: torch.randn_like(batch) * 2)) is None


def test_a_tensor_that_is_written_to_through_a_view_is_unknown() -> None:
    trace, batch = _traced()
    other = _batch(trace, 10)
    _after(trace, lambda: batch[:2].copy_(other[:2]))
    assert trace.codes(batch) is None


def test_what_goes_through_numpy_is_unknown() -> None:
    trace, batch = _traced()
    assert trace.codes(_after(trace, lambda: torch.from_numpy(batch.numpy().copy()))) is None


@pytest.mark.parametrize("default", [False, True])
def test_modes_of_the_loop_end_as_they_would_without_us(default: bool) -> None:
    trace, _ = _traced()
    before = torch._C._len_torch_function_stack()
    if default:
        torch.set_default_device("meta")
        trace.start()
        torch.set_default_device(None)
    else:
        with torch.device("meta"):
            trace.start()
            assert torch.zeros(1).device.type == "meta"
    assert torch.zeros(1).device.type == "cpu"
    with torch.device("meta"):
        trace.stop()
    assert torch.zeros(1).device.type == "cpu"
    assert torch._C._len_torch_function_stack() == before


def test_a_stop_within_a_function_that_is_seen_takes_the_mode_off_later() -> None:
    trace, _ = _traced()
    leaf = torch.ones(2, requires_grad=True)
    leaf.register_hook(lambda _: trace.stop())
    trace.start()
    leaf.sum().backward()
    trace.stop()
    assert torch._C._len_torch_function_stack() == 0
    trace.start()
    trace.stop()
    assert torch._C._len_torch_function_stack() == 0


def test_tensors_that_are_gone_are_forgotten() -> None:
    trace, batch = _traced()
    for _ in range(100):
        _after(trace, lambda: batch * 2)
    assert len(trace._codes) == 1
