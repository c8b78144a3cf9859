"""What a person gives: lines of text files, and captions by line or by file name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffhook.cli.pictures import read_captions
from diffhook.cli.values import check_writable, read_lines
from diffhook.errors import ConfigurationError


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ("a cat\u0085 on a mat\na\u2028dog\n", ["a cat\u0085 on a mat", "a\u2028dog"]),
        ("\ufeffa cat\r\na dog", ["a cat", "a dog"]),
        ("a cat\n\na dog\n \n\n", ["a cat", "", "a dog"]),
        ("", []),
    ],
    ids=["other ends of lines", "byte order mark", "blank lines", "nothing"],
)
def test_a_newline_ends_a_line_and_nothing_else(tmp_path: Path, content: str, lines: list[str]) -> None:
    (tmp_path / "lines.txt").write_bytes(content.encode())
    assert read_lines(tmp_path / "lines.txt") == lines


def test_blank_captions_count_where_there_are_images_for_them(tmp_path: Path) -> None:
    (tmp_path / "captions.txt").write_text("a cat\n\n\n")
    assert read_captions(tmp_path / "captions.txt", 1) == ["a cat"]
    assert read_captions(tmp_path / "captions.txt", 3) == ["a cat", "", ""]


def test_text_that_is_not_utf_8_says_where(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("caf\u00e9\nb\n".encode("latin-1"))
    with pytest.raises(ConfigurationError, match=r"latin.txt is not UTF-8: it has byte 0xe9 at position 3"):
        read_captions(tmp_path / "latin.txt", 2)


def named(path: Path, texts: dict[str, object]) -> Path:
    """A metadata.jsonl, as image folders on the hub have."""
    entries = [
        json.dumps({"file_name": name, "text": text}, ensure_ascii=False) for name, text in texts.items()
    ]
    path.write_text("\n".join(entries), encoding="utf-8")
    return path


def test_captions_are_found_by_a_files_name_and_its_folders(tmp_path: Path) -> None:
    path = named(
        tmp_path / "m.jsonl", {"dogs/0.png": "a\u2028dog", "./cats/0.png": "a cat", "1.png": "a bird"}
    )
    files = [Path("data/cats/0.png"), Path("data/dogs/0.png"), Path("data/birds/1.png")]
    assert read_captions(path, 3, files) == ["a cat", "a\u2028dog", "a bird"]


def test_captions_of_no_file_or_of_several_are_refused(tmp_path: Path) -> None:
    files = [Path("cats/0.png"), Path("dogs/0.png")]
    with pytest.raises(ConfigurationError, match=r"names 0\.png, and several of the images are called so"):
        read_captions(named(tmp_path / "m.jsonl", {"0.png": "a cat"}), 2, files)
    with pytest.raises(ConfigurationError, match=r"no caption for 0.png \(1 such\)"):
        read_captions(named(tmp_path / "m.jsonl", {"cats/0.png": "a cat"}), 2, files)
    with pytest.raises(ConfigurationError, match='expected "file_name" and "text" on every line'):
        read_captions(named(tmp_path / "m.jsonl", {"cats/0.png": None}), 2, files)


def test_a_file_that_cannot_be_written_is_told_before_the_work(tmp_path: Path) -> None:
    check_writable(None, str(tmp_path / "new.csv"))
    assert not (tmp_path / "new.csv").exists(), "looking must leave nothing behind"
    (tmp_path / "old.csv").write_text("kept")
    check_writable(str(tmp_path / "old.csv"))
    assert (tmp_path / "old.csv").read_text() == "kept"
    for path in (tmp_path, tmp_path / "no such folder" / "a.csv"):
        with pytest.raises(ConfigurationError, match=f"cannot write {path}"):
            check_writable(str(path))
