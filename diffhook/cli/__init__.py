"""The ``diffhook`` command: thin commands over the library."""

from diffhook.cli.main import main

__all__ = ["main"]
