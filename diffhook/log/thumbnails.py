"""Small images of samples, by id: only where someone asked for them. Zip files of PNGs."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator, Mapping
from functools import cached_property, lru_cache, partial

from zarr.abc.store import Store

from diffhook.errors import LogError
from diffhook.log import store as files

ROOT = "thumbnails"
_PACK_BYTES = 4 << 20
_LARGEST = 1 << 20
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_ENTRY = re.compile(r"(\d{1,18})\.png")
_PACK = re.compile(r"rank-\d{4,6}-\d{3,6}\.zip")


class ThumbnailWriter:
    """Gathers PNGs into packs of about 4 MiB, one file each, so that thousands are cheap."""

    def __init__(self, store: Store, rank: int) -> None:
        self._store = store
        self._prefix = f"rank-{rank:04d}-"
        own = [name.removeprefix(self._prefix) for name in packs(store) if name.startswith(self._prefix)]
        self._number = max((int(number.removesuffix(".zip")) + 1 for number in own), default=0)
        while files.exists(store, self._key):  # a network's listing may come short
            self._number += 1
        self._pack: dict[int, bytes] = {}
        self._size = 0
        self._written = True

    @property
    def _key(self) -> str:
        return f"{ROOT}/{self._prefix}{self._number:03d}.zip"

    def add(self, sample_id: int, png: bytes) -> None:
        self._size += len(png) - len(self._pack.get(sample_id, b""))
        self._pack[sample_id] = png
        self._written = False
        if self._size >= _PACK_BYTES:
            self.flush()
            self._number += 1
            self._pack, self._size = {}, 0

    def flush(self) -> None:
        """Write the pack at hand; it is written again as it grows."""
        if self._written:
            return
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as pack:
            for sample_id, png in self._pack.items():
                pack.writestr(zipfile.ZipInfo(f"{sample_id}.png"), png)
        files.put(self._store, self._key, buffer.getvalue())
        self._written = True


def check_png(png: bytes) -> bytes:
    """Raises LogError unless ``png`` is a PNG of at most 1 MiB."""
    if not png.startswith(_SIGNATURE) or len(png) > _LARGEST:
        raise LogError(f"a thumbnail of {len(png):,} bytes; expected a PNG of at most {_LARGEST:,}")
    return png


def packs(store: Store) -> list[str]:
    """Names of the packs, in the order in which each rank wrote them."""
    return [name for name in files.names(store, ROOT) if _PACK.fullmatch(name)]


def check_pack(store: Store, name: str) -> None:
    """Read every image of one pack.

    Raises:
        LogError: the pack, or an image, is damaged.
    """
    place = f"{ROOT}/{name}"
    with _naming(place), _read(store, name) as archive:
        for info in archive.infolist():
            _image(archive, info)


def _image(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    if info.compress_type != zipfile.ZIP_STORED or info.file_size > _LARGEST:
        raise LogError(f"an image of {info.file_size:,} bytes, or compressed")
    return check_png(archive.read(info))


def _read(store: Store, name: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(io.BytesIO(files.get(store, f"{ROOT}/{name}") or b""))


class Thumbnails(Mapping[int, bytes]):
    """Sample id → PNG. Of an id that was written twice, the later image. Read when looked at."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._open = lru_cache(maxsize=8)(partial(_read, store))

    def __reduce__(self) -> tuple[type[Thumbnails], tuple[Store]]:
        return Thumbnails, (self._store,)

    def __repr__(self) -> str:
        return f"<thumbnails of {len(self)} samples>"

    @cached_property
    def _where(self) -> dict[int, str]:
        """Sample id → its pack."""
        return {sample_id: pack for pack in packs(self._store) for sample_id in self._entries(pack)}

    def __getitem__(self, sample_id: int) -> bytes:
        pack = self._where[sample_id]
        with _naming(f"{ROOT}/{pack}"):
            archive = self._open(pack)
            return _image(archive, archive.getinfo(f"{sample_id}.png"))

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._where))

    def __len__(self) -> int:
        return len(self._where)

    def _entries(self, pack: str) -> list[int]:
        with _naming(f"{ROOT}/{pack}"):
            matches = [_ENTRY.fullmatch(name) for name in _read(self._store, pack).namelist()]
        return [int(match[1]) for match in matches if match]


class _naming:  # noqa: N801
    """Errors within become LogErrors that name the file."""

    def __init__(self, place: str) -> None:
        self._place = place

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, Exception):
            raise LogError(f"{self._place} is damaged: {error}") from error
