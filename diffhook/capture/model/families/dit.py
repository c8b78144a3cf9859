"""DiT: a transformer that is told a class (arXiv 2212.09748)."""

from __future__ import annotations

from diffhook.capture.model.families.family import Family


class DiT(Family):
    """The loss is that of the noise; variances that the model predicts, too, are left alone."""

    pipelines = ("DiTPipeline",)

    @property
    def arguments(self) -> tuple[str, ...]:
        return ("class_labels",)

    @property
    def classes(self) -> int | None:
        return int(self.model.config.num_embeds_ada_norm)
