"""A wrong picture cannot be shown: it is its sample's, or none is."""

from __future__ import annotations

import base64
import contextlib
import io
import logging
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from diffhook.errors import ConfigurationError
from diffhook.images import to_image
from diffhook.integrations.torch import TorchHook
from diffhook.log import RunLog, open_log
from diffhook.log.samples import name_id
from diffhook.report import write_page
from diffhook.report.folder import Folder
from diffhook.report.images import training_images
from diffhook.report.likeness import Likeness, WrongPictureError
from tests.report.logs import photographs, write_log

SAMPLES = 96
SIZE = 16
FOLDERS = ("cat", "cat-2", "cat.3", "dog")
PICTURES = photographs(SAMPLES, SIZE)
Change = Callable[[Path, np.random.Generator], None]


def as_torchvision(root: Path) -> list[Path]:
    """Its own code, written again: class folders in order, and the files of each."""
    return [
        file
        for folder in sorted(p.name for p in root.iterdir())
        for file in sorted((root / folder).iterdir())
    ]


def as_hugging_face(root: Path) -> list[Path]:
    made = datasets.load_dataset(
        "imagefolder", data_dir=str(root), split="train", cache_dir=str(root) + "-cache"
    )
    return [Path(item["image"]["path"]) for item in made.cast_column("image", datasets.Image(decode=False))]


def a_run(root: Path, order: Callable[[Path], list[Path]]) -> RunLog:
    """Files of random names in folders of like names, and a log that knows them in the order of a library."""
    rng = np.random.default_rng(5)
    for number, picture in zip(rng.permutation(10_000), PICTURES, strict=False):
        file = root / "images" / FOLDERS[number % len(FOLDERS)] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(file)
    trained = np.stack([np.asarray(Image.open(file)) for file in order(root / "images")])
    np.save(root / "trained.npy", trained)
    return write_log(root / "log", SAMPLES, 1, alerts=False, images=trained)


def shown(page: Path) -> dict[int, np.ndarray]:
    """Sample → its picture on the page, of those that have one."""
    tiles = re.findall(r'data-sample="(\d+)".*?</li>', page.read_text(), re.DOTALL)
    html = re.findall(r'<li class="tile" data-sample="(\d+)"(.*?)</li>', page.read_text(), re.DOTALL)
    assert len(tiles) == len(html) == SAMPLES
    found = {}
    for sample, tile in html:
        uri = re.search(r"data:image/webp;base64,([^\"]+)", tile)
        if uri:
            picture = Image.open(io.BytesIO(base64.b64decode(uri[1]))).convert("RGB")
            found[int(sample)] = np.asarray(picture)
    return found


def no_wrong_picture(root: Path, log: RunLog) -> int:
    """How many pictures are shown; 0 where the images are refused."""
    page = root / "page.html"
    try:
        write_page(page, log, images=root / "images", queries={})
    except ConfigurationError:
        return 0
    trained = np.load(root / "trained.npy")
    found = shown(page)
    wrong = [sample for sample, picture in found.items() if not np.array_equal(picture, trained[sample])]
    assert wrong == []
    return len(found)


@pytest.mark.parametrize("order", [as_torchvision, as_hugging_face])
def test_a_folder_is_read_in_the_training_s_own_order(
    order: Callable[[Path], list[Path]], tmp_path: Path
) -> None:
    log = a_run(tmp_path, order)
    assert as_torchvision(tmp_path / "images") != as_hugging_face(tmp_path / "images")
    assert order(tmp_path / "images") in Folder(tmp_path / "images").orders
    assert no_wrong_picture(tmp_path, log) == SAMPLES


def extra(images: Path, rng: np.random.Generator) -> None:
    Image.fromarray(255 - PICTURES[0]).save(
        images / str(rng.choice(FOLDERS)) / f"{rng.integers(10_000)}x.png"
    )


def missing(images: Path, rng: np.random.Generator) -> None:
    _any(images, rng).unlink()


def renamed(images: Path, rng: np.random.Generator) -> None:
    file = _any(images, rng)
    file.rename(file.with_name(f"{rng.integers(10_000)}y.png"))


def moved(images: Path, rng: np.random.Generator) -> None:
    file = _any(images, rng)
    file.rename(images / str(rng.choice(FOLDERS)) / f"{file.stem}z.png")


def swapped(images: Path, rng: np.random.Generator) -> None:
    first, second = _any(images, rng), _any(images, rng)
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)


def _any(images: Path, rng: np.random.Generator) -> Path:
    files = sorted(images.rglob("*.png"))
    return files[int(rng.integers(len(files)))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunLog]:
    root = tmp_path_factory.mktemp("trained")
    return root, a_run(root, as_torchvision)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("change", [extra, missing, renamed, moved, swapped])
def test_no_wrong_picture_is_shown_after(
    change: Change, seed: int, trained: tuple[Path, RunLog], tmp_path: Path
) -> None:
    root, log = trained
    shutil.copytree(root / "images", tmp_path / "images")
    shutil.copy(root / "trained.npy", tmp_path)
    rng = np.random.default_rng(seed)
    for _ in range(seed + 1):
        change(tmp_path / "images", rng)
    no_wrong_picture(tmp_path, log)


