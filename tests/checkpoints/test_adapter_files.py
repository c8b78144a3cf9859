"""Adapter files by every trainer's names come back as the change of the weights that they stand for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from diffhook.capture.checkpoints import read_lora, read_parameters
from diffhook.capture.model.adapter import add_adapters
from diffhook.errors import ConfigurationError
from tests.networks import DENOISER, KINDS, RANK, Network
from tests.pipelines import _unet

State = dict[str, Tensor]


def _xl() -> Any:
    """With Stable Diffusion XL's blocks."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8, 8), layers_per_block=2, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12, attention_head_dim=4,
    ).eval()  # fmt: skip


def _kohya(state: State, model: Any) -> State:
    return state


def _dotted(prefix: str) -> Callable[[State, Any], State]:
    """As OneTrainer, and ai-toolkit, whose factors are "lora_A" and "lora_B"."""

    def renamed(state: State, model: Any) -> State:
        paths = {path.replace(".", "_"): path for path, _ in model.named_modules()}
        found = {}
        for key, values in state.items():
            layer, _, part = key.removeprefix(DENOISER).partition(".")
            found[f"{prefix}{paths[layer]}.{part}"] = values
        return found

    return renamed


def _ai_toolkit(state: State, model: Any) -> State:
    """Of transformers: α is the rank, and left out, but for LoKr."""
    letters = {key.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): v for key, v in state.items()}
    return _dotted("transformer.")(letters, model)


def _lycoris(state: State, model: Any) -> State:
    return {key.replace(DENOISER, "lycoris_"): values for key, values in state.items()}


def _loha_by_onetrainer(state: State, model: Any) -> State:
    """Factors of convolutions keep their kernels."""
    found = dict(state)
    for key, values in state.items():
        if key.endswith("_a"):
            found[key] = values[..., None, None]
        elif key.endswith("_b") and "conv" in key:
            found[key] = values.view(len(values), -1, 3, 3)
    return found


NAMES: list[tuple[str, Callable[[State, Any], State]]] = [
    *((kind, names) for kind in KINDS for names in (_kohya, _dotted("unet."), _lycoris)),
    ("LoRA", _ai_toolkit),
    ("LoKr", _ai_toolkit),
    ("LoHa", _loha_by_onetrainer),
]


_XL_BLOCKS = {
    "mid_block_attentions_0": "middle_block_1",
    **{f"down_blocks_{b}_attentions_{a}": f"input_blocks_{1 + 3 * b + a}_1" for b in (1, 2) for a in (0, 1)},
    **{f"up_blocks_{b}_attentions_{a}": f"output_blocks_{3 * b + a}_1" for b in (0, 1) for a in (0, 1, 2)},
}
"""diffusers' path → Stability's."""


def _written(model: nn.Module, kind: str) -> Network:
    torch.manual_seed(3)
    return Network(kind, {DENOISER: model})


def _rebuilt(base: nn.Module, file: Path, network: Network) -> Any:
    """The model with what the file holds, as peft's."""
    model: Any = copy.deepcopy(base).requires_grad_(False)
    add_adapters(model, read_lora([file], model))
    wanted = {name: list(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    assert len(wanted) == len(list(network.parameters()))
    assert not model.load_state_dict(read_parameters([file], wanted), strict=False).unexpected_keys
    return model


@pytest.mark.parametrize(("kind", "names"), NAMES)
def test_a_file_changes_the_weights_as_the_trainer_s_modules_do(
    kind: str, names: Callable[[State, Any], State], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    base = _unet(12)
    written = copy.deepcopy(base).requires_grad_(False)
    network = _written(written, kind)
    state = names(network.state_dict(), base)
    untold = names is _ai_toolkit and kind == "LoRA"
    if untold:
        state = {key: values for key, values in state.items() if not key.endswith(".alpha")}
        for adapter in network.children():
            adapter.alpha.fill_(RANK)  # type: ignore[operator, union-attr]
    file = tmp_path / "it.safetensors"
    safetensors.torch.save_file({key: values.contiguous() for key, values in state.items()}, file)
    rebuilt = _rebuilt(base, file, network)
    inputs = torch.randn(1, 4, 8, 8).double(), torch.tensor([5]), torch.randn(1, 3, 12).double()
    network.double()
    plain, found, expected = (model.double()(*inputs).sample for model in (base, rebuilt, written))
    assert not torch.allclose(plain, expected), "the adapter changes nothing"
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_stable_diffusion_xls_own_blocks_are_diffusers(kind: str, tmp_path: Path) -> None:
    """As sd-scripts and OneTrainer write them."""
    base = _xl()
    written = copy.deepcopy(base).requires_grad_(False)
    network = _written(written, kind)
    state = {
        key.replace(own, _XL_BLOCKS[own]): values
        for key, values in network.state_dict().items()
        for own in _XL_BLOCKS
        if f"{DENOISER}{own}_" in key
    }
    for layer in {name.partition(".")[0] for name in network.state_dict()}:
        if "attentions" not in layer:
            delattr(network, layer)
    assert len(state) == len(network.state_dict())
    file = tmp_path / "it.safetensors"
    safetensors.torch.save_file(state, file)
    rebuilt = dict(_rebuilt(base, file, network).named_parameters())
    for name, parameter in network.named_parameters():
        layer, _, part = name.removeprefix(DENOISER).partition(".")
        part = part.replace("lora_down.weight", "lora_A").replace("lora_up.weight", "lora_B")
        (own,) = (key for key in rebuilt if key.replace(".", "_").startswith(f"{layer}_{part}_"))
        assert torch.equal(rebuilt[own], parameter)


def test_what_peft_cannot_make_is_refused_and_named(tmp_path: Path) -> None:
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    lora = {f"{layer}.lora_down.weight": torch.ones(2, 16), f"{layer}.lora_up.weight": torch.ones(16, 2)}
    refused: dict[str, State] = {
        r"'\w+\.dora_scale' \(1 such\), which cannot be": {**lora, f"{layer}.dora_scale": torch.ones(1, 16)},
        r"'\w+\.lora_mid\.weight' \(1": {**lora, f"{layer}.lora_mid.weight": torch.ones(2, 2, 3, 3)},
        "holds LORA and LOKR": {**lora, f"{layer}.lokr_w1": torch.ones(4, 4)},
        "Tucker factors": {f"{layer}.hada_{n}": torch.ones(2, 2, 3, 3) for n in ("t1", "w1_b")},
        "splits the 16 × 16 weight": {
            f"{layer}.lokr_w1": torch.ones(8, 2),
            f"{layer}.lokr_w2": torch.ones(2, 8),
        },
        "has no layers such as 'lora_unet_double_blocks_0_img_attn_proj.lora_down.weight' names": {
            "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": torch.ones(2, 16)
        },
    }
    for number, (told, state) in enumerate(refused.items()):
        file = tmp_path / f"{number}.safetensors"
        safetensors.torch.save_file(state, file)
        with pytest.raises(ConfigurationError, match=told):
            read_lora([file], _unet(12))
