"""Which of the denoiser's further arguments are the samples' own, so that probes may give them again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffhook.capture.loop.watches.call_inspection import NAMES
from diffhook.capture.samples.inputs import CONDITIONS

_PASSED_ON = ("return_dict",)
_VISITS = 64  # of samples that came before, from which an argument is believed to be theirs
_COMMON = 0.25  # visit for one with the first value of all: a flag that is rarely up agrees mostly, too
_SAY = "objective=… with inputs=… says it"


class Conditions:
    """Reads them off calls.

    What has a well-known name is a condition. Any other tensor of a row for each sample is one where it is in
    the loader's batch, which knows nothing of noise and timesteps; or else where samples that come again, at
    other timesteps and with other noise, have the same. What changes is none, be it drawn anew or made of the
    noise.
    """

    def __init__(self) -> None:
        self.refused = ""  #: why these calls cannot be made again, in words
        self._agreed: dict[str, float] = {}  # argument that the batch does not hold → visits that agree
        self._first: dict[str, list[Tensor]] = {}  # its first row

    @property
    def unproven(self) -> str:
        """Why it is not known yet whether all arguments are the samples' own, in words; "": it is."""
        for name, visits in self._agreed.items():
            if visits < _VISITS:
                return (
                    f"{_given(name)}, which the loader's batch does not hold, and too few samples came again "
                    f"to show that it is theirs, {visits:.0f} of {_VISITS}. {_SAY}"
                )
        return ""

    def read(
        self, model: nn.Module | None, module: nn.Module, args: Any, kwargs: Mapping[str, Any], clean: Tensor
    ) -> dict[str, Any]:
        """The call's further arguments by name; what cannot be given again is refused.

        Args:
            model: that is trained.
            module, args, kwargs: the denoiser's call.
            clean: (B, …) its samples.
        """
        parameters = inspect.signature(module.forward).parameters
        names = list(parameters)
        if getattr(module, "module", module) is not model:
            self._refuse(f"the trained parts hang in a {type(module).__name__} that is not trained itself")
        elif not set(names[1:2]) & set(NAMES):
            self._refuse(f"the second argument of {type(module).__name__} is not its timestep")
        if self.refused:
            return {}
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        first = given.pop(names[0], None)
        if isinstance(first, Tensor) and first.shape != clean.shape:
            self._refuse("the model's input holds more than the noisy sample")
        found = {}
        for name, value in given.items():
            if value is None or name in (*NAMES, *_PASSED_ON):
                continue
            if isinstance(value, bool) and name in parameters and value == parameters[name].default:
                continue
            self._check(name, value, len(clean))
            found[name] = value
        return {} if self.refused else found

    def _check(self, name: str, value: Any, rows: int) -> None:
        found = list(tensors(value))
        known = name in CONDITIONS
        if not (known or found) or any(not each.dim() or len(each) != rows for each in found):
            self._refuse(f"{_given(name)}, which has not a row for each sample")
        elif any(each.requires_grad for each in found):
            self._refuse(f"{name!r} comes from a model that is trained itself")

    def prove(
        self,
        conditions: Mapping[str, Any],
        held: Callable[[], Sequence[Tensor]],
        before: Mapping[int, Mapping[str, Any]],
    ) -> None:
        """Look whose a call's arguments are.

        Args:
            conditions: of :meth:`read`.
            held: gives what the loader's batch holds of the same rows, (B, …) each.
            before: row of a sample that came before, at another timestep → its conditions then.
        """
        asked = {name: value for name, value in conditions.items() if name not in CONDITIONS}
        own = held() if set(asked) - set(self._agreed) else ()
        for name, value in asked.items():
            if name not in self._agreed and all(any(_same(x, y) for y in own) for x in tensors(value)):
                continue
            self._agreed.setdefault(name, 0)
            first = self._first.setdefault(name, _row(value, 0))
            for row, earlier in before.items():
                now, then = _row(value, row), list(tensors(earlier.get(name)))
                if not _all_same(now, then):
                    self._refuse(
                        f"{_given(name)}, which changes when a sample comes again: it is drawn anew, or made "
                        "of the noise or the timestep"
                    )
                    return
                self._agreed[name] += _COMMON if _all_same(now, first) else 1

    def _refuse(self, reason: str) -> None:
        self.refused = self.refused or f"{reason}. {_SAY}"


def _given(name: str) -> str:
    return f"the model is given {name!r}"


def _row(value: Any, row: int) -> list[Tensor]:
    return [each[row : row + 1].detach().cpu() for each in tensors(value)]


def _all_same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(map(_same, some, others))


def _same(one: Tensor, other: Tensor) -> bool:
    if len(one) != len(other) or one.numel() != other.numel():
        return False
    one = one.detach().cpu()
    return torch.equal(one.flatten(), other.detach().cpu().to(one.dtype).flatten())


def tensors(value: Any) -> Iterator[Tensor]:
    """Those of an argument."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from tensors(inner)
