"""Errors of ours at a random call inside somebody's loop.

``python -m tests.integrations.injection --trials 500 --seed 0`` runs many, and says what reached the loop;
``--last`` injects into the last call of each function instead, where what is left undone stays so.
"""

from __future__ import annotations

import argparse
import logging
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from accelerate import data_loader
from torch import Tensor, nn
from torch.nn.modules import module
from torch.optim import optimizer

import diffhook
from diffhook.errors import LogError
from tests.integrations.injected_loops import HOOKS, LOOPS

_KINDS = (MemoryError, RuntimeError)
# Not injected into. A ``try`` cannot guard the call of the function that it stands in: an error there is the
# caller's, whoever that is.
_GUARD = "holds the try"
_AROUND = "calls what is the loop's own, once, between guarded calls of ours"
_FORWARDS = "calls what is the user's own, and nothing else"
_SHELL = {
    "gradients.guard:Guarded.__call__": _GUARD,
    "capture.loop.watches.attachment:shielded.<locals>.decorate.<locals>.called": _GUARD,
    "capture.loop.watches.surrounded:Layer.__call__": _AROUND,
    "capture.loop.watches.surrounded:Surrounded.__init__.<locals>.stand_in": _AROUND,
    "capture.loop.session.capture:Capture.step": _AROUND,
    "capture.loop.tracing.row_trace:_Mode.__torch_function__": _AROUND,
    "gradients.reuse:_Deliver.backward": _AROUND,
    "gradients.fallback:Fallback.__torch_function__": _AROUND,
    "integrations.accelerate.loaders:_untagging.<locals>.untagged": _AROUND,
    "integrations.accelerate.loaders:_fetched_for": _AROUND,
    "integrations.accelerate.loaders:_IndexedDataset.__getitems__": _AROUND,
    "integrations.accelerate.loaders:_TaggingCollate.__call__": _AROUND,
    "integrations.accelerate.quarantine:_HealthyBatches.__iter__": _AROUND,
    "integrations.accelerate.stand_in:StandIn.__len__": _FORWARDS,
    "integrations.accelerate.stand_in:StandIn.__getattr__": _FORWARDS,
}


class Injection:
    """Raises ``error`` at one call of our code in this thread; with no number, only counts them.

    Args:
        function: whose calls are counted; all functions', by default.
    """

    def __init__(
        self, number: int | None = None, error: Exception | None = None, function: str | None = None
    ) -> None:
        self.calls: Counter[str] = Counter()  #: by function
        self.place = ""
        self._number, self._error, self._function = number, error, function

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        origin = frame.f_globals.get("__name__", "")
        if event != "call" or origin.partition(".")[0] != "diffhook":
            return
        name = f"{origin.removeprefix('diffhook.')}:{frame.f_code.co_qualname}"
        if name in _SHELL or self._function not in (None, name):
            return
        self.calls[name] += 1
        if self._error is not None and self.calls.total() == self._number:
            self.place = f"{name} ({frame.f_lineno})"
            raise self._error


@contextmanager
def _injecting(injection: Injection) -> Iterator[None]:
    """From when the hook is made, which may raise, to the end of the loop."""
    originals = {kind: kind.__init__ for kind in HOOKS}

    def started(kind: type[Any]) -> Any:
        def made(self: Any, *args: Any, **kwargs: Any) -> None:
            originals[kind](self, *args, **kwargs)
            sys.settrace(injection)

        return made

    for kind in HOOKS:
        kind.__init__ = started(kind)
    try:
        yield
    finally:
        sys.settrace(None)
        for kind, original in originals.items():
            kind.__init__ = original


Row = tuple[float, ...]
_COLUMNS = ("step", "sample", "timestep", "lr", "weight", "grad_norm")


def _rows(log: Path) -> list[Row]:
    try:
        table = diffhook.open_log(log).train
    except LogError:  # nothing was captured
        return []
    return list(zip(*(np.asarray(table[name], float).tolist() for name in _COLUMNS), strict=True))


def _odd(found: list[Row], expected: list[Row]) -> list[Row]:
    """Rows that the undisturbed run has not."""
    wanted = {row[:2]: row for row in expected}
    return [row for row in found if not np.allclose(row, wanted.get(row[:2], np.nan), rtol=1e-4)]


@dataclass
class Outcome:
    """What a run leaves: weights, rows, the error that reached the loop, and traces of ours."""

    weights: list[Tensor]
    rows: list[Row]
    reached: Exception | None = None
    left: str = ""


def _run(name: str, injection: Injection, *, watched: bool = True) -> Outcome:
    folder = Path(tempfile.mkdtemp())
    before, shared = torch.autograd.backward, _shared()
    reached, weights, left = None, [], ""
    try:
        with _injecting(injection), redirect_stdout(StringIO()):
            model = LOOPS[name](folder / "log" if watched else None)
        weights = [parameter.detach().clone() for parameter in model.parameters()]
        left = _left_on(model)
    except Exception as error:
        reached = error
    rows = _rows(folder / "log") if watched else []
    shutil.rmtree(folder, ignore_errors=True)
    if _shared() != shared:
        torch.autograd.backward, left = before, left + " something on torch"
    return Outcome(weights, rows, reached, left)


