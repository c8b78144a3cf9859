"""What a sample id means.

Ids below 2^51 are the run's own: an index in the dataset, or a number found in the batch. A sample
named by a string has a hash of it, the same in every process and every run; the names are kept in
``names/rank-0000.json``. Where a batch holds further rows of a sample (the class images of prior
preservation), row r of a sample has the sample's id + r · 2^51: a sample of its own in every score.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from zarr.abc.store import Store

from diffhook.errors import LogError
from diffhook.log import store as files
from diffhook.log.seal import parse

ROLE = 1 << 51
"""What the id of a sample's second row in a batch is higher by."""

MAX_ROLES = 4  # ids stay below 2^53, so that JSON and float64 keep them exact


def name_id(name: str) -> int:
    """The id of a sample that has a name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) % ROLE


def split_id(sample: int) -> tuple[int, int]:
    """(id of the sample, which of its rows in a batch this is)."""
    role, own = divmod(sample, ROLE)
    return own, role


def read_names(store: Store) -> dict[int, str]:
    """Id → name, of all ranks; empty where samples are numbered.

    Raises:
        LogError: a file of names is damaged.
    """
    found: dict[int, str] = {}
    for entry in files.names(store, "names"):
        place = f"{files.describe(store)}: names/{entry}"
        names = parse(files.get(store, f"names/{entry}") or b"{}", place)
        if not isinstance(names, dict) or not all(
            sample.isdecimal() and isinstance(name, str) for sample, name in names.items()
        ):
            raise LogError(f"{place} is damaged: expected an object of sample id → name")
        found |= {int(sample): name for sample, name in names.items()}
    return found


def names_key(rank: int) -> str:
    return f"names/rank-{rank:04d}.json"


def names_json(names: Mapping[int, str]) -> dict[str, str]:
    return {str(sample): name for sample, name in names.items()}
