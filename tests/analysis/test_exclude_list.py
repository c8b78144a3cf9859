"""What a curator selects is what the next run leaves out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import Dataset

import diffhook
from diffhook.errors import ConfigurationError


class Folder(Dataset[Any]):
    """What torchvision's ImageFolder shows of itself."""

    def __init__(self, *files: str) -> None:
        self.samples = [(file, 0) for file in files]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> str:
        return self.samples[index][0]


def listed(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_names_count_from_any_folder_on(tmp_path: Path) -> None:
    files = Folder("/data/cat/7.png", "/data/cat-2/7.png", "/data/dog/cat/8.png", "/data/dog/17.png")
    kept = diffhook.without(files, listed(tmp_path / "exclude.txt", "cat/7.png", "17.png", "17.png"))
    assert list(kept) == ["/data/cat-2/7.png", "/data/dog/cat/8.png"]


def test_ids_are_indices_and_names_may_be_given(tmp_path: Path) -> None:
    letters = list("abcd")
    assert list(diffhook.without(letters, listed(tmp_path / "ids.txt", "0", "2"))) == ["b", "d"]
    names = ["w.png", "x.png", "y.png", "2"]
    assert list(diffhook.without(letters, listed(tmp_path / "n.txt", "2", "w.png"), names=names)) == [
        "b",
        "c",
    ]
    assert list(diffhook.without(letters, listed(tmp_path / "none.txt"))) == letters


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "7.png",
            "names '7.png', which fits 2 samples of the dataset, whose samples have names like 'a/7.png'",
        ),
        ("8.png", "names '8.png', which fits no sample"),
        ("3", "names '3', which fits no sample"),
        ("/7.png", "fits no sample"),
    ],
)
def test_a_line_that_names_no_sample_or_several_is_refused(line: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=message):
        diffhook.without(Folder("a/7.png", "b/7.png"), listed(tmp_path / "exclude.txt", line))
    with pytest.raises(ConfigurationError, match="1 names for a dataset of 2 samples"):
        diffhook.without(Folder("a/7.png", "b/7.png"), listed(tmp_path / "exclude.txt"), names=["a"])
