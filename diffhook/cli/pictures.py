"""Images and captions on disk, as the model takes them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Container, Sequence
from functools import lru_cache
from pathlib import Path, PurePath, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from diffhook.cli.values import read_lines
from diffhook.errors import ConfigurationError
from diffhook.images import to_image
from diffhook.report.folder import Folder
from diffhook.report.images import load_images
from diffhook.words import plural

if TYPE_CHECKING:
    from torch import Tensor

    from diffhook.capture.model.pipeline import SavedPipeline
    from diffhook.log import RunLog


_KEPT = 256  # items


class Pictures(Sequence[Any]):
    """Images as the samples of a dataset, read when they are asked for.

    An item is a tensor (C, H, W) float32 in [−1, 1]; with a pipeline, what it encodes the image and
    its caption to.

    Args:
        path: a folder of images, or an .npy array.
        channels, size: the model's, (H, W); images are resized, and cut to that shape in their middle.
        pipeline: encodes images and captions.
        captions: a file of them (see :func:`read_captions`), or None.
        caption: one for all images, or None.
        class_labels: one for each image, or one for all; or None.

    Raises:
        ConfigurationError: captions or class labels do not fit the images.
    """

    def __init__(
        self,
        path: str | Path,
        channels: int,
        size: tuple[int, int],
        pipeline: SavedPipeline | None = None,
        captions: str | None = None,
        caption: str | None = None,
        class_labels: Sequence[int] | None = None,
    ) -> None:
        self.images = load_images(path)
        self._read = lru_cache(_KEPT)(self._prepared)  # encoding takes long, and probes ask more than once
        self.channels, self.size, self.pipeline = channels, size, pipeline
        self.captions: list[str] | None = None
        if captions is not None:
            self.captions = read_captions(captions, len(self), getattr(self.images, "files", None))
        elif caption is not None:
            self.captions = [caption] * len(self)
        self.class_labels = None if class_labels is None else one_each(class_labels, len(self))

    def __len__(self) -> int:
        return len(self.images)

    @property
    def names(self) -> dict[int, str]:
        """Index → file, of a folder's images; empty where they have no names."""
        return self.images.names(range(len(self))) if isinstance(self.images, Folder) else {}

    def __getitem__(self, index: Any) -> Any:
        return self._read(index)

    def _prepared(self, index: Any) -> Any:
        import torch

        image = self.images[index]
        if isinstance(image, np.ndarray) and not np.isfinite(image).all():
            raise ConfigurationError(
                f"image {index} has values that are NaN or infinite; the model would return NaN alone. "
                "Remove or repair the image"
            )
        pixels = to_pixels(image, self.channels, self.size)
        sample: Any = pixels
        if self.pipeline is not None:
            captions = None if self.captions is None else [self.captions[index]]
            sample = _first(self.pipeline.encode(pixels[None], captions))
        if self.class_labels is None:
            return sample
        named = sample if isinstance(sample, dict) else {"images": sample}
        return {**named, "class_labels": torch.tensor(self.class_labels[index])}


def _first(batch: Any) -> Any:
    """The only sample of a nested batch."""
    return {k: _first(v) for k, v in batch.items()} if isinstance(batch, dict) else batch[0]


def one_each(labels: Sequence[int], count: int) -> list[int]:
    """Class labels for as many images, of one for each or one for all.

    Raises:
        ConfigurationError: there are others.
    """
    if len(labels) not in (1, count):
        raise ConfigurationError(
            f"there are {len(labels)} class labels for {count} images: expected one for each, or one for all"
        )
    return list(labels) * (count if len(labels) == 1 else 1)


def folder_labels(files: Sequence[PurePath], classes: int) -> list[int]:
    """Class labels of images that lie in a folder for each class, in the order of the folders' names.

    Raises:
        ConfigurationError: they do not, or there are more folders than the model has classes.
    """
    folders = sorted({file.parts[0] for file in files if len(file.parts) > 1})
    if not files or any(len(file.parts) < 2 for file in files) or len(folders) > classes:
        raise ConfigurationError(
            f"the model is told one of {classes} classes, and {len(folders)} class folders hold the images: "
            "name the labels with --class-labels"
        )
    return [folders.index(file.parts[0]) for file in files]


