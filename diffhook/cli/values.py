"""What a person gives on the command line: counts, lists of numbers, lines of a text file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from diffhook.errors import ConfigurationError


def count(text: str) -> int:
    """A whole number of 0 or more, as the ``type`` of an option."""
    try:
        number = int(text)
    except ValueError:
        number = -1
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text}; expected a whole number, 0 or more")
    return number


def integers(text: str | None, option: str) -> list[int] | None:
    """Of "3,7,12"; None where the option is not given.

    Raises:
        ConfigurationError: it is something else.
    """
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigurationError(f"{option} is {text!r}; expected integers, such as 3,7,12") from error


def numbers(text: str | None, option: str) -> list[float] | None:
    """Of "0.1,3e-4"; None where the option is not given.

    Raises:
        ConfigurationError: it is something else.
    """
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigurationError(f"{option} is {text!r}; expected numbers, such as 0.1,3e-4") from error


def read_lines(path: str | Path, least: int = 0) -> list[str]:
    """Lines of a UTF-8 text file, without a byte order mark and without blank lines at the end.

    A newline ends a line, and nothing else that Unicode has for it: texts may hold that.

    Args:
        path: the file.
        least: so many lines stay, blank or not.

    Raises:
        ConfigurationError: it is not UTF-8.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ConfigurationError(
            f"{path} is not UTF-8: it has byte {byte:#04x} at position {error.start:,}; save it as UTF-8"
        ) from error
    if not lines[-1]:  # the newline that ends the last line
        lines.pop()
    while len(lines) > least and not lines[-1].strip():
        lines.pop()
    return lines


def check_writable(*paths: str | None) -> None:
    """Files that are to be written, before the work that they are for.

    Raises:
        ConfigurationError: one cannot be.
    """
    for path in filter(None, paths):
        existed = Path(path).exists()
        try:
            with open(path, "ab"):
                pass
        except OSError as error:
            raise ConfigurationError(f"cannot write {path}: {error.strerror}") from error
        if not existed:
            Path(path).unlink()


def read_labels(path: str) -> npt.NDArray[np.str_]:
    """Labels of a .npy array, or of a text file's lines.

    Raises:
        ConfigurationError: it holds none.
    """
    found = read_array(path) if path.endswith(".npy") else [line.strip() for line in read_lines(path)]
    return np.asarray(found, str)


def read_array(path: str) -> npt.NDArray[Any]:
    """(n,) the values of a .npy file.

    Raises:
        ConfigurationError: it holds Python objects.
    """
    try:
        found: npt.NDArray[Any] = np.load(path).reshape(-1)
    except ValueError as error:
        raise ConfigurationError(f"{path} is no array of numbers or texts: {error}") from error
    return found
