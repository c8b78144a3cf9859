"""What identifies a run, for the log's configuration."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import Tensor, nn
from torch.utils.data import IterableDataset

from diffhook.capture import Objective
from diffhook.capture.model.adapter import describe_adapters
from diffhook.compat.fsdp import plain_class
from diffhook.gradients import PerSampleGradients, Sketch
from diffhook.gradients.compiled import without_wrappers
from diffhook.log.schema import json_like

_LIBRARIES = ("diffhook", "torch", "accelerate", "diffusers", "peft", "zarr", "numpy")


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Class and, for models that have them, configuration and adapters."""
    model = without_wrappers(model)
    if isinstance(model, nn.ModuleDict):
        return {"class": "several", "models": {name: describe_model(m) for name, m in model.items()}}
    config = getattr(model, "config", None)
    kind = plain_class(model)
    described: dict[str, Any] = {"class": f"{kind.__module__}.{kind.__qualname__}"}
    if config is not None:
        fields = config if isinstance(config, dict) else getattr(config, "__dict__", {})
        # Not private fields: where a model was loaded from does not make it another.
        described["config"] = json_like({k: v for k, v in dict(fields).items() if k[:1] != "_"})
    adapters = describe_adapters(model)
    return {**described, "adapters": adapters} if adapters else described


def dataset_size(loader: Any) -> int | None:
    """Samples of the loader's dataset; None for a stream, and where no loader is known."""
    dataset = getattr(loader, "dataset", None)
    if dataset is None or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        return None
    return len(dataset)


def describe_dataset(loader: Any) -> dict[str, Any] | None:
    """What tells the dataset from another one; None as for :func:`dataset_size`."""
    samples = dataset_size(loader)
    if samples is None:
        return None
    dataset = loader.dataset
    columns = getattr(dataset, "column_names", None)  # of 🤗 Datasets
    return {
        "samples": samples,
        "class": type(dataset).__name__,
        **({"columns": sorted(columns)} if isinstance(columns, list) else {}),
    }


def describe_run(
    engine: PerSampleGradients, objective: Objective | None, loader: Any = None, images: Tensor | None = None
) -> dict[str, Any]:
    """The log's configuration: "identity" must stay the same for rows to be comparable.

    Args:
        loader: the training's, where an adapter knows it.
        images: (B, …) what its first batch holds, of which the log has each sample's mean and so on.
    """
    sketch = engine.sketch
    return {
        "identity": {
            "projection": {
                "dim": sketch.dim if sketch is not None else 0,
                "seed": sketch.seed if sketch is not None else 0,
                "kind": "full" if engine.full else "sketch" if sketch is not None else "none",
                "version": sketch.VERSION if isinstance(sketch, Sketch) else None,
            },
            "layers": [engine.layers] if isinstance(engine.layers, str) else engine.layers,
            "parameters": [[name, list(shape)] for name, shape in engine.shapes.items()],
            "model": describe_model(engine.model),
            "objective": objective.describe() if objective is not None else None,
            "dataset": describe_dataset(loader),
        },
        **({} if images is None else {"inputs": {"shape": list(images.shape[1:])}}),
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
