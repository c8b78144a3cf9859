"""An exclude list, as the page and ``diffhook outliers --exclude`` write it, applied to a dataset."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffhook.errors import ConfigurationError
from diffhook.log.samples import NAMES_AS_THEY_ARE
from diffhook.words import brief

if TYPE_CHECKING:
    from torch.utils.data import Subset


def without(dataset: Any, excluded: str | Path, *, names: Sequence[str | int] | None = None) -> Subset[Any]:
    """The dataset without the samples that an exclude list names.

    A file's name may stand there from any folder on: "cat/7.png" is "/data/cat/7.png", if no other sample's
    name ends so.

    Args:
        excluded: a text file, a sample's name or id on each line.
        names: of the dataset's samples, in order. By default the files of a dataset that lists them, as
            torchvision's ImageFolder does in ``samples``; of others, their indices.

    Raises:
        ConfigurationError: a line names no sample, or several; or as many names as samples are not given.

    Example:
        dataset = diffhook.without(ImageFolder("data/cats"), "exclude.txt")
    """
    from torch.utils.data import Subset

    if isinstance(dataset, str | Path) or not isinstance(excluded, str | Path):
        raise ConfigurationError(
            f"the dataset is {brief(dataset)} and the exclude list {brief(excluded)}; expected "
            'without(dataset, "exclude.txt")'
        )
    own = [str(name) for name in (_names(dataset) if names is None else names)]
    if len(own) != len(dataset):
        raise ConfigurationError(f"there are {len(own)} names for a dataset of {len(dataset)} samples")
    out = _places(_lines(excluded), own, str(excluded))
    return Subset(dataset, [i for i in range(len(own)) if i not in out])


def excluded_indices(excluded: str | Path) -> list[int]:
    """The lines of an exclude list of samples that are numbered.

    Raises:
        ConfigurationError: a line is no number.
    """
    lines = _lines(excluded)
    other = next((line for line in lines if not line.isdecimal()), None)
    if other is not None:
        raise ConfigurationError(f"{excluded} names {other!r}; expected the number of a sample on each line")
    return [int(line) for line in lines]


def _lines(excluded: str | Path) -> list[str]:
    content = Path(excluded).read_text(encoding="utf-8", errors=NAMES_AS_THEY_ARE)
    return list(dict.fromkeys(line for line in content.split("\n") if line))


def _names(dataset: Any) -> Sequence[str | int]:
    listed = getattr(dataset, "samples", None)
    if isinstance(listed, list) and all(
        isinstance(each, tuple) and isinstance(each[0], str) for each in listed
    ):
        return [each[0].replace("\\", "/") for each in listed]
    return range(len(dataset))


def _places(lines: Sequence[str], names: Sequence[str], where: str) -> set[int]:
    """Positions of the samples that the lines name."""
    exact, ends = {name: i for i, name in enumerate(names)}, defaultdict(list)
    wanted = set(lines) - set(exact)
    for i, name in enumerate(names) if wanted else ():
        for cut in (place for place, letter in enumerate(name) if letter == "/"):
            if name[cut + 1 :] in wanted:
                ends[name[cut + 1 :]].append(i)
    found = set()
    for line in lines:
        fit = [exact[line]] if line in exact else ends[line]
        if len(fit) != 1:
            many = f"{len(fit)} samples" if fit else "no sample"
            like = f", whose samples have names like {names[0]!r}" if names else ""
            raise ConfigurationError(f"{where} names {line!r}, which fits {many} of the dataset{like}")
        found.add(fit[0])
    return found
