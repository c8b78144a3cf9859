"""Tables as Parquet files, for those who have the extra."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffhook.errors import ConfigurationError
from diffhook.words import printable


def write_parquet(path: str | Path, columns: Mapping[str, Any]) -> None:
    """Write columns of equal length.

    Raises:
        ConfigurationError: pandas or pyarrow is not installed.
    """
    try:
        import pandas
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(
            "writing Parquet needs pandas and pyarrow: pip install 'diffhook[parquet]'"
        ) from error
    table = {name: _printable(values) for name, values in columns.items()}
    pandas.DataFrame(table).to_parquet(path)


def _printable(values: Any) -> Any:
    """Texts as Parquet takes them, which are Unicode; everything else as it is."""
    return [printable(v) if isinstance(v, str) else v for v in values] if type(values) is list else values
