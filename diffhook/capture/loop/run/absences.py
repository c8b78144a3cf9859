"""What is not in the log, and why: told where it first happens, counted to the end."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping

from diffhook.capture.loop.identity import Unmatched

logger = logging.getLogger("diffhook")

REASONS = {
    "no-backward": "after each of %d forwards another batch came before a backward did. Validate between "
    "steps, not between a forward and its backward, or without gradients (torch.no_grad()); and call "
    "loss.backward() or accelerator.backward(loss): what torch.autograd.grad returns cannot be split by "
    "sample",
    "no-batch": "the model was trained on a batch that no prepared loader had just given, and it is not "
    "known whose rows it has: such steps are not captured. Name the samples with hook.step(sample_ids=...)",
    "fetched-elsewhere": "batches are fetched in another thread (SimpleTuner's --dataloader_prefetch), from "
    "where it is not seen which one the model is trained on: such steps are not captured. Turn that "
    "off, or name the samples with hook.step(sample_ids=...)",
    "several-parts": "each sample gives the model %d rows, and the loss is no sum of losses of the rows: if "
    "it couples a sample's rows, as those of pairs of preferences (Diffusion-DPO) do, norms, alerts and "
    "scores are of each row's part of the sample's gradient",
    "no-losses": "samples' own losses are not known, because the loss that is differentiated is no weighted "
    "mean of squared, absolute or Huber errors of what the model predicts: they are NaN in the rows, and "
    "alerts, rankings and the throttle see nothing of them. Gradients are as exact as ever",
    "no-forward": "%d batches in a row came on which none of the models that the capture began with was "
    "called: there are no rows of them. If another model is trained now, give it a hook and a log of its own",
    "several-batches": "the model was called on other samples before the backward of the first, and whose "
    "the rows are is not known: such micro-batches are left out. Call a backward for each",
    "double-backward": "the loss depends on a gradient of the model (a gradient penalty), which cannot be "
    "split by sample: such micro-batches are left out",
    "partial-backward": "backward(inputs=...) asks for the gradients of some of the trained parameters only, "
    "and rows are of all: such micro-batches are left out. Choose them with layers=... and freeze the others",
    "several-backwards": "several backwards go through one forward, and a row has the gradient of one: such "
    "micro-batches are left out. Add the losses up, and call one backward",
    "other-parameters": "%d parameters are trained that were not when the capture began (%s), and rows would "
    "leave them out: no further micro-batch is captured. A new hook with a new log captures them",
    "averages": "a second %s: no optimiser moves it, so it is taken for an average of the first (EMA), and "
    "is no part of the rows; models=[...] says which models count",
    "other-models": "%s: trained by an optimiser of its own, and not part of the rows; models=[...] says "
    "which models count",
    "later-model": "%s is trained, and the capture began without it: rows are of the models that it began "
    "with, and such micro-batches are left out. Give it a hook and a log of its own",
}
"""Kind → why its micro-batches are not captured, in words."""


class Absences:
    """Counts micro-batches that were left out, by reason, and tells each reason once."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()  #: kind → micro-batches
        self._told: set[str] = set()

    def leave_out(self, kind: str, reason: str | None = None, *found: object) -> None:
        """A micro-batch is not captured.

        Args:
            kind: of the reason, such as "several-rows"; each kind is told once.
            reason: what was found and what to do, in words; with ``found`` for its %-placeholders. None: that
                of :data:`REASONS`.
        """
        self.count(kind)
        self.tell(kind, reason, *found)

    def count(self, kind: str, micro_batches: int = 1) -> None:
        """So many are not captured, which is told elsewhere, or is the loop's own doing."""
        self.counts[kind] += micro_batches

    def leave_out_rows(self, rows: int, count: int) -> None:
        """The model sees another number of rows than there are ids: wrong rows would be worse than none."""
        if rows % count:
            self.leave_out(
                "other-rows",
                "the batch has %d sample ids, but the model was called on %d rows, and it is not known which "
                "rows are whose: such steps are not captured. A loop that trains a batch in parts enters "
                "hook.step(sample_ids=...) for each of them, or tells it the whole batch, batch=..., whose "
                "parts are followed to the model",
                count,
                rows,
            )
            return
        self.leave_out(
            "several-rows",
            "the model was called on %d rows for %d sample ids, and it is not known which rows are whose: "
            "such steps are not captured. Name every row with hook.step(sample_ids=...): "
            "ids.repeat_interleave(%d) where a sample's rows follow one another, ids.repeat(%d) where whole "
            "batches do",
            rows,
            count,
            rows // count,
            rows // count,
        )

    def leave_out_unnamed(self, found: object) -> None:
        """A step whose samples are not known, for what is found out in their place; None: for no batch."""
        if isinstance(found, Unmatched):
            self.leave_out(found.kind, "such micro-batches are left out: %s", found.reason)
        else:
            self.leave_out("no-batch")

    def tell_models(self, left_out: Mapping[str, Iterable[object]]) -> None:
        """Kind → trained models that count no longer, if there are any."""
        for kind, models in left_out.items():
            if names := ", ".join(sorted({type(model).__name__ for model in models})):
                self.tell(kind, None, names)

    def tell(self, kind: str, reason: str | None = None, *found: object) -> None:
        """Say once what is true of many steps; see :meth:`leave_out`."""
        if kind not in self._told:
            self._told.add(kind)
            logger.warning(REASONS[kind] if reason is None else reason, *found)
