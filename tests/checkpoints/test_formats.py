"""Every kind of file that a training leaves gives the parameters back, to the bit."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import get_peft_model_state_dict
from torch import Tensor, nn

from diffhook.capture.checkpoints import find_checkpoints, read_lora, read_parameters
from diffhook.capture.checkpoints.rates import learning_rates
from diffhook.capture.model.adapter import add_adapters, describe_adapters
from diffhook.errors import ConfigurationError
from tests.models import unet
from tests.pipelines import LORA, _unet

State = dict[str, Tensor]


def trained() -> nn.Module:
    torch.manual_seed(1)
    return unet().model


def averaged(model: Any) -> EMAModel:
    ema = EMAModel(model.parameters(), model_cls=type(model), model_config=model.config)
    for shadow in ema.shadow_params:
        shadow.mul_(0.5)
    return ema


def state_of(model: nn.Module) -> State:
    return {name: values.detach().clone() for name, values in model.named_parameters()}


def _accelerate(model: Any, place: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), 1e-3))
    accelerator.save_state(str(place))


def _script(model: Any, place: Path) -> None:
    """As diffusers' scripts leave a checkpoint."""
    model.save_pretrained(place / "unet")
    averaged(model).save_pretrained(place / "unet_ema")
    torch.save({"state": {}, "param_groups": [{"lr": 0.1}]}, place / "optimizer.bin")


