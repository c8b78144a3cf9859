"""Options of every command that goes over a log's rows: where it runs and what it may hold."""

from __future__ import annotations

import argparse
from typing import Any

from diffhook.analysis.execution import Execution
from diffhook.errors import ConfigurationError


def add_execution(command: argparse.ArgumentParser) -> None:
    """``--scheduler`` and ``--memory``."""
    command.add_argument("--scheduler", metavar="ADDRESS", help="a dask scheduler, tcp://host:port")
    command.add_argument(
        "--memory", type=float, default=2.0, metavar="GB", help="what a process may hold (default 2 GB)"
    )


def execution(args: argparse.Namespace) -> Execution:
    """What the options say.

    Raises:
        ConfigurationError: no dask.distributed, nobody at the address, or no memory.
    """
    if not args.memory > 0:
        raise ConfigurationError(f"--memory is {args.memory}; expected a positive number of gigabytes")
    return Execution(_client(args.scheduler), memory=int(args.memory * 1e9), progress=True)


def _client(address: str | None) -> Any:
    if address is None:
        return None
    try:
        from distributed import Client
    except ImportError as error:
        raise ConfigurationError("--scheduler needs distributed: pip install 'diffhook[cluster]'") from error
    try:
        return Client(address, timeout=10)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"no dask scheduler at {address}: {error}") from error
