"""Tables as Parquet files, for those who have the extra."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffhook.errors import ConfigurationError


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
            "writing Parquet needs pandas and pyarrow: pip install diffhook[parquet]"
        ) from error
    pandas.DataFrame(dict(columns)).to_parquet(path)
