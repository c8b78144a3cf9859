"""Wherever the user's images are, the sample's own is shown."""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from diffhook.errors import ConfigurationError
from diffhook.report import find_images, load_images, to_image
from diffhook.report.thumbnails import PictureCache, data_uri

IDS = np.arange(3)
PIXELS = np.stack([np.full((6, 5, 3), 40 * index, np.uint8) for index in range(3)])


class Pictures:
    """What a Hugging Face dataset looks like from outside."""

    def __init__(self, column: str) -> None:
        self.column = column

    def __len__(self) -> int:
        return len(PIXELS)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"label": 3, self.column: Image.fromarray(PIXELS[index])}


def _bytes(index: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS[index]).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "source",
    [
        PIXELS,
        list(PIXELS),
        TensorDataset(torch.from_numpy(PIXELS).permute(0, 3, 1, 2), torch.zeros(3)),
        Pictures("image"),
        Pictures("img"),
        [{"image": {"bytes": _bytes(index), "path": None}} for index in range(3)],
        {index: _bytes(index) for index in range(3)},
        lambda index: PIXELS[index],
    ],
    ids=["array", "list", "torch", "hf", "hf-img", "hf-undecoded", "mapping", "function"],
)
def test_each_kind_of_source_gives_the_same_pixels(source: Any) -> None:
    images = find_images(source, IDS)
    assert images is not None
    for index in IDS:
        assert np.array_equal(np.asarray(to_image(images(int(index)))), PIXELS[index])


def test_a_folder_of_folders_is_read_by_path(tmp_path: Path) -> None:
    for index, name in enumerate(["cat/b.png", "cat/c.png", "dog/a.png"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(PIXELS[index]).save(tmp_path / name)
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    images = load_images(tmp_path)
    assert [int(np.asarray(images[i])[0, 0, 0]) for i in range(len(images))] == [0, 40, 80]


def test_the_floats_of_an_array_have_one_range(tmp_path: Path) -> None:
    values = np.stack([np.full((4, 4), value, np.float32) for value in (-1, -0.01, 0.5, 1)])
    np.save(tmp_path / "signed.npy", values)
    np.save(tmp_path / "unit.npy", values[2:])
    np.save(tmp_path / "whole.npy", np.full((1, 4, 4), 128, np.uint8))

    def shades(images: Any) -> list[int]:
        return [int(np.asarray(to_image(image))[0, 0]) for image in images]

    signed, unit = [0, 126, 191, 255], [128, 255]
    assert shades(load_images(tmp_path / "signed.npy")) == signed
    assert shades(load_images(tmp_path / "unit.npy")) == unit
    assert shades(load_images(tmp_path / "whole.npy")) == [128]
    for source in (values, torch.from_numpy(values)):
        images = find_images(source, np.arange(4))
        assert images is not None
        assert shades(map(images, range(4))) == signed


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (PIXELS[:2], "a ndarray has 2 images, but the log knows sample 2: is it the same dataset"),
        (7, "a int holds no images; expected a path, a function from id to image, or a dataset"),
        ("nowhere", "no images at nowhere: expected a folder of image files, a saved dataset, or an .npy"),
    ],
)
def test_what_cannot_be_a_source_is_refused(source: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        find_images(source, IDS)


def test_a_dataset_saved_by_hugging_face_is_read_from_its_folder(tmp_path: Path) -> None:
    files = [{"bytes": _bytes(index), "path": None} for index in range(3)]
    features = datasets.Features({"label": datasets.Value("int64"), "image": datasets.Image()})
    saved = datasets.Dataset.from_dict({"label": [0, 1, 2], "image": files}, features)
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(str(tmp_path))
    images = find_images(tmp_path / "train", IDS)
    assert images is not None
    assert [np.array_equal(np.asarray(to_image(images(i))), PIXELS[i]) for i in range(3)] == [True] * 3
    with pytest.raises(ConfigurationError, match=r"several datasets \(test, train\): name the folder of one"):
        find_images(tmp_path, IDS)


def test_samples_with_names_find_their_files(tmp_path: Path) -> None:
    """Ids are hashes, in no order of the files."""
    places = ["cat/a.png", "cat/b.png", "dog/b.png", "dog/c.png", "top.png"]
    for index, place in enumerate(places):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((4, 4), 40 * index, np.uint8)).save(tmp_path / place)
    names = {
        10: "dog/b.png",  # from the folder
        11: str(tmp_path / "cat/b.png"),  # as it stands
        12: "elsewhere/c.png",  # by its end, which only one file has
        13: "elsewhere/b.png",  # which two have
        14: "x/a.png",  # two samples end so
        15: "y/a.png",
        16: "gone.png",
        17: "top.png",
    }
    images = find_images(tmp_path, np.array([*names, 18]), names)
    assert images is not None
    shades = {
        sample: image and int(np.asarray(image)[0, 0])
        for sample in [*names, 18]
        for image in [images(sample)]
    }
    assert shades == {10: 80, 11: 40, 12: 120, 13: None, 14: None, 15: None, 16: None, 17: 160, 18: None}
    with pytest.raises(ConfigurationError, match=r"none of the 5 image files in .* the log knows 'z.png'"):
        find_images(tmp_path, np.array([1]), {1: "z.png"})
    with pytest.raises(ConfigurationError, match=r"samples have names, such as 'z.png': name a folder"):
        find_images(PIXELS, np.array([9]), {9: "z.png"})