WHOLE: dict[str, Callable[[Any, Path], object]] = {
    "a folder of diffusers": lambda model, place: model.save_pretrained(place),
    "in shards": lambda model, place: model.save_pretrained(place, max_shard_size="100KB"),
    "pickled": lambda model, place: model.save_pretrained(place, safe_serialization=False),
    "a script's checkpoint": _script,
    "accelerate's": _accelerate,
    "a state dict": lambda model, place: torch.save(model.state_dict(), place.with_suffix(".pt")),
    "of a wrapped model": lambda model, place: torch.save(
        {"epoch": 3, "model": {f"module.{k}": v for k, v in model.state_dict().items()}},
        place.with_suffix(".ckpt"),
    ),
    "safetensors": lambda model, place: safetensors.torch.save_file(
        state_of(model), place.with_suffix(".safetensors")
    ),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_whole_models_come_back(kind: str, tmp_path: Path) -> None:
    model = trained()
    WHOLE[kind](model, tmp_path / "checkpoint-300")
    (found,) = find_checkpoints(str(tmp_path / "*-300*"))
    assert found.step == 300
    expected = state_of(model)
    values = read_parameters(found.files, {name: list(v.shape) for name, v in expected.items()})
    assert values.keys() == expected.keys()
    assert all(torch.equal(values[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ["a folder beside", "a list", "named"])
def test_averaged_weights_come_back_where_they_are_asked_for(kind: str, tmp_path: Path) -> None:
    model = trained()
    place = tmp_path / "checkpoint-7"
    expected = {name: values / 2 for name, values in state_of(model).items()}
    if kind == "a folder beside":
        _script(model, place)
    else:
        place.mkdir()
        average = averaged(model).state_dict() if kind == "a list" else expected
        torch.save({"model": model.state_dict(), "ema": average}, place / "last.pt")
    wanted = {name: list(v.shape) for name, v in expected.items()}
    for ema, factor in ((True, 1), (False, 2)):
        (found,) = find_checkpoints(place, ema=ema)
        values = read_parameters(found.files, wanted, ema=ema)
        assert all(torch.equal(values[name], factor * expected[name]) for name in expected)


def adapted() -> Any:
    torch.manual_seed(2)
    model = _unet(12).requires_grad_(False)
    model.add_adapter(LORA)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def diffusers_lora(model: Any, place: Path) -> None:
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(model))
    metadata = {"unet_lora_adapter_metadata": LORA.to_dict()}
    StableDiffusionPipeline.save_lora_weights(place, unet_lora_layers=state, **metadata)


def kohya_lora(model: Any, place: Path) -> None:
    peft = {f"unet.{k}": v for k, v in get_peft_model_state_dict(model).items()}
    state = convert_state_dict_to_kohya(peft)
    state = {k.replace("unet.", "lora_unet_", 1) if k.startswith("unet.") else k: v for k, v in state.items()}
    for key in [key for key in state if key.endswith(".alpha")]:
        state[key] = torch.tensor(6.0)
    place.mkdir()
    safetensors.torch.save_file(state, place / "mine-000003.safetensors")


@pytest.mark.parametrize("save", [diffusers_lora, kohya_lora])
def test_adapters_come_back_with_their_scale(save: Callable[[Any, Path], None], tmp_path: Path) -> None:
    model = adapted()
    save(model, tmp_path / "checkpoint-3")
    (found,) = find_checkpoints(tmp_path / "checkpoint-3")
    again = _unet(12).requires_grad_(False)
    torch.manual_seed(2)
    base: UNet2DConditionModel = _unet(12)
    again.load_state_dict(base.state_dict())
    add_adapters(again, read_lora(found.files, again))
    expected = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wanted = {name: list(p.shape) for name, p in again.named_parameters() if p.requires_grad}
    assert wanted.keys() == expected.keys()
    values = read_parameters(found.files, wanted)
    assert all(torch.equal(values[name], expected[name]) for name in expected)
    again.load_state_dict(values, strict=False)
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 3, 12)
    torch.testing.assert_close(again(*inputs).sample, model(*inputs).sample)
    assert describe_adapters(again)["default"]["r"] == 2


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        (["checkpoint-10", "checkpoint-15", "checkpoint-100"], [10, 15, 100]),
        (["run1_step_000020.pt", "run1_step_000040.pt"], [20, 40]),
        (["epoch=3-step=1200.ckpt", "epoch=4-step=1600.ckpt"], [1200, 1600]),
        (["sd15-lora-000002.pt", "sd15-lora-000004.pt"], [2, 4]),
        (["10/model.pt", "20/model.pt"], [10, 20]),
        (["only-7.pt"], [7]),
        (["a.pt", "b.pt"], [1, 2]),
    ],
)
def test_steps_are_in_the_names(names: list[str], steps: list[int], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        place = tmp_path / name
        torch.save({}, place if place.suffix else _within(place))
    found = find_checkpoints([tmp_path / name for name in names])
    assert [checkpoint.step for checkpoint in found] == steps


def _within(folder: Path) -> Path:
    folder.mkdir()
    return folder / "model.bin"


def test_a_name_without_a_step_among_others_is_told(tmp_path: Path) -> None:
    for name in ("run1_step_20.pt", "run1_step_40.pt", "run1_latest.pt"):
        torch.save({}, tmp_path / name)
    with pytest.raises(ConfigurationError, match=r"run1_latest\.pt tells no step"):
        find_checkpoints(str(tmp_path / "*.pt"))


def test_what_is_no_checkpoint_is_left_out_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = trained()
    model.save_pretrained(tmp_path / "checkpoint-20" / "unet")
    model.save_pretrained(tmp_path / "checkpoint-100" / "unet")
    (tmp_path / "checkpoint-120").mkdir()  # killed while it was saved
    (tmp_path / "checkpoint-notes.txt").write_text("my notes")
    with caplog.at_level(logging.WARNING, "diffhook"):
        found = find_checkpoints(str(tmp_path / "checkpoint-*"))
    assert [checkpoint.step for checkpoint in found] == [20, 100]
    assert "checkpoint-120" in caplog.text
    assert "checkpoint-notes.txt" in caplog.text


def test_wrong_use_is_told_in_one_sentence(tmp_path: Path) -> None:
    model = trained()
    wanted = {name: list(p.shape) for name, p in model.named_parameters()}
    for name in ("a/checkpoint-5", "b/checkpoint-5"):
        model.save_pretrained(tmp_path / name)
    with pytest.raises(ConfigurationError, match="are both of step 5"):
        find_checkpoints(str(tmp_path / "*/checkpoint-5"))
    with pytest.raises(ConfigurationError, match="no checkpoints: found nothing at"):
        find_checkpoints(str(tmp_path / "nothing-*"))
    other = tmp_path / "other.pt"
    torch.save({"weight": torch.zeros(3)}, other)
    with pytest.raises(ConfigurationError, match=r"other\.pt lacks .* is it a checkpoint of this model"):
        read_parameters([other], wanted)
    torch.save(model, other)  # the whole object, not its state
    with pytest.raises(ConfigurationError, match="holds more than tensors"):
        read_parameters([other], wanted)
    (tmp_path / "broken.safetensors").write_bytes(b"\x10" + bytes(7) + json.dumps({}).encode())
    with pytest.raises(ConfigurationError, match=r"broken\.safetensors cannot be read"):
        read_parameters([tmp_path / "broken.safetensors"], wanted)
    with pytest.raises(ConfigurationError, match="no averaged"):
        read_parameters(find_checkpoints(tmp_path / "a/checkpoint-5")[0].files, wanted, ema=True)


@pytest.mark.parametrize(
    "name",
    ["opt", "optim", "optimizer", "optimizer_state_dict", "optimizer_states", "optimizers", "unheard_of"],
)
def test_rates_come_from_an_optimizers_state_beside_the_weights(name: str, tmp_path: Path) -> None:
    model = trained()
    for step, lr in ((10, 0.1), (20, 0.3)):
        optimizer = torch.optim.AdamW(model.parameters(), lr)
        state: Any = optimizer.state_dict()
        held = [state] if name.endswith("s") else state
        torch.save({"model": model.state_dict(), name: held, "step": step}, tmp_path / f"m_{step}.pth")
    rates, weighted = learning_rates(find_checkpoints(tmp_path / "m_*.pth"))
    assert weighted == "optimizer"
    assert [lr for lr, _ in rates] == [0.1, 0.3]


def test_one_checkpoint_is_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    last = tmp_path / "out" / "last.pt"
    last.parent.mkdir()
    torch.save(trained().state_dict(), last)
    assert find_checkpoints(last)[0].step == 1
    assert "it counts as step 1" in caplog.text
    with pytest.raises(ConfigurationError, match="for 1 checkpoint; expected one"):
        find_checkpoints(last, steps=[1, 2])
