"""Items of a batch, and which of them is which where a dataset fetches them all at once."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset

from diffhook.capture.loop.identity.matching import Items, Order

logger = logging.getLogger("diffhook")

Reference = Callable[[], list[Any]]
"""Answers the items that the indices stand for, in their order; none if the dataset gives no single items."""

_SPOT_CHECK = 16  # of so many batches one, once a dataset is known to keep the order
_KNOWN = {"torch", "datasets"}  # whose __getitems__ answers in the order asked for


def reference(dataset: Any) -> Callable[[Sequence[Any]], Reference | None]:
    """How to get the items of indices one by one, as they would be now that several are to be fetched.

    That answers None where a dataset fetches them one by one anyway, or a library does that keeps the order.
    """
    if not getattr(dataset, "__getitems__", None) or _keeps_order(dataset):
        return _none
    return partial(partial, _one_by_one, _copy(dataset), _random_states())


def _none(indices: Sequence[Any]) -> None:
    pass


def _one_by_one(alone: Any, states: tuple[Any, Any, Any], indices: Sequence[Any]) -> list[Any]:
    try:
        with _as_before(states):
            return [alone[index] for index in indices]
    except Exception as error:  # such a dataset may know no single items
        logger.debug("fetching items one by one: %r", error)
        return []


class FetchCheck:
    """Finds out in which order a dataset's own ``__getitems__`` answers.

    Its items are compared with those that it gives one by one, until it is known to keep the order, and now
    and then afterwards. Indices that rise are another matter than others: it may sort them.
    """

    def __init__(self) -> None:
        self._orders = {True: Order(), False: Order()}  # of batches whose indices rise, and of others
        self._batches = 0

    def in_order(self, indices: Sequence[int], items: Any, reference: Reference) -> Any:
        """The items that the indices stand for: ``items`` themselves where that is shown."""
        order = self._orders[all(a < b for a, b in pairwise(indices))]
        self._batches += 1
        complete = isinstance(items, list) and len(items) == len(indices)
        if complete and order.kept and self._batches % _SPOT_CHECK:
            return items
        alone = reference()
        rows = Items(alone, order, indices).match(items).rows
        kept = rows is not None and [indices[row] for row in rows.tolist()] == list(indices)
        return items if complete and kept else alone


def _keeps_order(dataset: Any) -> bool:
    if isinstance(dataset, Subset):
        return not getattr(dataset.dataset, "__getitems__", None) or _keeps_order(dataset.dataset)
    owner = next((kind for kind in type(dataset).__mro__ if "__getitems__" in vars(kind)), type(dataset))
    return owner.__module__.partition(".")[0] in _KNOWN


def _copy(dataset: Any) -> Any:
    """A copy on which the dataset's own counters and generators may move on; [] if it cannot be copied."""
    try:
        alone = copy.copy(dataset)
        for name, value in vars(alone).items():
            if isinstance(
                value, random.Random | np.random.Generator | np.random.RandomState | torch.Generator
            ):
                alone.__dict__[name] = _copied(value)
    except Exception as error:
        logger.debug("copying the dataset: %r", error)
        return []
    return alone


def _copied(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.clone_state()
    return copy.deepcopy(generator)


def _random_states() -> tuple[Any, Any, Any]:
    return random.getstate(), np.random.get_state(), torch.random.get_rng_state()


@contextmanager
def _as_before(states: tuple[Any, Any, Any]) -> Iterator[None]:
    """With the random numbers of before the fetch, so that items are augmented alike; no trace is left."""
    now = _random_states()
    try:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])
        yield
    finally:
        random.setstate(now[0])
        np.random.set_state(now[1])
        torch.random.set_rng_state(now[2])
