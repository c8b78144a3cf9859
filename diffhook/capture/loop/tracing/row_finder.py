"""Whose rows a model is called on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from diffhook.capture.loop.events import BatchReceived, tensors_of
from diffhook.capture.loop.identity import RowIds, Unmatched
from diffhook.capture.loop.identity.batch_ids import leading
from diffhook.capture.loop.micro_batch import MicroBatch
from diffhook.capture.loop.tracing.codes import are_known, unknown
from diffhook.capture.loop.tracing.fetch_order import FetchOrder
from diffhook.capture.loop.tracing.input_fit import InputFit
from diffhook.capture.loop.tracing.row_trace import RowTrace
from diffhook.capture.samples.appearance import images_of

_MIXED = Unmatched(
    "mixed-rows",
    "a row that the model is called on is made of several samples, or of none that came from the loader. "
    "Name the rows with hook.step(sample_ids=...)",
)
_REORDERED = Unmatched(
    "reordered-rows",
    "the model is called on the rows of hook.step(batch=...) in another order than the batch has, and the "
    "names may be in either. Give both in the order in which the model gets the rows: after pairs of optimal "
    "transport are drawn, for instance",
)
UNSHOWN = Unmatched(
    "not-of-the-batch",
    "what the model is called on was not made of a batch of the loader, as far as that can be followed: not "
    "through numpy, compiled code or another thread, nor from before the last captured step. Whose rows they "
    "are is not known, and such micro-batches are left out. Name them with hook.step(sample_ids=...)",
)


_FIRST_STEPS = 4  # in which it is found out whether the loop uses what it made of a batch after a step


class RowFinder:
    """Knows the batches that came, and finds the rows of a call among them.

    Rows are those that the loop's own operations have brought to the call (:class:`RowTrace`). Where they
    cannot be followed, the batch that came last is presumed: that is believed where it shows no images,
    such as one of PIL images, and where the call's inputs are seen to stem from them (:class:`InputFit`).

    Args:
        shield: through which runs what is called by the loop's own operations.
    """

    def __init__(self, shield: Callable[..., Any]) -> None:
        self.trace = RowTrace(shield)
        self.last: MicroBatch | Unmatched | None = None  #: the batch that came last
        self._order = FetchOrder()
        self._source: object | None = None  # of the batch that came last
        self._fit = InputFit()
        self._named = False  # by the loop itself
        self._given_up = False
        self._follows = False  # from the batch to the optimiser's step
        self._beyond = False  # follow further: the loop uses what it made of a batch after a step
        self._first_steps = _FIRST_STEPS  # still to come
        self._stepped = False  # since the batch came
        self.unused = 0  #: batches of captured steps that have come since a model was called
        self.ahead = True  #: follow batches from the step before a captured one on: not into compiled code,
        # which would be compiled once more for that
        self.wanted: Callable[[], bool] = lambda: False  #: in steps that are not captured, too
        self._shows = False  # images, which can be followed
        self._places = 0  # rows that came
        self._images: deque[tuple[int, Tensor]] = deque(maxlen=2)  # and the place of their first rows

    # ── batches ───────────────────────────────────────────────────────────────────────────────

    def received(self, event: BatchReceived, *, captured: bool, captured_next: bool) -> None:
        """A batch has come.

        Args:
            captured, captured_next: whether the step under way, and the one after it, are: then its way to
                the model is followed.
        """
        self.trace.stop()
        self._order.received(event.source, event.batch)
        self._source, self._named = event.source, event.source is None
        self._shows = self._given_up = self._stepped = False
        self.unused += captured and not self._named
        if not isinstance(event.ids, RowIds):
            self.last = event.ids
            ids, images = None, None
        else:
            ids, images = event.ids.ids, None if event.batch is None else images_of(event.batch)
            self.last = MicroBatch(ids, images, timesteps=event.timesteps)
        if self._named:  # to see whether the loop keeps the order in which it has named them
            self._follows = captured and event.batch is not None
        else:
            self._follows = captured or (self.ahead and (captured_next or self.wanted()))
        if self._follows:
            self._note(event.batch, ids, images)
            self.trace.start()

    def ended(self, source: object | None) -> bool:
        """A pass over a loader is over. Returns whether the batch that came last was of that pass."""
        self._order.ended(source)
        if source is not self._source:
            return False
        if not self._beyond and self._first_steps <= 0:
            self.rest()
        if not self._given_up:
            self.last = None
        return True

    def give_up(self, reason: Unmatched) -> None:
        """The batch that came last is not to be captured."""
        self.last, self._given_up = reason, True

    def pause(self) -> None:
        """Follow nothing within a model's call or a backward."""
        self.trace.stop()

    def resume(self) -> None:
        """Follow on, after one."""
        if self._follows:
            self.trace.start()

    def stepped(self) -> None:
        """An optimiser has stepped: usually the loop is done with the batch."""
        self._stepped = True
        self._first_steps -= 1
        if self._beyond or self._first_steps > 0:
            self.resume()
        else:
            self.rest()

    def rest(self) -> None:
        """Follow nothing until the next batch."""
        self._follows = False
        self.trace.stop()

    def _note(self, batch: Any, ids: Tensor | None, images: Tensor | None) -> None:
        lead = leading(batch) or ()
        rows = len(ids) if ids is not None else lead[0] if lead else 0
        if not rows:
            return
        codes = unknown(rows)
        if ids is not None:
            codes = torch.stack([ids, torch.arange(self._places, self._places + rows)], 1)
            if images is not None:
                self._images.append((self._places, images))
                self.trace.note(images, codes if len(images) == rows else None)
            self._places += rows
        for tensor in tensors_of(batch):
            held = _laid_out(codes, tensor)
            if held is not None and not (self._named and held.dim() > 2):  # frames may be named in any order
                self.trace.note(tensor, held)
                self._shows |= tensor.dim() > held.dim() and _is_image(tensor)

    # ── calls ─────────────────────────────────────────────────────────────────────────────────

    def called(self, values: Iterable[Any]) -> MicroBatch | Unmatched | None:
        """Whose rows a model is called on; ``shown`` is False where the batch that came last is presumed.

        Args:
            values: its arguments, the sample first.
        """
        self.unused = 0
        doubt = self._order.used()
        values = list(values)
        if self._named or self._given_up:
            return self._named_rows(values) if self._named else self.last
        found = self.shown(values)
        if found is not None:
            kept = isinstance(found, Unmatched)  # rows of before, perhaps, that a loop mixes in
            self._beyond = self._beyond or self._stepped or self.last is None or kept
            return found
        self._beyond = self._beyond or self._shows
        if doubt is not None:
            return doubt
        if not isinstance(self.last, MicroBatch) or not self._shows:
            return self.last
        return self.last.knowing(shown=self._fits(self.last, values))

    def used(self) -> None:
        """A model is called without training."""
        self.unused = 0
        self._order.used()

    def shown(self, values: Iterable[Any]) -> MicroBatch | Unmatched | None:
        """Whose rows a call's arguments are shown to be; None where they are not."""
        codes = self.trace.codes_of_call(values)
        if codes is None or self._named or self._given_up:
            return None
        if not are_known(codes):
            return self.last if isinstance(self.last, Unmatched) else _MIXED
        return MicroBatch(codes[:, 0].contiguous(), self._images_at(codes[:, 1]))

    def _named_rows(self, values: list[Any]) -> MicroBatch | Unmatched | None:
        """The named batch, or that part of it that a call is shown to be on, in the batch's order."""
        codes = self.trace.codes_of_call(values) if self._follows and not self._given_up else None
        if codes is None or not isinstance(self.last, MicroBatch) or not are_known(codes):
            return self.last
        count = len(self.last.ids)
        rows = codes[:, 1] - (self._places - count)
        if len(rows) > count or not bool(((rows >= 0) & (rows < count)).all()):
            return self.last
        if bool((rows.diff() <= 0).any()):
            return _REORDERED
        return self.last if len(rows) == count else self._part(self.last, rows)

    def _part(self, named: MicroBatch, rows: Tensor) -> MicroBatch:
        timesteps = named.timesteps
        if timesteps is not None and len(timesteps) == len(named.ids):
            timesteps = timesteps[rows.to(timesteps.device)]
        images = None if named.images is None else named.images[rows.to(named.images.device)]
        return named.knowing(ids=named.ids[rows], images=images, timesteps=timesteps)

    def _fits(self, found: MicroBatch, values: list[Any]) -> bool:
        """Whether inputs are seen to stem from the images of the batches that came last."""
        sample = next((v for v in values if isinstance(v, Tensor) and v.is_floating_point()), None)
        if found.images is None or sample is None or self.trace.codes(found.images) is None:
            return False  # or written to, since they came
        return self._fit.add(found.images, sample) and self._fit.verdict is True

    def _images_at(self, places: Tensor) -> Tensor | None:
        for start, images in self._images:
            if bool(((places >= start) & (places < start + len(images))).all()):
                rows = places - start
                in_order = len(rows) == len(images) and torch.equal(rows, torch.arange(len(rows)))
                return images if in_order else images[rows.to(images.device)]
        return None


def _laid_out(codes: Tensor, tensor: Tensor) -> Tensor | None:
    """Codes of a batch's rows in the shape of a tensor's first axes; None if it has no such axes."""
    if not tensor.dim():
        return None
    if len(tensor) == len(codes):
        return codes
    if tensor.dim() > 1 and tensor.shape[0] * tensor.shape[1] == len(codes):
        return codes.reshape(*tensor.shape[:2], 2)
    return None


def _is_image(tensor: Tensor) -> bool:
    return (tensor.is_floating_point() or tensor.dtype == torch.uint8) and tensor[0].numel() > 1
