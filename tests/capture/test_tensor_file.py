"""A safetensors file that is made while it is written holds what the library's own would."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from torch import Tensor

from diffhook.capture.recording.tensor_file import safetensors_of

TENSORS = {
    "weight": torch.randn(5, 3, 3, 3).to(memory_format=torch.channels_last),
    "transposed": torch.randn(4, 6).t(),
    "half": torch.randn(3).half(),
    "bfloat16": torch.randn(7).bfloat16(),
    "double": torch.randn(2, 2, dtype=torch.float64),
    "scalar": torch.tensor(3.5),
    "none": torch.empty(0, 4),
    'named "so" …': torch.randn(2),
}


def _loaded(tensors: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    content = safetensors_of(tensors, dtype=dtype)
    data = b"".join(content.parts())
    assert len(data) == content.size
    return safetensors.torch.load(data)


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_every_tensor_comes_back(dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffhook.capture.recording.tensor_file._CHUNK", 64)
    found = _loaded(TENSORS, dtype)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        expected = tensor.to(dtype or tensor.dtype)
        assert found[name].dtype == expected.dtype
        assert torch.equal(found[name], expected)


def test_it_is_of_the_moment_at_which_it_is_written() -> None:
    tensor = torch.zeros(3)
    content = safetensors_of({"w": tensor})
    tensor.fill_(1.0)
    assert safetensors.torch.load(b"".join(content.parts()))["w"].tolist() == [1.0, 1.0, 1.0]


def test_a_kind_that_the_format_lacks_is_refused_before_anything_is_written() -> None:
    with pytest.raises(ValueError, match=r"w is of torch\.complex128, which snapshots cannot keep"):
        safetensors_of({"w": torch.zeros(2, dtype=torch.complex128)})
