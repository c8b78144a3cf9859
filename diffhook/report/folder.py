"""A folder of image files: in order, and by the names that the log has for its samples."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from PIL import Image

from diffhook.errors import ConfigurationError
from diffhook.images import open_image
from diffhook.words import one_line

_TORCHVISION = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
_WHOLE = 2_000  # files up to which each is read whole
_SUFFIXES = _TORCHVISION | {".gif"}


class Folder(Sequence[Any]):
    """A folder of image files, in the first of the orders that datasets read one in.

    Attributes:
        orders: by name, where image files lie in the folder itself; as torchvision's ImageFolder, class
            folder by class folder; and as Hugging Face's imagefolder, by the whole path as text. They differ
            where one folder's name begins another's ("cat" and "cat-2"). Those that are alike are there once.

    Raises:
        ConfigurationError: there are none.
    """

    def __init__(self, path: Path, files: list[Path] | None = None) -> None:
        self.path = path
        self.orders = [files] if files is not None else _orders(path)
        if not self.orders:
            raise ConfigurationError(f"{path} holds no image files ({', '.join(sorted(_SUFFIXES))})")
        self.files = self.orders[0]

    def names(self, ids: Iterable[int]) -> dict[int, str]:
        """Id → the file's path from the folder on, of positions in the order."""
        within = (i for i in ids if 0 <= i < len(self.files))
        return {i: self.files[i].relative_to(self.path).as_posix() for i in within}

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:
        return _read(self.files[index])

    def unreadable(self) -> dict[str, str]:
        """File, from the folder on → what is wrong with it: a link to nothing, no image, half of one. Of very
        many files only the beginning is read, which most tell by."""
        found = {}
        for file in self.files:
            try:
                open_image(file) if len(self) <= _WHOLE else Image.open(file).close()
            except (OSError, SyntaxError, ConfigurationError) as error:
                gone = file.is_symlink() and not file.exists()
                told = f"a link to {os.readlink(file)}, which is not there" if gone else one_line(str(error))
                found[file.relative_to(self.path).as_posix()] = told
        return found

    def by_name(self, names: Mapping[int, str]) -> Callable[[int], Any]:
        """Id → image of a sample that has a name and a file here or further down; None of any other.

        A sample's file is the one whose path its name is, from the folder or as it stands, with or without
        its suffix; or else the only one that is called as the name ends, if no other sample's name ends so.

        Args:
            names: sample id → name.

        Raises:
            ConfigurationError: there is no file of any of them.
        """
        files = _image_files(self.path.rglob("*"))
        by_path = _by(os.path.abspath, files)
        by_end = _by(lambda file: file.name, files)
        ends = Counter(PurePath(name).name for name in names.values())
        found = {}
        for sample, name in names.items():
            file = by_path.get(os.path.abspath(self.path / name)) or by_path.get(os.path.abspath(name))
            if file is None and ends[PurePath(name).name] == 1:
                file = by_end.get(PurePath(name).name)
            if file is not None:
                found[sample] = file
        if not found:
            raise ConfigurationError(
                f"none of the {len(files)} image files in {self.path} has the name of a sample; the log "
                f"knows {next(iter(names.values()))!r}: is it the same dataset?"
            )
        return lambda sample: _read(found[sample]) if sample in found else None


def _by(key: Callable[[Path], str], files: Sequence[Path]) -> dict[str, Path]:
    """The only file of each key; or else the only one that has it without its suffix."""
    found: dict[str, Path] = {}
    for named in ({file: key(file.with_suffix("")) for file in files}, {file: key(file) for file in files}):
        count = Counter(named.values())
        found |= {name: file for file, name in named.items() if count[name] == 1}
    return found


def _orders(path: Path) -> list[list[Path]]:
    every = _image_files(path.rglob("*"))
    own = [file for file in every if file.parent == path]
    classes = [file for file in every if file.parent != path and file.suffix.lower() in _TORCHVISION]

    def by_class(file: Path) -> tuple[str, str, str]:
        return file.relative_to(path).parts[0], str(file.parent), file.name

    candidates = [own, [] if own else sorted(classes, key=by_class), sorted(every, key=str)]
    return [order for i, order in enumerate(candidates) if order and order not in candidates[:i]]


def _image_files(paths: Iterable[Path]) -> list[Path]:
    return sorted(p for p in paths if p.suffix.lower() in _SUFFIXES)


def _read(file: Path) -> Any:
    try:
        return open_image(file)
    except OSError as error:
        raise ConfigurationError(f"cannot read {file}: {error}") from error
