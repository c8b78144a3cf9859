"""Which row is which item: whatever a collation does, a row is right or it is absent with a reason."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import default_collate

from diffhook.capture.loop.identity.matching import Items, Order, RowMatch
from diffhook.capture.loop.identity.origin import at, pack, unpack
from diffhook.log.samples import ROLE_STRIDE

COUNT = 5


def _image(seed: int, *shape: int) -> Tensor:
    return torch.randn(*(shape or (3, 8, 8)), generator=torch.Generator().manual_seed(seed))


def items(count: int = COUNT) -> list[Any]:
    return [
        {"image": _image(i), "caption": f"picture {i}", "length": (7 * i) % 5, "class": _image(100 + i)}
        for i in range(count)
    ]


def matched(given: list[Any], collate: Callable[[list[Any]], Any], order: Order | None = None) -> Any:
    """The items of the rows, or the reason."""
    before = Items(given, order)
    match = before.match(collate(given))
    return match.kind if match.rows is None else match.rows.tolist()


def _stack(given: list[Any], key: str = "image") -> Tensor:
    return torch.stack([item[key] for item in given])


def _sort_in_place(given: list[Any]) -> Any:
    given.sort(key=lambda item: -item["length"])
    return {"pixels": _stack(given)}


ORDER = list(range(COUNT))
BY_LENGTH = sorted(ORDER, key=lambda i: -((7 * i) % 5))
SHUFFLED = random.Random(4).sample(ORDER, COUNT)
ROWS: dict[str, tuple[Callable[[list[Any]], Any], list[int]]] = {
    "stacked": (lambda e: {"pixels": _stack(e)}, ORDER),
    "concatenated": (lambda e: {"pixels": torch.cat([i["image"][None] for i in e])}, ORDER),
    "by default": (default_collate, ORDER),
    "a tuple": (lambda e: (_stack(e[::-1]), [i["caption"] for i in e[::-1]]), ORDER[::-1]),
    "nested": (lambda e: {"model": {"inputs": [_stack(e[::-1])]}}, ORDER[::-1]),
    "sorted in place": (_sort_in_place, BY_LENGTH),
    "sorted": (lambda e: {"pixels": _stack(sorted(e, key=lambda i: -i["length"]))}, BY_LENGTH),
    "shuffled": (lambda e: {"pixels": _stack([e[i] for i in SHUFFLED])}, SHUFFLED),
    "flipped": (lambda e: {"pixels": _stack(e).flip(0)}, ORDER[::-1]),
    "half": (lambda e: {"pixels": _stack(e[::-1]).half()}, ORDER[::-1]),
    "bfloat16": (lambda e: {"pixels": _stack(e[::-1]).bfloat16()}, ORDER[::-1]),
    "normalised": (lambda e: {"pixels": (_stack(e[::-1]) - 0.4) / 0.3}, ORDER[::-1]),
    "normalised by channel": (
        lambda e: {"pixels": _stack(e[::-1]) * torch.tensor([1.0, 2.0, 3.0])[:, None, None] + 1},
        ORDER[::-1],
    ),
    "normalised and half": (lambda e: {"pixels": ((_stack(e[::-1]) - 0.4) / 0.3).bfloat16()}, ORDER[::-1]),
    "normalised in place": (
        lambda e: {"pixels": torch.stack([i["image"].mul_(0.5).add_(1) for i in e[::-1]])},
        ORDER[::-1],
    ),
    "kept as they are": (lambda e: e[::-1], ORDER[::-1]),
    "a list of tensors": (lambda e: {"pixels": [i["image"] for i in e[::-1]]}, ORDER[::-1]),
    "only captions left": (
        lambda e: {"pixels": torch.rand(COUNT, 3, 8, 8), "text": [i["caption"] for i in e[::-1]]},
        ORDER[::-1],
    ),
    "cut": (lambda e: {"pixels": _stack(e[::-1])[:, :, :6]}, ORDER[::-1]),
    "dropped": (lambda e: {"pixels": _stack(e[:1] + e[2:])}, [0, 2, 3, 4]),
    "refilled": (lambda e: {"pixels": _stack([e[0], e[0], *e[2:]])}, [0, 0, 2, 3, 4]),
    "prior preservation": (
        lambda e: {"pixels": torch.cat([_stack(e), _stack(e, "class")])},
        [*ORDER, *(i + ROLE_STRIDE for i in ORDER)],
    ),
    "prior preservation, sorted": (
        lambda e: {"pixels": torch.cat([_stack(e[::-1]), _stack(e[::-1], "class")])},
        [*ORDER[::-1], *(i + ROLE_STRIDE for i in ORDER[::-1])],
    ),
    "prior preservation, normalised": (
        lambda e: {"pixels": torch.cat([_stack(e[::-1]), _stack(e[::-1], "class")]) * 2 - 1},
        [*ORDER[::-1], *(i + ROLE_STRIDE for i in ORDER[::-1])],
    ),
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_row_is_the_item_whose_content_it_has(kind: str) -> None:
    collate, expected = ROWS[kind]
    assert matched(items(), collate) == expected


ABSENT: dict[str, tuple[Callable[[list[Any]], Any], str]] = {
    "replaced by noise": (lambda e: {"pixels": torch.rand(COUNT, 3, 8, 8)}, "unordered"),
    "refilled from elsewhere": (lambda e: {"pixels": torch.stack([_image(77), *_stack(e[1:])])}, "unordered"),
    "dropped and replaced": (lambda e: {"pixels": torch.rand(COUNT - 1, 3, 8, 8)}, "dropped"),
    "images in one order, captions in another": (
        lambda e: {"pixels": _stack(e[::-1]), "text": [i["caption"] for i in e]},
        "contradiction",
    ),
    "mixed": (lambda e: {"pixels": 0.6 * _stack(e) + 0.4 * _stack(e).roll(1, 0)}, "unordered"),
}


@pytest.mark.parametrize("kind", ABSENT)
def test_what_is_not_shown_is_absent_with_its_reason(kind: str) -> None:
    collate, expected = ABSENT[kind]
    assert matched(items(), collate) == expected


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_sequences_are_known_by_what_was_padded(side: str) -> None:
    given = [{"tokens": _image(i, 3 + i)} for i in range(COUNT)]

    def collate(e: list[Any]) -> Any:
        rows = [i["tokens"] for i in sorted(e, key=lambda i: -len(i["tokens"]))]
        return {"x": pad_sequence(rows, batch_first=True, padding_side=side)}

    assert matched(given, collate) == ORDER[::-1]


def test_images_are_known_through_to_tensor() -> None:
    rng = np.random.default_rng(0)
    for wrap in (np.asarray, Image.fromarray):
        given = [{"image": wrap(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))} for _ in range(COUNT)]

        def collate(e: list[Any]) -> Tensor:
            rows = [torch.from_numpy(np.asarray(i["image"]).copy()).permute(2, 0, 1) for i in e[::-1]]
            return torch.stack(rows).float() / 127.5 - 1

        assert matched(given, collate) == ORDER[::-1]


def test_nearly_equal_images_are_told_apart() -> None:
    base = _image(1)
    given = [{"image": base + 1e-4 * _image(50 + i)} for i in range(COUNT)]
    assert matched(given, lambda e: _stack(e[::-1])) == ORDER[::-1]
    assert matched(given, lambda e: _stack(e[::-1]) * 2 - 1) in (ORDER[::-1], "ambiguous")


def test_images_that_differ_in_one_pixel_are_told_apart() -> None:
    given = [{"image": torch.zeros(3, 64, 64)} for _ in range(COUNT)]
    for number, item in enumerate(given):
        item["image"][0, 31, 2 * number] = 1
    assert matched(given, lambda e: _stack(e[::-1])) == ORDER[::-1]


@dataclass
class Item:
    image: Tensor
    label: int


def test_items_may_be_objects_and_tuples_and_tensors() -> None:
    assert (
        matched([Item(_image(i), 0) for i in ORDER], lambda e: torch.stack([i.image for i in e[::-1]]))
        == (ORDER[::-1])
    )
    assert matched([(_image(i), 3) for i in ORDER], lambda e: default_collate(e[::-1])) == ORDER[::-1]
    assert matched([_image(i) for i in ORDER], lambda e: torch.stack(e[::-1])) == ORDER[::-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_lists_of_lists_of_numbers_are_arrays(dtype: torch.dtype) -> None:
    """As datasets give them that were encoded beforehand: hundreds of lists a row."""
    given = [
        {"embeds": [[7.0, 8.0]] * 77, "latents": (_image(i, 4, 90, 3) * 1000).tolist(), "size": (8, 8)}
        for i in ORDER
    ]

    def collate(e: list[Any]) -> Any:
        return {
            "embeds": torch.tensor([i["embeds"] for i in e]),
            "latents": torch.stack([torch.tensor(i["latents"]) for i in e[::-1]]).to(dtype),
            "size": [i["size"] for i in e],
        }

    assert matched(given, collate) == ORDER[::-1]


def test_two_lists_of_an_item_are_two_values() -> None:
    """Of one length, too: tokens and their mask."""
    given = [([i, 2, 3 * i, 4, 5, i, 7, 9], [1] * 8) for i in ORDER]
    assert (
        matched(given, lambda e: tuple(torch.tensor(each) for each in zip(*e[::-1], strict=True)))
        == (ORDER[::-1])
    )


def _tuples() -> list[Any]:
    """Of images, their originals and how they were altered; and a label."""
    return [((_image(i), _image(i).flip(-1), torch.zeros(9)), i % 2) for i in ORDER]


@pytest.mark.parametrize("order", [ORDER, SHUFFLED])
@pytest.mark.parametrize("nested", [lambda item: item, lambda item: item[:1], lambda item: {"x": item[0]}])
def test_a_tuple_of_values_within_an_item_is_no_batch(nested: Any, order: list[int]) -> None:
    given = [nested(item) for item in _tuples()]
    assert matched(given, lambda e: default_collate([e[i] for i in order])) == order


# ── equal items ───────────────────────────────────────────────────────────────────────────────────


def _twins() -> list[Any]:
    given = [{"image": _image(i)} for i in range(COUNT)]
    given[3] = {"image": given[1]["image"].clone()}
    return given


def test_equal_items_have_the_order_that_the_others_show() -> None:
    assert matched(_twins(), _stack) == ORDER
    assert matched(_twins(), lambda e: _stack(e[1:])) == ORDER[1:]


def test_equal_items_in_a_changed_order_are_ambiguous() -> None:
    assert matched(_twins(), lambda e: _stack(e[::-1])) == "ambiguous"


def test_equal_items_alone_need_a_collation_that_is_known_to_keep_the_order() -> None:
    alike = [{"image": _image(1)} for _ in range(2)]
    order = Order()
    assert matched(alike, _stack, order) == "ambiguous"
    for _ in range(4):
        assert matched(items(), lambda e: {"pixels": _stack(e)}, order) == ORDER
    assert matched(alike, _stack, order) == [0, 1]
    assert matched(items(), lambda e: {"pixels": _stack(e[::-1])}, order) == ORDER[::-1]
    assert matched(alike, _stack, order) == "ambiguous", "it does not always keep it"


def test_items_of_one_index_need_not_be_told_apart() -> None:
    given = [{"image": _image(i)} for i in (1, 1, 2)]
    match = Items(given, labels=[5, 5, 6]).match(_stack(given[::-1]))
    origin = at(torch.tensor([5, 5, 6]), match)
    assert origin.rows is not None
    assert origin.rows.tolist() == [6, 5, 5]


def test_items_that_share_one_value_only_are_no_equals() -> None:
    """Their captions come back and their images do not: whose image it is remains open."""
    captions = ["a", "b", "a", "c", "d"]
    given = [{"image": _image(i), "caption": c} for i, c in enumerate(captions)]
    new = torch.rand(COUNT, 3, 8, 8)
    assert matched(given, lambda e: {"pixels": new, "text": [i["caption"] for i in e]}) == "ambiguous"


@pytest.mark.parametrize("seed", range(30))
def test_no_row_is_ever_wrong_in_random_collations(seed: int) -> None:
    """Rows drop, double, move, turn half; images repeat. What is answered is what was done."""
    rng = random.Random(seed)
    count = rng.randint(1, 8)
    images = [_image(rng.choice([i, i, i, 0])) for i in range(count)]
    given = [{"image": image.clone(), "label": rng.randint(0, 2)} for image in images]
    rows = [rng.randrange(count) for _ in range(rng.randint(1, 10))]
    rows = rng.choice([rows, rng.sample(range(count), count), list(range(count))])
    kind = rng.choice([torch.float32, torch.float16, torch.float64])

    def collate(e: list[Any]) -> Any:
        labels = torch.tensor([e[i]["label"] for i in rows])
        return {"label": labels, "pixels": torch.stack([e[i]["image"] for i in rows]).to(kind)}

    found = matched(given, collate)
    if isinstance(found, list):
        assert [images[i].tolist() for i in found] == [images[i].tolist() for i in rows]
        if sorted(rows) == rows:
            assert found == rows
    else:
        assert found == "ambiguous"
        assert len({tuple(image.flatten().tolist()) for image in images}) < count


# ── ready-made batches ────────────────────────────────────────────────────────────────────────────


def test_parts_of_one_item_are_a_ready_made_batch() -> None:
    latents = [{"latents": _image(i, 4, 16), "keys": list("abcd")} for i in range(2)]
    assert matched(latents[:1], lambda e: e[0]) == "ready-made-batch"
    assert matched(latents, lambda e: torch.cat([i["latents"] for i in e])) == "ready-made-batch"
    assert matched([_image(0, 4, 16)], lambda e: e[0]) == "ready-made-batch"
    assert matched([[_image(0), _image(1)]], lambda e: {"pixels": torch.stack(e[0])}) != [0, 0]


@pytest.mark.parametrize("alike", [False, True])
def test_as_many_parts_of_one_item_as_there_are_items_are_a_ready_made_batch(alike: bool) -> None:
    given = [{"frames": [_image(10 * i + (0 if alike else j)) for j in ORDER]} for i in ORDER]
    assert matched(given, lambda e: torch.stack(e[0]["frames"])) == "ready-made-batch"


# ── what is in the way ────────────────────────────────────────────────────────────────────────────


class _Bad:
    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(name)


@pytest.mark.parametrize(
    "strange",
    [
        None,
        3,
        "text",
        [],
        [None, None],
        [_Bad()],
        [{"x": _Bad()}],
        [{1: {2: {3: {4: {5: 6}}}}}],
        [float("nan")],
    ],
)
def test_no_error_of_ours_reaches_the_loader(strange: Any) -> None:
    for batch in (strange, {"x": strange}, torch.zeros(2, 3), None):
        assert Items(strange).match(batch).kind in (
            "failed",
            "unordered",
            "dropped",
            "ready-made-batch",
            "",
            "ambiguous",
        )


def test_where_rows_came_from_travels_as_one_tensor() -> None:
    indices = torch.tensor([7, 3, 9])
    shown = at(indices, RowMatch(torch.tensor([2, 0, 1 + ROLE_STRIDE])), "data")
    assert shown.rows is not None
    assert shown.rows.tolist() == [9, 7, 3 + ROLE_STRIDE]
    hidden = at(indices, RowMatch(None, "dropped"))
    assert (hidden.rows, hidden.kind) == (None, "dropped")
    assert hidden.indices is not None
    assert hidden.indices.tolist() == [7, 3, 9]
    joined = torch.cat(
        [pack(indices, RowMatch(torch.tensor([0, 1, 2]))), pack(indices, RowMatch(None, "ambiguous"))]
    )
    assert unpack(joined, None).kind == "ambiguous", "known if all are"
