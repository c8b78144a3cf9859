"""Errors of ours at a random call inside somebody's loop.

``python -m tests.integrations.injection --trials 500 --seed 0`` runs many, and says what reached the loop.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import diffhook
from diffhook.integrations import accelerate, hook
from tests.runs import train

_PACKAGES = (str(Path(diffhook.__file__).parent), str(Path(hook.__file__).parent.resolve()))
# Not injected into: what torch, Accelerate or the loop call first, and the guards themselves. They have
# nothing of ours around them, so an error in one of them would reach the loop.
_SHELL = {
    ("attachment.py", "__call__"),
    ("attachment.py", "replaced"),
    ("backward_watch.py", "backward"),
    ("backward_watch.py", "began"),
    ("backward_watch.py", "ended"),
    ("local_hook.py", "__call__"),
    ("matching.py", "guarded"),
    ("fallback.py", "_backward"),
    ("tape.py", "__call__"),
    ("tape.py", "_backward"),
    ("coverage_check.py", "collect"),
    ("fallback.py", "__torch_function__"),
    ("accelerator_events.py", "_on_batch"),
    ("loaders.py", "_tell"),
    ("loaders.py", "untagged"),
    ("loaders.py", "__getitems__"),
    ("loaders.py", "__call__"),
    ("loaders.py", "__getattr__"),
    ("loaders.py", "__len__"),
}


class Injection:
    """Raises ``error`` at one call of our code; with no number, only counts them."""

    def __init__(self, number: int | None, error: Exception | None = None) -> None:
        self.calls = 0
        self.place = ""
        self._number, self._error = number, error

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        path = frame.f_code.co_filename
        if event != "call" or not path.startswith(_PACKAGES):
            return
        name = frame.f_code.co_name
        if (Path(path).name, name) in _SHELL or name.startswith("<"):
            return
        self.calls += 1
        if self.calls == self._number and self._error is not None:
            self.place = f"{Path(path).name}:{frame.f_lineno} {name}"
            raise self._error


@contextmanager
def _injecting(injection: Injection) -> Iterator[None]:
    """From the first batch to the end of the loop: making the hook may raise."""
    original = accelerate.DiffHook.__init__

    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        sys.settrace(injection)

    accelerate.DiffHook.__init__ = made  # type: ignore[method-assign]
    try:
        yield
    finally:
        sys.settrace(None)
        accelerate.DiffHook.__init__ = original  # type: ignore[method-assign]


def _run(folder: Path | None, injection: Injection) -> list[torch.Tensor]:
    with _injecting(injection):
        run = train(folder, strict=False, epochs=2, accumulation=2, snapshot_every=2)
    return [parameter.detach() for parameter in run.model.parameters()]


def trial(number: int, kind: type[Exception], expected: list[torch.Tensor]) -> str | None:
    """What went wrong when call ``number`` raised; None: nothing."""
    folder = Path(tempfile.mkdtemp())
    injection = Injection(number, kind("injected"))
    try:
        found = _run(folder / "log", injection)
    except Exception as error:
        return f"{injection.place}: {type(error).__name__} reached the loop: {error}"
    finally:
        sys.settrace(None)
        shutil.rmtree(folder, ignore_errors=True)
    if not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)):
        return f"{injection.place}: other weights"
    return None


def trials(count: int, seed: int) -> list[str]:
    """What went wrong in so many trials."""
    expected = _run(None, Injection(None))
    counted = Injection(None)
    with tempfile.TemporaryDirectory() as folder:
        _run(Path(folder, "log"), counted)
    draw = random.Random(seed)
    kinds = (MemoryError, RuntimeError)
    told = (trial(draw.randint(1, counted.calls), kinds[i % 2], expected) for i in range(count))
    return [line for line in told if line is not None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    wrong = trials(args.trials, args.seed)
    print("\n".join(wrong))
    print(f"{args.trials} trials, seed {args.seed}: {len(wrong)} went wrong")


if __name__ == "__main__":
    main()
