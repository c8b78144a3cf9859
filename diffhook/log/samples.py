"""What a sample id means.

Ids below 2^51 are the run's own: an index in the dataset, or a number found in the batch. A sample
named by a string has a hash of it, the same in every process and every run; the names are kept in
``names/rank-0000-000.json``. Where batches are collated of further items of a sample (the class images of
prior preservation), item r has the sample's id + r · 2^51: a sample of its own in every score.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import logging
import re
from collections.abc import Mapping
from itertools import islice

from zarr.abc.store import Store

from diffhook.errors import LogError
from diffhook.log import store as files
from diffhook.log.checksum import parse, verified, with_checksum

logger = logging.getLogger("diffhook")

ROOT = "names"
_PART = re.compile(r"rank-(\d{4,6})-(\d{3,6})\.json")
_PART_NAMES = 10_000

ROLE_STRIDE = 1 << 51
"""What the id of a sample's second row in a batch is higher by."""

MAX_ROLES = 4  # ids stay below 2^53, so that JSON and float64 keep them exact

NAMES_AS_THEY_ARE = "diffhook-names"
"""How text files treat encoding errors: the name of a file that is no UTF-8 has the file's own bytes."""


def _encode_anyway(error: UnicodeError) -> tuple[str | bytes, int]:
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeEncodeError:  # of no file: half a character, as JSON may have it
        return codecs.lookup_error("surrogatepass")(error)


codecs.register_error(NAMES_AS_THEY_ARE, _encode_anyway)


def name_id(name: str) -> int:
    """The id of a sample that has a name; also of a file's that is no UTF-8, as Python decodes it."""
    content = name.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()) % ROLE_STRIDE


def split_id(sample: int) -> tuple[int, int]:
    """(id of the sample, which of its rows in a batch this is)."""
    role, own = divmod(sample, ROLE_STRIDE)
    return own, role


def sample_words(sample: int, names: Mapping[int, str] | None = None) -> str:
    """A sample as tables and messages write it: its name or id, "7 (class)" for the second row of 7."""
    own, role = split_id(int(sample))
    return (names or {}).get(own, f"{own}") + ("", " (class)", f" (row {role + 1})")[min(role, 2)]


def short_names(names: Mapping[int, str]) -> dict[int, str]:
    """The names without the folders that all of them begin with."""
    folders = [name[: name.rfind("/") + 1] for name in names.values()] or [""]
    first, last = min(folders), max(folders)  # what these two share, all of them do
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    cut = first.rfind("/", 0, shared) + 1
    return {sample: name[cut:] for sample, name in names.items()}


class NameWriter:
    """Keeps the names of samples in a rank's files, of 10,000 each, so that many are cheap."""

    def __init__(self, store: Store, rank: int) -> None:
        self._store = store
        self._rank = rank
        self._names: dict[int, str] = {}
        self._seen = 0  # of the names
        self._part: dict[int, str] = {}  # what the last file holds, and what is new
        self._number = 0  # of the last file
        self._written = True

    def keep(self, names: dict[int, str]) -> None:
        """Keep these.

        Args:
            names: id → name; may grow from now on, in another thread. Gets what the log has already;
                what is damaged there is told.
        """
        known: dict[int, str] = {}
        keys = name_files(self._store)
        for key in keys:
            try:
                known |= read_name_file(self._store, key)
            except LogError as error:
                logger.warning("names of samples are lost until the run meets them again: %s", error)
        parts = filter(None, (_PART.fullmatch(key.removeprefix(f"{ROOT}/")) for key in keys))
        self._number = max((int(part[2]) + 1 for part in parts if int(part[1]) == self._rank), default=0)
        while files.exists(self._store, self._key):  # a network's listing may come short
            self._number += 1
        self._part = {sample: name for sample, name in names.items() if sample not in known}
        self._written = not self._part
        names |= known
        self._names, self._seen = names, len(names)

    @property
    def _key(self) -> str:
        return f"{ROOT}/rank-{self._rank:04d}-{self._number:03d}.json"

    def flush(self) -> None:
        """Write what is new; the last file is written again as it grows."""
        if len(self._names) > self._seen:
            new = list(dict(self._names).items())[self._seen :]  # a copy: it may grow meanwhile
            self._seen += len(new)
            self._part.update(new)
            self._written = False
        while not self._written:
            names = {str(sample): name for sample, name in islice(self._part.items(), _PART_NAMES)}
            content = json.dumps(with_checksum(names)).encode()
            files.put(self._store, self._key, content)
            self._written = len(self._part) <= _PART_NAMES
            if len(self._part) >= _PART_NAMES:
                self._part = dict(islice(self._part.items(), _PART_NAMES, None))
                self._number += 1


def name_files(store: Store) -> list[str]:
    """Keys of all files of names."""
    return [f"{ROOT}/{name}" for name in files.names(store, ROOT) if _PART.fullmatch(name)]


def read_name_file(store: Store, key: str) -> dict[int, str]:
    """Id → name, of one file.

    Raises:
        LogError: it is damaged.
    """
    place = f"{files.describe(store)}: {key}"
    names = verified(parse(files.get(store, key) or b"", place), place)
    if not all(sample.isdecimal() and isinstance(name, str) for sample, name in names.items()):
        raise LogError(f"{place} is damaged: expected an object of sample id → name")
    return {int(sample): name for sample, name in names.items()}


def read_names(store: Store) -> dict[int, str]:
    """Id → name, of all ranks; empty where samples are numbered.

    Raises:
        LogError: a file of names is damaged.
    """
    found: dict[int, str] = {}
    for key in name_files(store):
        found |= read_name_file(store, key)
    return found