def check_readable(images: Any) -> None:
    """Before anything is measured: one bad file would end it somewhere.

    Raises:
        ConfigurationError: files of a folder cannot be read.
    """
    bad = images.unreadable() if isinstance(images, Folder) else {}
    if bad:
        first = next(iter(bad))
        raise ConfigurationError(
            f"{plural(len(bad), 'image file')} of {len(images):,} in {images.path} cannot be read, such as "
            f"{first} ({bad[first]}): remove or repair {'it' if len(bad) == 1 else 'them'}, or name the "
            "folder of the others"
        )


def to_pixels(image: Any, channels: int, size: tuple[int, int]) -> Tensor:
    """(C, H, W) float32 in [−1, 1]: what of that shape is in the image's middle, resized."""
    import torch
    from PIL import Image, ImageOps

    picture = to_image(image).convert("L" if channels == 1 else "RGB")
    picture = ImageOps.fit(picture, size[::-1], Image.Resampling.BILINEAR)
    array = np.asarray(picture, np.float32).reshape(*size, channels) / 127.5 - 1
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def model_format(log: RunLog) -> tuple[int, tuple[int, int]]:
    """Channels, height and width of the images that the log's model takes.

    Raises:
        ConfigurationError: it does not take images.
    """
    from diffhook.capture.model.families import sides

    described = log.config["identity"]["model"]
    config = described.get("config", {})
    channels, size = config.get("in_channels"), config.get("sample_size")
    if channels is None or size is None:
        raise ConfigurationError(
            f"the log does not say which images its model takes ({described['class']}, without in_channels "
            "and sample_size in a config): name the pipeline of the trained model with --pipeline, or call "
            "diffhook.query(..., model=...) with the model's inputs"
        )
    if channels not in (1, 3):
        raise ConfigurationError(
            f"the model takes {channels} channels, which images have not: name the pipeline that encodes "
            "them with --pipeline, or call diffhook.query(...) with the model's inputs"
        )
    return channels, sides(size)


def read_captions(path: str | Path, count: int, files: Sequence[Path] | None = None) -> list[str]:
    """Captions in the order of the images.

    Args:
        path: a text file with a caption a line; or a .jsonl file of objects with "file_name" and
            "text", as image folders on the hub have; "file_name" may begin with folders.
        count: how many there must be.
        files: the images', where they have names.

    Raises:
        ConfigurationError: no such file, or it does not fit the images.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigurationError(f"no captions at {path}: expected a text file, or .jsonl")
    lines = read_lines(path, least=count)
    if path.suffix == ".jsonl":
        return _named_captions(path, lines, files)
    if len(lines) != count:
        raise ConfigurationError(f"{path} has {len(lines)} captions for {count} images: expected one a line")
    return lines


def _named_captions(path: Path, lines: Sequence[str], files: Sequence[Path] | None) -> list[str]:
    if files is None:
        raise ConfigurationError(f"{path} names files, and the images have none: give a caption a line")
    try:
        entries = [json.loads(line) for line in lines if line.strip()]
        texts = {str(PurePosixPath(entry["file_name"])): entry["text"] for entry in entries}
        if not all(isinstance(text, str) for text in texts.values()):
            raise TypeError("a text is none")
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f'{path}: expected "file_name" and "text" on every line: {error}') from error
    names = [_name_among(texts, file) for file in files]
    missing = [file.name for file, name in zip(files, names, strict=True) if name is None]
    if missing:
        raise ConfigurationError(f"{path} has no caption for {missing[0]} ({len(missing)} such)")
    shared = [name for name, times in Counter(names).items() if times > 1]
    if shared:
        raise ConfigurationError(
            f"{path} names {shared[0]}, and several of the images are called so: begin it with the folder"
        )
    return [texts[name] for name in names if name is not None]


def _name_among(names: Container[str], file: Path) -> str | None:
    """What a file is called there: its name, after as many of its folders as are named."""
    found = ("/".join(file.parts[start:]) for start in range(len(file.parts)))
    return next((name for name in found if name in names), None)


def save_pictures(folder: str | Path, images: Any) -> None:
    """Write (N, C, H, W) in [−1, 1] as 00000.png …"""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(np.asarray(images, np.float32)):
        to_image((image + 1) / 2).save(folder / f"{index:05d}.png")
