"""An adapter's configuration: to JSON and back onto a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from diffhook.capture.model.adapter import add_adapters, describe_adapters, read_adapter
from diffhook.errors import ConfigurationError
from tests.models import conditional_unet

CONFIGS = {
    "plain": LoraConfig(r=2, target_modules=["to_q", "to_k"]),
    "scaled": LoraConfig(r=2, lora_alpha=7, use_rslora=True, target_modules=["to_q"], lora_bias=True),
    "regex": LoraConfig(r=3, target_modules=r".*attn1\.to_[qv]", rank_pattern={"to_q": 5}),
    "dora": LoraConfig(r=2, use_dora=True, target_modules={"to_out.0"}, lora_dropout=0.1),
}


def _randomised(model: nn.Module) -> dict[str, torch.Tensor]:
    """Adapters begin as zero, whatever their scale."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return model.state_dict()


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_description_makes_the_same_model(name: str) -> None:
    first, second = conditional_unet().model, conditional_unet().model
    first.add_adapter(CONFIGS[name], adapter_name="mine")  # type: ignore[operator]
    described = json.loads(json.dumps(describe_adapters(first)))
    add_adapters(second, described)
    shapes = {n: p.shape for n, p in first.named_parameters()}
    assert {n: p.shape for n, p in second.named_parameters()} == shapes
    second.load_state_dict(_randomised(first))
    batch = conditional_unet().batch[0]
    outputs = [model.eval()(**batch).sample for model in (first, second)]
    assert torch.equal(*outputs), "the adapters differ in scale"
    assert describe_adapters(second) == describe_adapters(first)


def test_an_adapter_that_is_there_stays_and_another_of_its_name_is_refused() -> None:
    model = conditional_unet().model
    model.add_adapter(CONFIGS["scaled"])  # type: ignore[operator]
    before = [name for name, _ in model.named_parameters()]
    described = describe_adapters(model)
    add_adapters(model, json.loads(json.dumps(described)))
    assert [name for name, _ in model.named_parameters()] == before
    with pytest.raises(ConfigurationError, match="has another adapter 'default' already"):
        add_adapters(model, {"default": {**described["default"], "lora_alpha": 1}})


def test_only_what_is_not_peft_s_default_is_recorded() -> None:
    model = conditional_unet().model
    model.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_q"]))  # type: ignore[operator]
    expected = {"peft_type": "LORA", "r": 2, "target_modules": ["to_k", "to_q"]}
    assert describe_adapters(model) == {"default": expected}
    assert describe_adapters(nn.Linear(1, 1)) == {}


def test_models_that_are_not_diffusers_take_adapters_too() -> None:
    first, second = (nn.Sequential(nn.Linear(3, 3)) for _ in range(2))
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=5, target_modules=["0"]), first, "mine")
    add_adapters(second, describe_adapters(first))
    second.load_state_dict(_randomised(first))
    assert torch.equal(first(torch.eye(3)), second(torch.eye(3)))


def test_a_saved_configuration_is_read(tmp_path: Path) -> None:
    model = conditional_unet().model
    model.add_adapter(CONFIGS["scaled"])  # type: ignore[operator]
    CONFIGS["scaled"].save_pretrained(str(tmp_path))
    assert read_adapter(tmp_path) == describe_adapters(model)
    with pytest.raises(ConfigurationError, match=r"no LoRA adapter at .*: it has no adapter_config\.json"):
        read_adapter(tmp_path / "none")
