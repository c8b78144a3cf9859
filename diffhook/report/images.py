"""The user's images, wherever they are, by sample id."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from diffhook.analysis.execution import Execution
from diffhook.errors import ConfigurationError
from diffhook.log import RunLog
from diffhook.log.samples import ROLE_STRIDE
from diffhook.report.folder import Folder
from diffhook.report.likeness import MOST, Images, Judgement, Likeness
from diffhook.words import plural

logger = logging.getLogger("diffhook")

_EDGE = 1.001  # of floats, with room for rounding
_IMAGE_KEYS = ("image", "img", "images", "pixel_values", "pixels")


def find_images(
    source: Any, ids: npt.NDArray[np.integer[Any]], names: Mapping[int, str] | None = None
) -> Images | None:
    """What shows the samples of these ids.

    Args:
        source: None; a path (see :func:`load_images`); a function from id to image; a mapping from id
            to image, for some of them or all; or anything with ``len()`` and ``[id]``: an array, a
            list, a dataset of torch or Hugging Face. An item of a dataset may be an image, a tuple
            whose first part is one, or a dict with one under "image", "img", "images", "pixel_values"
            or "pixels". Floats of an array or tensor are of one range, see :func:`load_images`.
        ids: the ids that will be asked for: positions in the source, whatever the training's batches meant
            by them.
        names: id → name, as :meth:`RunLog.names` has them, where samples have names. In a folder their
            files are found by them, see :meth:`~diffhook.report.folder.Folder.by_name`.

    A sample's further rows in a batch, such as the class images of prior preservation, have no image, unless
    a mapping holds one.

    Raises:
        ConfigurationError: nothing of the kind; or fewer images than ids, or none of the names.
    """
    if source is None:
        return None
    told = _told(source)
    if isinstance(source, str | Path):
        source = load_images(source)
    if isinstance(source, Folder) and names:
        return source.by_name(names)
    if isinstance(source, Mapping):
        return source.get
    if hasattr(source, "detach"):  # a tensor, of a torch that a log is read without
        source = source.detach().cpu().numpy()
    if isinstance(source, np.ndarray):
        source = _Array(source)
    if hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        _check_positions(ids[ids < ROLE_STRIDE], names or {}, len(source), told)
        return _of_first_rows(lambda index: _image_of(source[index]))
    if callable(source):
        return _of_first_rows(source)
    raise ConfigurationError(
        f"{told} holds no images; expected a path, a function from id to image, or a dataset"
    )


def images_of_run(
    log: RunLog, source: Any, ids: npt.NDArray[np.integer[Any]], execution: Execution
) -> tuple[Images | None, dict[int, str]]:
    """A run's training images, as :func:`training_images` gives them; without a source the log's own
    thumbnails, which are its samples'. Pictures from elsewhere are checked."""
    if source is None:
        return find_images(log.thumbnails or None, ids), {}
    return training_images(source, ids, log.names(), Likeness.of(log, execution))


def training_images(
    source: Any,
    ids: npt.NDArray[np.integer[Any]],
    names: Mapping[int, str],
    likeness: Likeness | None,
) -> tuple[Images | None, dict[int, str]]:
    """The training's images, checked against what the log knows of them, and the names of their files.

    Args:
        source, ids, names: as for :func:`find_images`. A function from id to image is not checked.
        likeness: what the log knows of each sample; None where it knows nothing.

    Returns:
        The images; one that is not its sample's raises a WrongPictureError. And id → file, where samples have
        no names and the source is a folder.

    Raises:
        ConfigurationError: as for :func:`find_images`; or these are not the pictures that were trained on, in
            the order in which they were.
    """
    found = load_images(source) if isinstance(source, str | Path) else source
    if isinstance(found, Folder) and not names:
        return _in_order(found, ids, likeness)
    images = find_images(found, ids, names)
    told = callable(found) and not hasattr(found, "__getitem__")  # a function is taken at its word
    match = None if images is None or likeness is None or told else likeness.judge(images, bool(names))
    if match is None:
        return images, {}
    if match.fits is False:
        raise ConfigurationError(_mismatch(f"the images of {_told(source)}", match))
    return _told_of(match, f"the images of {_told(source)}"), {}


def _in_order(
    folder: Folder, ids: npt.NDArray[np.integer[Any]], likeness: Likeness | None
) -> tuple[Images, dict[int, str]]:
    """Files by position, in the order that fits the log."""
    own = ids[ids < ROLE_STRIDE]
    count = int(own.max(initial=-1)) + 1
    longest = max(map(len, folder.orders))
    if longest < count:
        _check_positions(own, {}, longest, str(folder.path))
    read = [Folder(folder.path, files) for files in folder.orders if len(files) >= count]
    matches = [
        None if likeness is None else likeness.judge(_of_first_rows(each.__getitem__)) for each in read
    ]
    judged = [(match, each) for each, match in zip(read, matches, strict=True) if match is not None]
    right = sorted((m for m in judged if m[0].fits), key=lambda m: -m[0].share)
    wrong = [match for match, _ in judged if match.fits is False]
    what = f"the {longest:,} image files in {folder.path}"
    if not right and wrong:
        raise ConfigurationError(_mismatch(what, max(wrong, key=lambda match: match.share)))
    if not right and any(each.files[:count] != read[0].files[:count] for each in read):
        raise ConfigurationError(
            f"the image files in {folder.path} can be read in several orders, and the log cannot tell "
            "which the training had: pass a function from id to image, or the dataset itself"
        )
    chosen = right[0][1] if right else read[0]
    images = _told_of(right[0][0], what) if right else _of_first_rows(chosen.__getitem__)
    if len(chosen) > count:
        logger.warning("%s holds %d images; the log knows %d samples", folder.path, len(chosen), count)
    return images, chosen.names(own.tolist())


