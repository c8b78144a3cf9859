"""Runs a training script that knows nothing of us, with a hook on the Accelerator it makes."""

from __future__ import annotations

import logging
import os
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch.optim.optimizer import register_optimizer_step_post_hook

from diffhook.capture.settings import Settings
from diffhook.errors import ConfigurationError, DiffHookError
from diffhook.integrations.accelerate import DiffHook
from diffhook.integrations.notify import SampleTables
from diffhook.log.store import Location, settled

logger = logging.getLogger("diffhook")


def launch(
    script: str,
    arguments: Sequence[str],
    log: Location,
    *,
    module: bool = False,
    table_every: int | None = None,
    **settings: Any,
) -> None:
    """Run ``script`` as ``python script arguments…`` would, watched.

    Args:
        script: a file, or with ``module`` a module's name.
        arguments: the script's own.
        log: where the log goes.
        table_every: see ``every`` of :class:`~diffhook.integrations.notify.SampleTables`; None: no tables.
        settings: see :class:`~diffhook.capture.settings.Settings`.

    Raises:
        ConfigurationError: there is no such script, or a setting is out of range.
        SystemExit: the script's own, or status 1 after its traceback was printed.
    """
    log = settled(log)
    Settings(**settings)  # bad options are told before the script's imports, which take a while
    if not module and not Path(script).is_file():
        raise ConfigurationError(f"there is no script {script}")
    # As python does: the script's folder comes first, or for a module the working directory.
    sys.path.insert(0, os.getcwd() if module else str(Path(script).resolve().parent))
    sys.argv = [script, *arguments]
    with _attaching(log, settings, table_every):
        try:
            if module:
                runpy.run_module(script, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(script, run_name="__main__")
        except DiffHookError:
            raise
        except Exception:  # the script's own: its traceback is what its author needs
            traceback.print_exc()
            raise SystemExit(1) from None


@contextmanager
def _attaching(log: Location, settings: dict[str, Any], table_every: int | None) -> Iterator[None]:
    """While entered, the first Accelerator made gets a hook; a transformers Trainer, its callback."""
    original = Accelerator.__init__
    attached: list[Callable[[], None]] = []

    @wraps(original)
    def made(accelerator: Accelerator, *args: Any, **kwargs: Any) -> None:
        original(accelerator, *args, **kwargs)
        if attached:
            return
        trainer = _trainer_that_makes_it()
        if trainer is None:
            hook = DiffHook(accelerator, log, **settings)
            attached.append(hook.close)
            if table_every is not None:
                SampleTables(hook, every=table_every)
        else:
            attached.append(_attach_at_train(trainer, log, settings))
            if table_every is not None:
                logger.warning(
                    "no tables of samples: --table-every shows them in an Accelerator's trackers, and a "
                    "transformers Trainer has its own. `diffhook watch LOG` shows the table"
                )

    Accelerator.__init__ = made
    stepping = register_optimizer_step_post_hook(_Telling(attached))
    try:
        yield
    finally:
        stepping.remove()
        Accelerator.__init__ = original
        for close in attached:
            close()
    if not attached:
        logger.warning("diffhook captured nothing: the script made no Accelerator. %s", _OTHERWISE)


_OTHERWISE = (
    "A loop in plain PyTorch names its batches to a diffhook.integrations.torch.TorchHook, whose few lines "
    "go into the script itself; for Lightning there is a callback"
)


class _Telling:
    """Tells in the first step of a training that it is not watched, and not hours later.

    Args:
        attached: empty as long as nothing is.
    """

    def __init__(self, attached: Sequence[object]) -> None:
        self._attached = attached
        self._told = False

    def __call__(self, *_: object) -> None:
        if not (self._told or self._attached):
            self._told = True
            logger.warning(
                "diffhook captures nothing so far: an optimiser steps, and the script has made no "
                "Accelerator, by which diffhook run finds the loop. %s",
                _OTHERWISE,
            )


def _trainer_that_makes_it() -> Any:
    """The transformers Trainer whose constructor is running, if one is."""
    kind = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    frame: Any = None if kind is None else sys._getframe()
    while kind is not None and frame is not None:
        if frame.f_code.co_name == "__init__" and isinstance(frame.f_locals.get("self"), kind):
            return frame.f_locals["self"]
        frame = frame.f_back
    return None


def _attach_at_train(trainer: Any, log: Location, settings: dict[str, Any]) -> Callable[[], None]:
    """Give a Trainer its callback once it is complete. Returns how to close what came of it."""
    from diffhook.integrations.transformers import DiffHookCallback

    train = trainer.train
    callbacks: list[DiffHookCallback] = []

    @wraps(train)
    def watched(*args: Any, **kwargs: Any) -> Any:
        if not callbacks:
            callbacks.append(DiffHookCallback(trainer, log, **settings))
            trainer.add_callback(callbacks[0])
        return train(*args, **kwargs)

    trainer.train = watched

    def close() -> None:
        trainer.__dict__.pop("train", None)
        for callback in callbacks:
            callback.capture.close()

    return close