def _shared() -> list[Any]:
    """Where all loops meet."""
    hooks = (module._global_forward_hooks, module._global_forward_pre_hooks)
    steps = (optimizer._global_optimizer_pre_hooks, optimizer._global_optimizer_post_hooks)
    loaders = (data_loader.DataLoaderShard, data_loader.DataLoaderDispatcher, data_loader.SkipDataLoader)
    return [
        torch.autograd.backward,
        Tensor.backward,
        torch._C._len_torch_function_stack(),
        *(kind.__iter__ for kind in loaders),
        *(hook for hung in (*hooks, *steps) for hook in hung.values()),
    ]


def _left_on(model: nn.Module) -> str:
    """What of ours a run has left on its model."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = [hook for m in model.modules() for kind in kinds for hook in getattr(m, kind).values()]
    hooks += [hook for p in model.parameters() for hook in (p._backward_hooks or {}).values()]
    frozen = sum(not parameter.requires_grad for parameter in model.parameters())
    found = {"hooks": len(hooks), "frozen parameters": frozen}
    return ", ".join(f"{count} {name}" for name, count in found.items() if count)


@dataclass
class Trials:
    """What injected errors have done.

    Attributes:
        wrong: what reached a loop, changed a weight, or was left behind.
        rows: that were wrong in the log.
        kept: share of the undisturbed run's rows that each trial has logged.
    """

    wrong: list[str] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)

    def judge(self, found: Outcome, expected: Outcome, place: str, *, rounded: bool) -> None:
        wrong = self._what(found, expected, rounded=rounded)
        if wrong:
            self.wrong.append(f"{place}: {wrong}")
        odd = _odd(found.rows, expected.rows)
        if odd:
            self.rows.append(f"{place}: {len(odd)} wrong rows, such as {odd[0]}")
        self.kept.append((len(found.rows) - len(odd)) / len(expected.rows))

    @staticmethod
    def _what(found: Outcome, expected: Outcome, *, rounded: bool) -> str:
        if found.reached is not None:
            return f"{type(found.reached).__name__} reached the loop: {found.reached}"
        for weight, wanted in zip(found.weights, expected.weights, strict=True):
            if not torch.equal(weight, wanted) and not (
                rounded and torch.allclose(weight, wanted, 1e-4, 1e-6)
            ):
                return "other weights"
        return f"left behind: {found.left}" if found.left else ""


def trials(count: int, seed: int, loops: Sequence[str] = tuple(LOOPS)) -> Trials:
    """Inject so many errors, each into one of the loops in turn."""
    draw = random.Random(seed)
    done = Trials()
    references: dict[str, tuple[Counter[str], Outcome]] = {}
    for number in range(count):
        name = loops[number % len(loops)]
        if name not in references:
            references[name] = _reference(name)
        calls, expected = references[name]
        injection = Injection(draw.randint(1, calls.total()), draw.choice(_KINDS)("injected"))
        found = _run(name, injection)
        done.judge(found, expected, f"{number} {name} {injection.place}", rounded=name == "reused")
    return done


def trials_of_last_calls(loops: Sequence[str]) -> Trials:
    """Inject an error into the last call of each of our functions, in each of the loops."""
    done = Trials()
    for name in loops:
        calls, expected = _reference(name)
        for function, number in calls.items():
            injection = Injection(number, MemoryError("injected"), function)
            found = _run(name, injection)
            done.judge(found, expected, f"{name} {injection.place}", rounded=name == "reused")
    return done


def _reference(name: str) -> tuple[Counter[str], Outcome]:
    """The calls of ours that a run has, by function; its weights without us and its rows with us."""
    counted = Injection()
    watched = _run(name, counted)
    assert watched.reached is None, watched.reached
    assert not watched.left, watched.left
    return counted.calls, Outcome(_run(name, Injection(), watched=False).weights, watched.rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--last", action="store_true", help="the last call of each function instead")
    parser.add_argument("--loops", nargs="+", default=list(LOOPS), choices=list(LOOPS))
    args = parser.parse_args()
    logging.getLogger("diffhook").setLevel(logging.CRITICAL)
    done = trials_of_last_calls(args.loops) if args.last else trials(args.trials, args.seed, args.loops)
    print("\n".join(sorted(done.wrong + done.rows)))
    print(
        f"{len(done.kept)} trials: {len(done.wrong)} reached the loop, changed weights or "
        f"left something behind; {len(done.rows)} logs with wrong rows; "
        f"{sum(done.kept) / len(done.kept):.1%} of rows kept"
    )


if __name__ == "__main__":
    main()
