"""The first pass checks the fallback against what autograd itself delivers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn

from diffhook.gradients.tape import Tape

# Loose: it tells a use that was missed from rounding.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.1}

_NOTHING = 1e-4  # share of all gradients that the fallback has to find


class Survey:
    """Notes to which parameters autograd delivers a gradient during one pass.

    Args:
        parameters: name → parameter, all with requires_grad.
        fallback: names left to the fallback, as the forward has found them: their gradients are
            kept for comparison, those of the others would only cost memory.
        tape: paused while the fallback differentiates on its own account.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], fallback: Collection[str], tape: Tape) -> None:
        self._tape = tape
        self._fallback = fallback
        self._reached: set[str] = set()
        self._sums: dict[str, Tensor] = {}
        self._handles = [
            parameter.register_hook(self._collector(name)) for name, parameter in parameters.items()
        ]

    def _collector(self, name: str):  # type: ignore[no-untyped-def]
        def collect(gradient: Tensor) -> None:
            if self._tape.paused:
                return
            if bool(gradient.any()):
                self._reached.add(name)
            if name in self._fallback:
                kept = self._sums.get(name)
                self._sums[name] = gradient.detach() if kept is None else kept + gradient

        return collect

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def contradictions(
        self, absorbed: set[str], split: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Iterator[tuple[str, str]]:
        """(name, reason) for parameters whose gradient the pass has missed, wholly or in part.

        Args:
            absorbed: names that layer rules have dealt with.
            split: name → (B, *shape) gradients found by the fallback, before any rescaling.
            dtype: the lowest precision in which the pass computed.
        """
        whole = torch.stack([total.norm() for total in self._sums.values()]).norm() if self._sums else None
        for name in self._reached:
            expected = self._sums.get(name)
            if expected is not None and whole is not None and name in split:
                found = split[name].sum(0)
                # A gradient may be nothing but rounding, as that of a bias before a softmax is.
                scale = torch.maximum(
                    split[name].reshape(len(split[name]), -1).norm(dim=1).sum(), _NOTHING * whole
                )
                error = (found - expected).norm() / scale.clamp_min(1e-30)
                if bool(error > _TOLERANCE.get(dtype, 0.1)):
                    yield name, f"its samples' gradients miss autograd's sum by {float(error):.1%}"
            elif name not in absorbed:
                yield name, "its uses never met a tensor whose first axis is the batch"
