"""What a log can bring back: the trained model, its parameters at a snapshot, the training loss."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from diffhook.capture.checkpoints import read_lora
from diffhook.capture.model.adapter import add_adapters, network_alphas, read_adapter
from diffhook.capture.model.pipeline import SavedPipeline
from diffhook.capture.objective.diffusion import DiffusionObjective
from diffhook.errors import ConfigurationError, LogError
from diffhook.gradients import PerSampleGradients
from diffhook.log import RunLog, Snapshot
from diffhook.log.schema import json_like
from diffhook.queries.as_trained import build_as_trained


def build_objective(log: RunLog, pipeline: SavedPipeline | None = None) -> DiffusionObjective:
    """The training loss that the log records, or else the one that a pipeline's scheduler defines.

    Raises:
        ConfigurationError: the log records none that can be rebuilt, and there is no pipeline.
    """
    described = log.objective
    if described is not None:
        return DiffusionObjective.from_description(described)
    if pipeline is not None:
        return pipeline.objective()
    why = f" ({log.objective_words})" if log.objective_words else ""
    raise ConfigurationError(
        f"the log does not know the training loss{why}: name its scheduler with --scheduler, or the pipeline "
        "with --pipeline, or call diffhook.query(..., objective=...)"
    )


def check_pipeline(log: RunLog, pipeline: SavedPipeline | None) -> None:
    """Whether a pipeline makes latents and conditions as those of the log's samples were made.

    Raises:
        ConfigurationError: it does not.
    """
    known = log.config["identity"].get("pipeline")
    if pipeline is None or known is None:
        return
    own = json_like(pipeline.chosen)
    other = [name for name in known if own.get(name) != known[name]]
    if other:
        told = ", ".join(f"{name}={known[name]}" for name in other)
        has = ", ".join(f"{name}={own.get(name)}" for name in other)
        raise ConfigurationError(
            f"the samples of {log.location} were measured with {told}, and the pipeline has {has}: pass "
            f"SavedPipeline(…, {told})"
        )


def build_model(
    log: RunLog, pipeline: SavedPipeline | None = None, lora: str | Path | None = None
) -> nn.Module:
    """The trained model, with the parameters trainable that the log has snapshots of.

    Their values, and without a pipeline all values, are arbitrary: see
    :func:`~diffhook.capture.checkpoints.snapshots.load_snapshot`.

    Args:
        log: the run.
        pipeline: the one whose denoiser was trained, wholly or in part; it gets the adapter. By
            default a model of diffusers is made from the configuration in the log.
        lora: a folder with the adapter's configuration, or a file (LoRA, LoHa or LoKr, of diffusers, peft,
            kohya's scripts, LyCORIS and others that name layers as these do), where the log does not record
            the adapter.

    Raises:
        ConfigurationError: the model cannot be built, or it is not the one of the run.
    """
    described = log.config["identity"]["model"]
    kind = None if pipeline is None else _class_of(pipeline.denoiser)
    if pipeline is not None and kind != described["class"]:
        network = build_as_trained(log, pipeline, lora)
        if network is not None:
            return network
    if pipeline is None and any(network_alphas(described)):
        raise ConfigurationError(
            f"the run trained a network that its trainer puts on a model ({described['class']}): name the "
            "pipeline with that model (pipeline=, --pipeline), or pass model="
        )
    if "models" in described:
        raise ConfigurationError(
            f"the run trained several models ({', '.join(described['models'])}): pass model=, an "
            "nn.ModuleDict of them, and an objective= that calls it"
        )
    model = _from_config(described) if pipeline is None else pipeline.denoiser
    if kind is not None and kind != described["class"]:
        raise ConfigurationError(f"the run trained a {described['class']}, the pipeline has a {kind}")
    adapters = described.get("adapters", {}) if lora is None else _adapters(Path(lora), model)
    add_adapters(model, adapters)
    trained = {name for name, _ in log.config["identity"]["parameters"]}
    own = {name for name, _ in model.named_parameters()}
    if not trained <= own:
        hint = ": name the adapter's folder or file (lora=, --lora)" if not adapters else ""
        raise ConfigurationError(
            f"the run trained {min(trained - own)!r} ({len(trained - own)} such), which the model lacks{hint}"
        )
    if pipeline is None and own - trained:
        raise ConfigurationError(
            f"{len(own - trained)} of the model's parameters were not trained (an adapter?), so the log "
            "does not hold them: pass pipeline= (--pipeline) or model="
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return model


def _class_of(model: nn.Module) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"


def _adapters(lora: Path, model: nn.Module) -> dict[str, Any]:
    if not lora.is_file():
        return read_adapter(lora)
    if not (found := read_lora([lora], model)):
        raise ConfigurationError(
            f"{lora} holds no adapter of a denoiser: expected layers' lora_A and lora_B (diffusers, peft), "
            "lora_down and lora_up (kohya's scripts), or a LoHa's or LoKr's factors (LyCORIS)"
        )
    return found


def _from_config(described: Mapping[str, Any]) -> nn.Module:
    import diffusers

    module, _, kind = described["class"].rpartition(".")
    found = getattr(diffusers, kind, None) if module.startswith("diffusers.") else None
    if found is None or "config" not in described:
        raise ConfigurationError(
            f"the log's model is {described['class']}, which cannot be built from the log alone: pass model="
        )
    model: nn.Module = found.from_config(described["config"])
    return model


def load_preconditioner(engine: PerSampleGradients, snapshot: Snapshot, *, root: bool = False) -> None:
    """Let the engine divide gradients by Adam's √v̂ + ε, or its root, as a snapshot has it.

    Raises:
        LogError: the snapshot keeps none.
    """
    content = snapshot.preconditioner()
    if content is None:
        raise LogError(f"the snapshot of step {snapshot.step} keeps no preconditioner")
    values = safetensors.torch.load(content)
    factors = {name: values[name].to(p.device) for name, p in engine.parameters.items()}
    engine.preconditioner = {name: f.sqrt() if root else f for name, f in factors.items()}