def test_a_saved_dataset_without_the_package_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dataset_info.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'diffhook\[datasets\]'"):
        load_images(tmp_path)


def test_an_undecoded_image_may_be_a_path(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(_bytes(2))
    images = find_images([{"image": {"bytes": None, "path": str(tmp_path / "a.png")}}], np.arange(1))
    assert images is not None
    assert np.array_equal(np.asarray(to_image(images(0))), PIXELS[2])


def test_a_mapping_may_know_only_some() -> None:
    pictures = PictureCache(find_images({1: PIXELS[1]}, IDS))
    known = [pictures(int(index)) for index in IDS]
    assert [made is not None and made.uri != "" for made in known] == [False, True, False]
    pictures.check()


def test_an_item_without_an_image_is_refused() -> None:
    images = find_images(Pictures("photo"), IDS)
    assert images is not None
    with pytest.raises(ConfigurationError, match="an item with label, photo; expected an image under image"):
        images(0)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_thumbnails_keep_shape_and_brightness_in_every_mode(mode: str) -> None:
    image = Image.new("L", (300, 150), 255)
    if mode == "I;16":
        image = Image.fromarray(np.full((150, 300), 65535, np.uint16))
    else:
        image = image.convert("RGB").convert(mode)
    made = _decoded(data_uri(image, 96))
    assert made.size == (96, 48)
    assert np.asarray(made.convert("L")).min() > 250


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_16_bits_a_pixel_are_scaled_to_8(mode: str, tmp_path: Path) -> None:
    deep = (np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.fromarray(deep // 300).save(tmp_path / "dark.png")
    image = Image.open(tmp_path / "deep.png")
    image = Image.fromarray(deep.astype(np.int32), mode) if mode == "I" else image
    assert image.mode == mode
    assert np.array_equal(np.asarray(to_image(image)), deep // 256)
    assert not np.asarray(to_image(Image.open(tmp_path / "dark.png"))).any()


@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.uint16])
def test_integers_from_0_to_255_are_taken_as_such(dtype: Any) -> None:
    values = np.arange(64).reshape(8, 8)
    assert np.array_equal(np.asarray(to_image(values.astype(dtype))), values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.arange(64) * 4.0, r"image 1 of the array has floats from 0 to 252; expected \[0, 1\], or"),
        (np.linspace(-2.5, 1, 64), r"has floats from -2.5 to 1; expected"),
        (np.arange(64) * 1000, "an image of integers from 0 to 63000; expected 0 to 255"),
        (np.arange(64) - 1, "an image of integers from -1 to 62; expected 0 to 255"),
    ],
    ids=["floats to 255", "standardised", "16 bits", "negative"],
)
def test_arrays_of_other_ranges_are_refused(values: Any, message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.stack([np.zeros((8, 8), values.dtype), values.reshape(8, 8)]))
    images = load_images(tmp_path / "images.npy")
    to_image(images[0])
    with pytest.raises(ConfigurationError, match=message):
        to_image(images[1])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            np.zeros((8, 8, 3), np.uint8),
            r"shape \(8, 8, 3\) of uint8.* If it is one image, save array\[None\]",
        ),
        (np.zeros((8, 8)), r"shape \(8, 8\) of float64.* save array\[None\]"),
        (np.zeros((2, 3, 8, 8, 1)), r"shape \(2, 3, 8, 8, 1\).*expected numbers of shape \(N, H, W\)"),
        (np.zeros((2, 8, 8), "U1"), "of <U1; expected numbers"),
        (np.array([1, "a"], dtype=object), "cannot be read as an array of numbers: Object arrays"),
    ],
    ids=["one in colour", "one in grey", "five axes", "texts", "objects"],
)
def test_arrays_that_are_no_images_are_refused(array: Any, message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", array)
    with pytest.raises(ConfigurationError, match=message):
        load_images(tmp_path / "images.npy")


def test_a_file_that_is_no_array_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(ConfigurationError, match="cannot be read as an array of numbers"):
        load_images(tmp_path / "images.npy")


def test_rounding_and_numbers_that_are_none_do_not_count_as_another_range(tmp_path: Path) -> None:
    values = np.array([[[0.0, np.nan], [1.0001, 1.0]]], np.float32)
    np.save(tmp_path / "images.npy", values)
    assert np.asarray(to_image(load_images(tmp_path / "images.npy")[0])).tolist() == [[0, 0], [255, 255]]


def test_tiny_images_keep_every_pixel() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(_decoded(data_uri(pixels)).convert("RGB")), pixels)


def _decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