def _mismatch(what: str, match: Judgement) -> str:
    if (moved := match.displaced) is not None and match.share >= MOST:
        places, later = plural(abs(moved.places), "place"), "later" if moved.places > 0 else "earlier"
        why = f"from sample {moved.first} to {moved.last} the picture that fits comes {places} {later}"
    else:
        why = (
            f"only {match.share:.0%} of those compared have the mean, contrast and roughness that the log "
            "has of their sample"
        )
    return (
        f"{what} are not what was trained on, in that order: {why}. Is a file extra, missing or renamed? "
        "Pass the folder as it was, the dataset itself, or a function from id to image, which is not checked"
    )


def _told_of(match: Judgement, what: str) -> Images:
    """The pictures, after a word on those that are left out."""
    if match.share < 1:
        logger.warning(
            "of %s, %s of those compared are not shown: mean, contrast or roughness is not what the log has",
            what,
            f"{1 - match.share:.1%}",
        )
    return match.checked


def _told(source: Any) -> str:
    return f"{source}" if isinstance(source, str | Path) else f"a {type(source).__name__}"


def _of_first_rows(images: Images) -> Images:
    """No image of a sample's further rows in a batch: a dataset's item does not say which it would be."""
    return lambda sample: None if sample >= ROLE_STRIDE else images(sample)


def _check_positions(
    ids: npt.NDArray[np.integer[Any]], names: Mapping[int, str], count: int, told: str
) -> None:
    last = int(ids.max(initial=-1))
    if last < count:
        return
    if last in names:
        raise ConfigurationError(
            f"{told} has {count} images without names, but the log's samples have names, such as "
            f"{names[last]!r}: name a folder of their files, or pass a function or mapping from id to image "
            "(log.names() says which id has which name)"
        )
    raise ConfigurationError(
        f"{told} has {count} images, but the log knows sample {last}: is it the same dataset?"
    )


def load_images(path: str | Path) -> Sequence[Any]:
    """Images in the order of their ids.

    Args:
        path: a folder of image files, in the order of :class:`~diffhook.report.folder.Folder`; a dataset
            of Hugging Face as ``save_to_disk`` left it; or an .npy array, (N, H, W), (N, H, W, C) or
            (N, C, H, W), of integers in 0 … 255, or of floats that are all in [0, 1] or, if any of all is
            negative, all in [−1, 1]. An image that is not raises a ConfigurationError when it is asked for.

    Raises:
        ConfigurationError: none of these, or nothing in it; datasets is missing.
    """
    path = Path(path)
    if (path / "dataset_dict.json").exists():
        splits = ", ".join(sorted(p.name for p in path.iterdir() if p.is_dir()))
        raise ConfigurationError(f"{path} holds several datasets ({splits}): name the folder of one")
    if (path / "dataset_info.json").exists():
        return _saved_dataset(path)
    if path.is_dir():
        return Folder(path)
    if path.suffix == ".npy" and path.exists():
        return _Array(_read_array(path))
    raise ConfigurationError(
        f"no images at {path}: expected a folder of image files, a saved dataset, or an .npy array"
    )


def _read_array(path: Path) -> npt.NDArray[Any]:
    """Of several images; a single one is told by its colours behind its rows and columns."""
    try:
        array: npt.NDArray[Any] = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ConfigurationError(f"{path} cannot be read as an array of numbers: {error}") from error
    alone = array.ndim == 2 or (array.ndim == 3 and array.shape[-1] <= 4 < min(array.shape[:-1]))
    if alone or array.ndim not in (3, 4) or array.dtype.kind not in "buif":
        one = ". If it is one image, save array[None]" * alone
        raise ConfigurationError(
            f"{path} has shape {array.shape} of {array.dtype}; expected numbers of shape (N, H, W), "
            f"(N, H, W, C) or (N, C, H, W){one}"
        )
    return array


def _saved_dataset(path: Path) -> Sequence[Any]:
    try:
        import datasets
    except ImportError as error:
        raise ConfigurationError(
            f"{path} is a dataset of Hugging Face, which takes the package datasets to read: "
            "pip install 'diffhook[datasets]'"
        ) from error
    dataset: Sequence[Any] = datasets.load_from_disk(str(path))
    return dataset


def _image_of(item: Any) -> Any:
    """The image in a dataset's item."""
    if isinstance(item, tuple | list) and item and not np.isscalar(item[0]):
        return item[0]
    if not isinstance(item, Mapping):
        return item
    for key in _IMAGE_KEYS:
        if key in item:
            image = item[key]
            return _undecoded(image) if isinstance(image, Mapping) else image
    raise ConfigurationError(
        f"an item with {', '.join(map(str, item))}; expected an image under {', '.join(_IMAGE_KEYS)}, or "
        "pass a function from id to image"
    )


def _undecoded(image: Mapping[str, Any]) -> bytes:
    """What Hugging Face's Image(decode=False) gives: the file's bytes, or where it is."""
    content: bytes = image["bytes"] or Path(image["path"]).read_bytes()
    return content


class _Array(Sequence[Any]):
    """Images of one array. Which range its floats have, one image alone cannot tell."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self.array = array
        self.signed = array.dtype.kind == "f" and bool((array < 0).any())

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: Any) -> Any:
        image = self.array[index]
        if image.dtype.kind != "f":
            return image
        low, high = np.fmin.reduce(image, axis=None), np.fmax.reduce(image, axis=None)
        if low < -_EDGE or high > _EDGE:
            raise ConfigurationError(
                f"image {index} of the array has floats from {low:.4g} to {high:.4g}; expected [0, 1], or "
                "[−1, 1] where any is negative: scale them, or save integers from 0 to 255"
            )
        return (image + 1) / 2 if self.signed else image
