"""The adapter that a trainer's own network was, put on a saved pipeline by peft under the trainer's names.

kohya's scripts, LyCORIS, ai-toolkit and OneTrainer train modules of their own, which no pipeline has. They
compute LoRA, LoHa or LoKr, as peft's do; rows can be compared where the parameters also have the names, the
shapes and the order of the log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Size, Tensor, nn

from diffhook.capture.checkpoints.adapter_keys import Part, adapter_keys, text_keys
from diffhook.capture.checkpoints.adapter_kinds import describe
from diffhook.capture.checkpoints.lora import by_layer, check_keys
from diffhook.capture.checkpoints.weights import read_tensors
from diffhook.capture.model.adapter import add_adapters, network_alphas
from diffhook.capture.model.pipeline import SavedPipeline
from diffhook.capture.objective.denoising import denoise
from diffhook.errors import ConfigurationError
from diffhook.log import RunLog


class AsTrained(nn.Module):
    """Models of a pipeline whose adapters' parameters are called as in a trainer's network.

    Args:
        denoiser: is what this computes.
        adapted: models with adapters: the denoiser, and text encoders that were trained beside it.
        owners: name in the trainer's network → (model, name in the model), in the network's order.
        encode: captions → the denoiser's arguments, with gradients; for text encoders that were trained.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        adapted: Sequence[nn.Module],
        owners: Mapping[str, tuple[nn.Module, str]],
        encode: Callable[[Sequence[str]], dict[str, Any]],
    ) -> None:
        super().__init__()
        for name, (model, own) in owners.items():
            _register(self, name, model, own)
        self.adapted = nn.ModuleList(adapted)  # after them: a parameter has the first of its names
        self.denoiser = denoiser
        self._encode = encode

    @property
    def config(self) -> Any:
        """The denoiser's: what it samples."""
        return self.denoiser.config

    @property
    def peft_config(self) -> dict[str, Any]:
        return {f"{i}.{n}": c for i, m in enumerate(self.adapted) for n, c in m.peft_config.items()}  # type: ignore[operator, union-attr]

    def forward(self, *inputs: Any, captions_to_encode: Sequence[str] = (), **arguments: Any) -> Any:
        if captions_to_encode:
            arguments |= self._encode(captions_to_encode)
        return denoise(self.denoiser, *inputs, **arguments)


def _register(root: nn.Module, name: str, model: nn.Module, own: str) -> None:
    """Make a parameter of the model one of the root's: with the layer that it is the weight of."""
    *path, last = name.split(".")
    owner, _, attribute = own.rpartition(".")
    if last == attribute == "weight":
        *path, last = path
        found: nn.Module | Tensor = model.get_submodule(owner)
    else:
        found = model.get_parameter(own)
    for part in path:
        if part not in dict(root.named_children()):
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    if isinstance(found, nn.Module):
        root.add_module(last, found)
    else:
        assert isinstance(found, nn.Parameter)
        root.register_parameter(last, found)


@dataclass(frozen=True)
class _Adapted:
    """A model of the pipeline, and which of the trainer's parameters are parts of its adapter."""

    model: nn.Module
    parts: dict[str, Part]
    alphas: dict[str, float]
    """Layer → α."""

    def owners(self, shapes: Mapping[str, Size], where: str) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
        """Puts the adapter on the model: name in the trainer's network → what it is there.

        Raises:
            ConfigurationError: peft's adapter is another one.
        """
        layers = by_layer((part, shapes[name]) for name, part in self.parts.items())
        described = describe(layers, self.model, self.alphas, None, where)
        add_adapters(self.model, {"default": described})
        own = dict(self.model.named_parameters())
        for name, (layer, part) in self.parts.items():
            found = next((n for n in _peft_names(layer, part) if n in own), None)
            if found is None or own[found].shape != shapes[name]:
                has = "none" if found is None else list(own[found].shape)
                raise ConfigurationError(
                    f"{where} trained {name!r} of {list(shapes[name])}; peft's {described['peft_type']} "
                    f"has {has} there. Ask with diffhook.query(..., model=, objective=)"
                )
            yield name, (self.model, found)


def _peft_names(layer: str, part: str) -> tuple[str, str]:
    return f"{layer}.{part}.default.weight", f"{layer}.{part}.default"


def build_as_trained(
    log: RunLog, pipeline: SavedPipeline, lora: str | Path | None = None
) -> AsTrained | None:
    """The pipeline's models with a trainer's network on them; None where the log is of no such network.

    Args:
        lora: a file that the training saved, for α where the log does not tell it.

    Raises:
        ConfigurationError: it cannot be rebuilt.
    """
    shapes = {name: Size(shape) for name, shape in log.config["identity"]["parameters"]}
    denoiser, where = pipeline.denoiser, f"the run at {log.location}"
    keys = adapter_keys(shapes, _paths(denoiser))
    if not (keys.parts or keys.texts or keys.strangers):
        return None
    check_keys(keys, denoiser, where)
    alphas = _told_alphas(log, lora)
    found = [_Adapted(denoiser, keys.parts, _of_layers(adapter_keys(alphas, _paths(denoiser)).parts, alphas))]
    for number, encoder in enumerate(pipeline.text_encoders, 1):
        paths = _paths(encoder)
        parts = text_keys(keys.texts, paths, number)
        found.append(_Adapted(encoder, parts, _of_layers(text_keys(alphas, paths, number), alphas)))
    _check_complete(shapes, found, where)
    adapted = [each for each in found if each.parts]
    owners = dict(pair for each in adapted for pair in each.owners(shapes, where))
    pipeline.trains_text = bool(keys.texts)
    model = AsTrained(
        denoiser, [each.model for each in adapted], {name: owners[name] for name in shapes}, pipeline.embed
    )
    for each in (denoiser, *pipeline.text_encoders):
        each.requires_grad_(False)
    trained = {id(model.get_parameter(name)) for name in shapes}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    return model


def _paths(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules()]


def _of_layers(keys: Mapping[str, Part], values: Mapping[str, float]) -> dict[str, float]:
    return {part.layer: values[key] for key, part in keys.items()}


def _told_alphas(log: RunLog, lora: str | Path | None) -> dict[str, float]:
    """Key that ends in ".alpha" → α, of the log or else of the file."""
    told = {f"{layer}.alpha": alpha for layer, alpha in network_alphas(log.config["identity"]["model"])}
    if told or lora is None:
        return told
    tensors = read_tensors([Path(lora)])
    return {key: float(values) for key, values in tensors.items() if key.endswith(".alpha")}


def _check_complete(shapes: Iterable[str], found: Sequence[_Adapted], where: str) -> None:
    known = {name for each in found for name in each.parts}
    if lacking := [name for name in shapes if name not in known]:
        raise ConfigurationError(
            f"{where} trained {lacking[0]!r} ({len(lacking)} such), and the pipeline has no such layer"
        )
    for each in found:
        layers = {part.layer for part in each.parts.values()}
        if unknown := sorted(layers - each.alphas.keys()):
            raise ConfigurationError(
                f"{where} does not tell the α of its adapter, such as on {unknown[0]}: name a file of the "
                "adapter that the training saved, as kohya's scripts write it (lora=, --lora)"
            )
