"""From a batch to the clean samples and the model's other arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from diffhook.errors import ConfigurationError

Inputs = Callable[[Any], tuple[Tensor, dict[str, Any]]]

CLEAN = ("latents", "images", "image", "input", "pixel_values", "img")
CONDITIONS = (
    "class_labels",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "pooled_projections",
    "added_cond_kwargs",
    "captions_to_encode",  # by a model whose text encoder is trained
)
GUIDANCE = "guidance"
SHARED = "shared_arguments"
"""Key of arguments that all samples have alike, such as tokens' positions: name → (B, …), of which the model
is given one row, without the samples' axis."""

_PASSED_ON = (*CONDITIONS, GUIDANCE, SHARED)


def default_inputs(batch: Any) -> tuple[Tensor, dict[str, Any]]:
    """The clean samples of a batch, and the conditions that go with them.

    A tensor is the samples; a tuple or list begins with them, and a dict after them holds
    arguments of the model; in a dict they have a well-known key, such as "latents", "images" or
    "pixel_values", and the model's own names ("class_labels", "encoder_hidden_states",
    "added_cond_kwargs" …) are passed on. In either, so are those under :data:`SHARED`.

    Raises:
        ConfigurationError: none of these is a tensor.
    """
    if isinstance(batch, Tensor):
        return batch, {}
    if isinstance(batch, Mapping):
        for key in CLEAN:
            if isinstance(batch.get(key), Tensor):
                return batch[key], _arguments({name: batch[name] for name in _PASSED_ON if name in batch})
        raise ConfigurationError(
            f"the batch has keys {sorted(map(str, batch))}, none of {', '.join(CLEAN)}: pass "
            "inputs=lambda batch: (clean_samples, model_arguments)"
        )
    if isinstance(batch, tuple | list) and batch and isinstance(batch[0], Tensor):
        conditions = batch[1] if len(batch) > 1 and isinstance(batch[1], Mapping) else {}
        return batch[0], _arguments(conditions)
    raise ConfigurationError(
        f"cannot find clean samples in a batch of type {type(batch).__name__}: pass "
        "inputs=lambda batch: (clean_samples, model_arguments)"
    )


def _arguments(conditions: Mapping[str, Any]) -> dict[str, Any]:
    shared = {name: each[0] for name, each in conditions.get(SHARED, {}).items()}
    return {name: value for name, value in conditions.items() if name != SHARED} | shared


def without_shared(arguments: Mapping[str, Any], batch: Any) -> dict[str, Any]:
    """Of a batch's arguments of the model, those that have a row for each sample."""
    parts = batch if isinstance(batch, tuple | list) else [batch]
    shared = [name for part in parts if isinstance(part, Mapping) for name in part.get(SHARED, ())]
    return {name: value for name, value in arguments.items() if name not in shared}
