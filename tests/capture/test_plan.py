"""A plan with a budget keeps to it, by what captured steps cost against others."""

from __future__ import annotations

import pytest

from diffhook.capture import Plan
from diffhook.capture.budget import LOG_BYTES, Budget
from diffhook.errors import ConfigurationError


def _run(plan: Plan, steps: int, cost: float, *, start: int = 0, own: float = 0.01) -> tuple[int, list[int]]:
    """Steps of 1 s, captured ones of 1 + cost, of which the hook itself sees only ``own``."""
    captured, strides = 0, []
    for step in range(start, start + steps):
        if plan.captures(step):
            captured += 1
            chosen = plan.finished_step(own, 1 + cost + (3.0 if step == 0 else 0.0))
        else:
            chosen = plan.finished_step(None, 1.0)
        if chosen:
            strides.append(plan.stride)
    return captured, strides


@pytest.mark.parametrize(("cost", "stride"), [(0.5, 12), (0.48, 11), (0.9, 20), (0.01, 2)])
def test_the_stride_keeps_the_cost_within_the_budget(cost: float, stride: int) -> None:
    plan = Plan(budget=Budget(0.05))
    captured, strides = _run(plan, 1000, cost)
    assert strides == [stride]
    assert captured * cost <= 0.05 * 1000 + cost  # calibration included
    later, _ = _run(plan, 1000, cost, start=1000)
    assert later * cost <= 0.05 * 1000 + cost
    assert plan.capture_seconds == pytest.approx((captured + later) * cost, rel=0.1)


def test_the_stride_follows_when_the_cost_changes() -> None:
    plan = Plan(budget=Budget(0.05))
    _run(plan, 2000, 0.5)
    _, strides = _run(plan, 4000, 1.0, start=2000)
    assert strides[-1] == 23


def test_what_a_busy_machine_hid_at_first_is_seen_soon() -> None:
    plan = Plan(budget=Budget(0.05))
    for step in range(9):  # captured steps seem to cost nothing
        plan.captures(step)
        plan.finished_step(0.01 if step % 2 == 0 else None, 1.5)
    assert plan.stride == 2
    _, strides = _run(plan, 60, 0.5, start=9)
    assert strides[-1] == 12


def test_a_fixed_stride_stays() -> None:
    plan = Plan(every=3)
    captured, strides = _run(plan, 30, 0.5)
    assert (captured, strides, plan.stride) == (10, [], 3)


def test_bad_plans_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="every is 0"):
        Plan(every=0)
    with pytest.raises(ConfigurationError, match="overhead is 5; expected a share"):
        Budget(5)


def test_what_happens_between_steps_is_not_counted_as_capture() -> None:
    plan, cost = Plan(every=10), 0.5
    for step in range(1000):
        pause = 60.0 if step % 50 == 0 else 0.0  # a validation before a step that is captured
        if plan.captures(step):
            plan.finished_step(0.01, 1 + cost + pause)
        else:
            plan.finished_step(None, 1.0)
    assert plan.capture_seconds == pytest.approx(100 * cost, rel=0.05)


def test_what_our_own_code_took_is_counted_in_any_case() -> None:
    plan = Plan(every=2)
    for step in range(100):
        own = None if not plan.captures(step) else 30.0 if step == 50 else 0.1
        plan.finished_step(own, 1.0 if own is None else 1.1)
    assert plan.capture_seconds == pytest.approx(49 * 0.1 + 30, rel=0.01)


def test_seconds_of_a_budget_are_spent_on_every_step_at_first() -> None:
    plan = Plan(budget=Budget(0.05, 10.0))
    captured, strides = _run(plan, 2000, 0.5, own=0.5)
    assert strides[0] == 12
    assert plan.capture_seconds >= 10
    assert captured * 0.5 <= Budget(0.05, 10.0).of(2000) + 1
    assert captured > 0.8 * Budget(0.05, 10.0).of(2000) / 0.5, "and it is not saved, either"


def test_where_there_is_no_probe_events_get_its_half() -> None:
    halves, whole = [Plan(budget=Budget(0.1).half) for _ in range(2)]
    whole.allow(Budget(0.1))
    captured = [_run(plan, 2000, 0.5)[0] for plan in (halves, whole)]
    assert 1.8 < captured[1] / captured[0] < 2.2
    fixed = Plan(every=3)
    fixed.allow(Budget(0.1))
    assert _run(fixed, 30, 0.5)[0] == 10


def test_a_log_never_grows_beyond_its_bytes() -> None:
    plan, size = Plan(budget=Budget(0.1, 1e9)), 0.0
    strides = []
    row = LOG_BYTES / 1000
    for step in range(100_000):
        if plan.captures(step):
            size += row
        if plan.filled(int(size)):
            strides.append(plan.stride)
    assert 0.99 * LOG_BYTES < size < 1.01 * LOG_BYTES
    assert strides == [2**n for n in range(1, len(strides) + 1)]


def test_a_stride_that_was_chosen_is_kept_whatever_the_log_holds() -> None:
    plan = Plan(every=3)
    assert not plan.filled(2 * LOG_BYTES)
    assert plan.stride == 3
