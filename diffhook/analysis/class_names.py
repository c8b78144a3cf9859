"""What a model's class numbers are called: by the labels that the user gives, or the folders of the files."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping

from diffhook.log import RunLog
from diffhook.log.samples import short_names, split_id
from diffhook.words import one_line

_MOST = 0.9  # of a class's samples have its name, or it has none: a few may lie in a wrong folder


def class_names(
    classes: Mapping[int, int], labels: Mapping[int, Hashable] | None, log: RunLog
) -> Callable[[int], str]:
    """Class number → its name in quotes, "class 3" of one without a name.

    Args:
        classes: sample id → class number, −1 where it is not known.
        labels: sample id → label, where the user tells them; otherwise a sample's first folder is its label.
    """
    texts = labels if labels is not None else folders(log.names())
    found: defaultdict[int, Counter[str]] = defaultdict(Counter)
    for sample, number in classes.items():
        own = split_id(sample)[0]
        if number >= 0 and own in texts:
            found[number][one_line(str(texts[own]))] += 1
    named = {}
    for number, counts in found.items():
        text, count = counts.most_common(1)[0]
        if text and count >= _MOST * counts.total():
            named[number] = f"'{text}'"
    if len(set(named.values())) < len(named):  # folders do not divide the classes
        named = {}
    return lambda number: named.get(number, f"class {number}")


def folders(names: Mapping[int, str]) -> dict[int, str]:
    """Sample id → the first folder in which the names differ; "" of a file in none."""
    parts = {sample: name.rpartition("/")[0].partition("/")[0] for sample, name in short_names(names).items()}
    return {sample: parts[sample] for sample in names}
