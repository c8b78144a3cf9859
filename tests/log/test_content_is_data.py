"""What a log from elsewhere says is data: no command, terminal, list, table or chart obeys it."""

from __future__ import annotations

import csv
import os
import shutil
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffhook import words
from diffhook.analysis.ranking import Ranking
from diffhook.cli import main
from diffhook.errors import ConfigurationError, LogError
from diffhook.images import png, to_image
from diffhook.log import LogWriter, Snapshot, open_log
from diffhook.log.compaction import compact
from diffhook.log.mark import put_attributes
from diffhook.log.testing import CONFIG, some_rows
from diffhook.report.charts import chart
from diffhook.report.images import load_images
from diffhook.report.thumbnails import PictureCache

ESC = "\x1b"
EVIL = f"{ESC}]0;owned{ESC}[2J\x9b31m\u202egnp.exe\r\n\x00"
SECRET = b"-----BEGIN OPENSSH PRIVATE KEY-----"


def a_log(path: Path) -> None:
    """With a bit of everything."""
    writer = LogWriter(path, CONFIG)
    writer.keep_names({sample: f"{EVIL}{sample}.png" for sample in range(8)})
    writer.put("train", some_rows(40))
    writer.put("probe", some_rows(10, step=9))
    writer.snapshot(Snapshot(9, 0.1, 0.9), b"weights")
    writer.alert(
        {"step": 3, "kind": f"$\\frac{{$ {EVIL}", "message": EVIL, "level": "warning", "samples": [1]}
    )
    writer.thumbnail(3, png(np.zeros((4, 4), np.uint8), 4))
    writer.record("plan.json", {"text": [EVIL]})
    writer.record("summary.json", {"parameters_left_out": {EVIL: EVIL}})
    writer.close()


def files_of(path: Path) -> list[str]:
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())


def _link(place: Path, outside: Path) -> None:
    os.symlink(outside, place)


def _pipe(place: Path, outside: Path) -> None:
    os.mkfifo(place)


def _device(place: Path, outside: Path) -> None:
    os.symlink("/dev/zero", place)


COMMANDS = ("info", "compact", "repair")  # read everything; tests/log/fuzz.py has the others
PLACES = (
    "zarr.json", "plan.json", "train/rank-0000/zarr.json", "train/rank-0000/projection/c/0/0",
    "train/rank-0000/loss/zarr.json", "snapshots/step-00000009/snapshot.json",
    "snapshots/step-00000009/parameters.safetensors", "names/rank-0000-000.json",
    "thumbnails/rank-0000-000.zip", "alerts/rank-0000.jsonl",
)  # fmt: skip