def test_a_file_under_another_s_name_is_not_shown_as_it(tmp_path: Path) -> None:
    names = [f"{index}.png" for index in range(SAMPLES)]
    log = write_log(tmp_path / "log", SAMPLES, 1, names=names, images=PICTURES)
    (tmp_path / "images").mkdir()
    for name, picture in zip(names, PICTURES, strict=True):
        Image.fromarray(picture).save(tmp_path / "images" / name)
    Image.fromarray(PICTURES[3]).save(tmp_path / "images" / "4.png")
    write_page(tmp_path / "page.html", log, images=tmp_path / "images", queries={})
    page = (tmp_path / "page.html").read_text()
    tile = re.search(r'data-name="4.png".*?</li>', page, re.DOTALL)
    assert tile is not None
    assert ">another picture<" in tile[0]
    assert "not what the training saw: its mean, contrast or roughness is another" in tile[0]


def averaged(picture: Image.Image) -> Image.Image:
    """What ``avg_pool2d`` makes of it, in whole numbers."""
    return picture.resize((SIZE // 2, SIZE // 2), Image.Resampling.BOX)


def resized(picture: Image.Image) -> Image.Image:
    return picture.resize((12, 12), Image.Resampling.BICUBIC)


def centred(picture: Image.Image) -> Image.Image:
    return averaged(ImageOps.fit(picture, (SIZE, SIZE), Image.Resampling.BILINEAR))


def padded(picture: Image.Image) -> Image.Image:
    return averaged(ImageOps.pad(picture, (SIZE, SIZE), Image.Resampling.BILINEAR, color="white"))


def grey(picture: Image.Image) -> Image.Image:
    return averaged(picture.convert("L").convert("RGB"))


LOOPS = (averaged, resized, centred, padded, grey)
Loop = Callable[[Image.Image], Image.Image]


def narrow(number: int, picture: np.ndarray) -> np.ndarray:
    """Of a width of its own."""
    return picture[:, : SIZE - number % 7]


@pytest.fixture(scope="module", params=LOOPS)
def changed_by_its_loop(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, RunLog, list[bytes]]:
    root = tmp_path_factory.mktemp("changed")
    a_run(root, as_torchvision)
    files = as_torchvision(root / "images")
    for number, file in enumerate(files):
        Image.fromarray(narrow(number, np.asarray(Image.open(file)))).save(file)
    trained = np.stack([np.asarray(request.param(Image.open(file))) for file in files])
    log = write_log(root / "changed", SAMPLES, 1, alerts=False, images=trained)
    return root, log, [pixels(Image.open(file)) for file in files]


def pixels(image: Any) -> bytes:
    picture = to_image(image)
    return picture.tobytes() + bytes(picture.size)


def none_wrong(images: Any, log: RunLog, right: Sequence[bytes]) -> int:
    """How many pictures are shown; 0 where the images are refused."""
    ids = np.arange(SAMPLES)
    try:
        found, _ = training_images(images, ids, log.names(), Likeness.of(log))
    except ConfigurationError:
        return 0
    count = 0
    for sample in ids.tolist():
        with contextlib.suppress(WrongPictureError):
            assert pixels(found(sample)) == right[sample], f"a wrong picture of {sample}"
            count += 1
    return count


def test_a_folder_is_known_whatever_its_loop_makes_of_it(
    changed_by_its_loop: tuple[Path, RunLog, list[bytes]],
) -> None:
    root, log, right = changed_by_its_loop
    assert none_wrong(root / "images", log, right) > 0.8 * SAMPLES


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("change", [extra, missing, renamed, moved, swapped])
def test_no_wrong_picture_is_shown_of_a_loop_that_changes_them(
    change: Change, seed: int, changed_by_its_loop: tuple[Path, RunLog, list[bytes]], tmp_path: Path
) -> None:
    root, log, right = changed_by_its_loop
    shutil.copytree(root / "images", tmp_path / "images")
    rng = np.random.default_rng(seed)
    for _ in range(seed + 1):
        change(tmp_path / "images", rng)
    none_wrong(tmp_path / "images", log, right)


@pytest.mark.parametrize("loop", LOOPS)
def test_names_say_whose_a_picture_is(loop: Loop, tmp_path: Path) -> None:
    """Four in ten files hold something else now: those alone are left out."""
    names = [f"{index}.png" for index in range(SAMPLES)]
    files = [Image.fromarray(narrow(number, picture)) for number, picture in enumerate(PICTURES)]
    trained = np.stack([np.asarray(loop(file)) for file in files])
    log = write_log(tmp_path / "log", SAMPLES, 1, names=names, images=trained)
    (tmp_path / "images").mkdir()
    others = [Image.fromarray(picture) for picture in np.ascontiguousarray(PICTURES[::-1, ::-1])]
    for number, name in enumerate(names):
        (others if number % 5 < 2 else files)[number].save(tmp_path / "images" / name)
    ids = np.array([name_id(name) for name in names])
    found, _ = training_images(tmp_path / "images", ids, log.names(), Likeness.of(log))
    shown = []
    for number, sample in enumerate(ids.tolist()):
        with contextlib.suppress(WrongPictureError):
            found(sample)
            shown.append(number)
    assert not [number for number in shown if number % 5 < 2]
    assert len(shown) > 0.5 * SAMPLES


def test_pictures_that_do_not_fit_are_left_out_and_told(
    trained: tuple[Path, RunLog], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root, log = trained
    files = as_torchvision(root / "images")
    right = [pixels(Image.open(file)) for file in files]
    shown = [np.asarray(Image.open(file)) for file in files]
    for number in range(40, 72):  # a whole folder's worth
        shown[number] = 255 - shown[number][::-1] // 2
    assert none_wrong(shown, log, right) == SAMPLES - 32
    assert "33.3% of those compared are not shown" in caplog.text


@pytest.mark.parametrize("change", ["extra", "missing"])
def test_a_shift_is_told_from_pictures_that_changed(change: str, trained: tuple[Path, RunLog]) -> None:
    root, log = trained
    right = [np.asarray(Image.open(file)) for file in as_torchvision(root / "images")]
    where, later = (60, "1 place later") if change == "extra" else (60, "1 place earlier")
    shown = [*right[:where], 255 - right[0], *right[where:]]
    if change == "missing":
        shown = [*right[:where], *right[where + 1 :], right[0]]
    with pytest.raises(ConfigurationError, match=f"from sample 6. to 9. the picture that fits comes {later}"):
        training_images(shown, np.arange(SAMPLES), {}, Likeness.of(log))


@pytest.mark.parametrize("change", ["grey", "larger", "cropped"])
def test_pictures_that_the_loop_changed_are_still_known(change: str, tmp_path: Path) -> None:
    wide = photographs(SAMPLES, 64)
    seen = {"grey": wide, "larger": wide, "cropped": wide[:, 4:60, 4:60]}[change]
    mode = "L" if change == "grey" else "RGB"
    made = [Image.fromarray(x).convert(mode).resize((SIZE, SIZE), Image.Resampling.BOX) for x in seen]
    trained = np.stack([np.asarray(x).reshape(SIZE, SIZE, -1) for x in made])
    log = write_log(tmp_path / "log", SAMPLES, 1, alerts=False, images=trained)
    write_page(tmp_path / "page.html", log, images=wide, queries={})
    assert len(shown(tmp_path / "page.html")) > 0.75 * SAMPLES
    with pytest.raises(
        ConfigurationError, match="a ndarray are not what was trained on, in that order: only"
    ):
        write_page(tmp_path / "page.html", log, images=np.roll(wide, 1, axis=0), queries={})


def test_files_are_named_where_samples_have_no_names(trained: tuple[Path, RunLog], tmp_path: Path) -> None:
    root, log = trained
    write_page(tmp_path / "page.html", log, images=root / "images", queries={})
    page = (tmp_path / "page.html").read_text()
    expected = {file.relative_to(root / "images").as_posix() for file in as_torchvision(root / "images")}
    assert set(re.findall(r'data-name="([^"]+)"', page)) == expected


def test_files_beyond_the_samples_are_told(
    trained: tuple[Path, RunLog], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root, log = trained
    shutil.copytree(root / "images", tmp_path / "images")
    Image.fromarray(PICTURES[0]).save(tmp_path / "images" / "dog" / "zz.png")
    with caplog.at_level(logging.WARNING, "diffhook"):
        write_page(tmp_path / "page.html", log, images=tmp_path / "images", queries={})
    assert f"holds {SAMPLES + 1} images; the log knows {SAMPLES} samples" in caplog.text


def test_an_order_that_nothing_can_tell_is_refused(tmp_path: Path) -> None:
    a_run(tmp_path, as_torchvision)
    log = write_log(tmp_path / "other", SAMPLES, 1, alerts=False)
    with pytest.raises(ConfigurationError, match="can be read in several orders"):
        write_page(tmp_path / "page.html", log, images=tmp_path / "images", queries={})


def test_pictures_of_a_model_without_a_configuration_are_checked_too(tmp_path: Path) -> None:
    """As of most models in plain PyTorch: what the training's batches held says what is compared."""
    model = torch.nn.Conv2d(3, 3, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    hook = TorchHook(tmp_path / "log", model, optimizer, projection_dim=0, strict=True)
    clean = torch.from_numpy(PICTURES).permute(0, 3, 1, 2).float() / 127.5 - 1
    with hook.step(sample_ids=torch.arange(SAMPLES), timesteps=5, batch=clean):
        (model(clean) - clean).square().mean().backward()
    optimizer.step()
    hook.close()
    log = open_log(tmp_path / "log")
    right = [pixels(Image.fromarray(picture)) for picture in PICTURES]
    assert none_wrong(PICTURES, log, right) == SAMPLES
    assert none_wrong(PICTURES[::-1], log, right) == 0
