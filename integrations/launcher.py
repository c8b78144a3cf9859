"""Runs a training script that knows nothing of us, with a hook on the Accelerator it makes."""

from __future__ import annotations

import logging
import os
import runpy
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from diffhook.capture.settings import Settings
from diffhook.errors import ConfigurationError, DiffHookError
from diffhook.integrations.accelerate import DiffHook
from diffhook.log.store import Location, settled

logger = logging.getLogger("diffhook")


def launch(
    script: str, arguments: Sequence[str], log: Location, *, module: bool = False, **settings: Any
) -> None:
    """Run ``script`` as ``python script arguments…`` would, watched.

    Args:
        script: a file, or with ``module`` a module's name.
        arguments: the script's own.
        log: where the log goes.
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
    with _attaching(log, settings):
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
def _attaching(log: Location, settings: dict[str, Any]) -> Iterator[None]:
    """While entered, the first Accelerator that is made gets a hook."""
    original = Accelerator.__init__
    hooks: list[DiffHook] = []

    @wraps(original)
    def made(accelerator: Accelerator, *args: Any, **kwargs: Any) -> None:
        original(accelerator, *args, **kwargs)
        if not hooks:
            hooks.append(DiffHook(accelerator, log, **settings))

    Accelerator.__init__ = made
    try:
        yield
    finally:
        Accelerator.__init__ = original
        for hook in hooks:
            hook.close()
    if not hooks:
        logger.warning("diffhook captured nothing: the script made no Accelerator")