def command(name: str, log: Path, out: Path) -> list[str]:
    if name == "compact":
        return ["compact", str(log), "--out", str(out)]
    return ["verify", str(log), "--repair"] if name == "repair" else [name, str(log)]


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes in folders")
@pytest.mark.parametrize("replacement", [_link, _pipe, _device], ids=lambda make: make.__name__[1:])
def test_links_pipes_and_devices_in_a_log_are_followed_by_no_command(
    replacement: Callable[[Path, Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Commands that need the file say so; the secret is in no output and in no copy."""
    a_log(tmp_path / "log")
    secret = tmp_path / "id_ed25519"
    secret.write_bytes(SECRET)
    assert set(PLACES) <= set(files_of(tmp_path / "log"))
    for key in PLACES if replacement is _link else PLACES[:4:3]:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(tmp_path / "log", tmp_path / "copy")
        (tmp_path / "copy" / key).unlink()
        replacement(tmp_path / "copy" / key, secret)
        for name in COMMANDS:
            began = time.monotonic()
            assert main(command(name, tmp_path / "copy", tmp_path / "out")) in (0, 1, 2)
            assert time.monotonic() - began < 10
            for copied in (tmp_path / "out").rglob("*"):
                assert copied.is_dir() or SECRET not in copied.read_bytes()
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
        told = capsys.readouterr()
        assert SECRET.decode() not in told.out + told.err
        assert ESC not in told.out + told.err
        if key in ("plan.json", "zarr.json"):
            assert "is no regular file: links, pipes and devices in a log are not followed" in told.err
    assert secret.read_bytes() == SECRET


@pytest.mark.parametrize(
    "folder", ["train", "train/rank-0000/loss", "snapshots", "queries", "names", "alerts"]
)
def test_a_folder_that_is_a_link_is_not_entered(folder: str, tmp_path: Path) -> None:
    a_log(tmp_path / "elsewhere")
    a_log(tmp_path / "log")
    shutil.rmtree(tmp_path / "log" / folder, ignore_errors=True)
    (tmp_path / "elsewhere" / folder).mkdir(exist_ok=True)
    os.symlink(tmp_path / "elsewhere" / folder, tmp_path / "log" / folder)
    before = files_of(tmp_path / "elsewhere")
    with pytest.raises(LogError, match="no regular file"):
        compact(tmp_path / "log", tmp_path / "out", progress=False)
    with pytest.raises(LogError, match="symbolic link"):
        LogWriter(tmp_path / "log", CONFIG)
    assert files_of(tmp_path / "elsewhere") == before
    assert not (tmp_path / "out").exists()


def test_no_output_holds_what_a_terminal_would_obey(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a_log(tmp_path / "log")
    for arguments in (
        ["info"], ["verify"], ["alerts"], ["alerts", "--follow"], ["bias"],
        ["outliers", "--html", str(tmp_path / "page.html")],
        ["info", "--json"], ["alerts", "--json"], ["outliers", "--json"],
    ):  # fmt: skip
        assert main([arguments[0], str(tmp_path / "log"), *arguments[1:]]) == 0
        told = capsys.readouterr()
        assert not set(told.out + told.err) & {ESC, "\x9b", "\u202e", "\x00", "\r"}, arguments
    page = (tmp_path / "page.html").read_bytes()
    assert not any(byte in page for byte in (b"\x1b", b"\x00", "\x9b".encode(), "\u202e".encode()))


def test_an_error_that_quotes_a_log_is_printable() -> None:
    assert str(LogError(f"bad {EVIL}")) == (r"bad \x1b]0;owned\x1b[2J\x9b31m\u202egnp.exe\r" + "\n" + r"\x00")
    assert words.one_line("a\nb\tc") == r"a\nb\tc"


def test_a_name_of_two_lines_is_one_entry_of_an_exclude_list(tmp_path: Path) -> None:
    names = {1: "a.png\nb.png", 2: "c.png", 3: "d\x0b.png"}
    ranking = Ranking.sort(np.array([1, 2, 3]), np.array([3.0, 2.0, 1.0]), [()] * 3, "t", names=names)
    ranking.exclude(tmp_path / "out.txt", 3)
    assert (tmp_path / "out.txt").read_text().splitlines() == ["1", "c.png", "3"]


@pytest.mark.parametrize("name", ["=HYPERLINK(1)", "+1", "-1", "@SUM(1)", "\t=1", "\r=1"])
def test_a_name_is_no_formula_in_a_table(name: str, tmp_path: Path) -> None:
    ranking = Ranking.sort(np.array([1]), np.array([3.0]), [("=1",)], "t", names={1: name})
    ranking.to_csv(tmp_path / "out.csv")
    with open(tmp_path / "out.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["name"], row["reasons"]) == (f"'{name}", "'=1")


def test_a_dollar_in_a_chart_is_a_dollar() -> None:
    drawn = chart(lambda axes: axes.set_xlabel("$\\frac{$"), "a title")
    assert "$\\frac{$" in drawn


def _bomb(width: int, height: int) -> bytes:
    """A PNG of one bit a pixel, whose rows are not even there."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_100, 20_000, 100_000])
def test_an_image_that_claims_more_pixels_than_anyone_shows_is_told_and_not_decoded(
    side: int, tmp_path: Path
) -> None:
    bomb = _bomb(side, side)
    with pytest.raises(ConfigurationError, match=r"image"):
        to_image(bomb)
    (tmp_path / "0.png").write_bytes(bomb)
    Image.new("L", (8, 8)).save(tmp_path / "1.png")
    images = load_images(tmp_path)
    thumbnails = PictureCache(images.__getitem__)
    made = [thumbnails(sample) for sample in (0, 1)]
    assert [bool(m and m.uri) for m in made] == [False, True], "told of the one image"
    assert made[0] is not None
    assert "image" in made[0].problem


def test_reading_is_linear_in_the_bytes_of_the_log(tmp_path: Path) -> None:
    a_log(tmp_path / "log")
    log = open_log(tmp_path / "log")
    (group,) = log.train.groups
    many = 20_000
    lost = [[n % 40, n % 40] for n in range(many)]
    sessions = [{**group.sessions[0], "parent": n - 1 if n else None, "first_row": 0} for n in range(many)]
    for liar in (group, log.probe.groups[0]):
        lies = {**liar.attributes, "lost": lost, "sessions": sessions}
        put_attributes(log.writable_store(), liar.path, lies)
    code = f"from diffhook.cli import main; main(['info', {str(tmp_path / 'log')!r}, '--json'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=True)
    assert done.stdout


def test_litter_of_names_is_cleaned_by_the_next_run(tmp_path: Path) -> None:
    a_log(tmp_path / "log")
    litter = tmp_path / f"log/names/rank-0000-000.json.{'0' * 32}.partial"
    litter.write_bytes(b"half")
    LogWriter(tmp_path / "log", CONFIG).close()
    assert not litter.exists()
