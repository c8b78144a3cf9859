"""Which of the denoiser's further arguments are the samples' own, so that probes may give them again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffhook.capture.loop.probes.dropping import DROPPED, Dropping
from diffhook.capture.objective.denoising import TIMESTEP_NAMES, timestep_name
from diffhook.capture.samples.inputs import CONDITIONS, GUIDANCE

_PASSED_ON = ("return_dict",)
_PLACES = ("img_ids", "txt_ids")  # of Flux's tokens: for all samples, or a row for each
_SETTINGS = (GUIDANCE, *_PLACES)  # of a training: mostly one for all
_VISITS = 64  # of samples that came before, from which an argument is believed to be theirs
_COMMON = 0.25  # visit for one with the first value of all: a flag that is rarely up agrees mostly, too
_SAY = "objective=… with inputs=… says it"


class Conditions:
    """Reads them off calls.

    What has a well-known name is a condition, unless it is seen to be dropped at times. Any other tensor of a
    row for each sample is one where it is in the loader's batch, which knows nothing of noise and timesteps;
    or else where samples that come again, at other timesteps and with other noise, have the same. What
    changes is none, be it drawn anew or made of the noise. Tokens' places, and a guidance that never changes,
    are for all.
    """

    def __init__(self) -> None:
        self.refused = ""  #: why these calls cannot be made again, in words
        self.shared: dict[str, Tensor] = {}  #: on the CPU: arguments that have no row for each sample
        self._may_drop, self._dropping = False, Dropping()
        self._settings: dict[str, Tensor] = {}  # (1, …) that all rows had so far
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

    @property
    def looks(self) -> bool:
        """Whether samples that come again tell more."""
        return bool(self.unproven) or (self._may_drop and self._dropping.looks)

    def read(
        self, model: nn.Module | None, module: nn.Module, args: Any, kwargs: Mapping[str, Any], clean: Tensor
    ) -> dict[str, Any]:
        """The call's further arguments by name, those of :attr:`shared` left out; what cannot be given again
        is refused.

        Args:
            model: that is trained.
            module, args, kwargs: the denoiser's call.
            clean: (B, …) its samples.
        """
        parameters = inspect.signature(module.forward).parameters
        names = list(parameters)
        if getattr(module, "module", module) is not model:
            self._refuse(f"the trained parts hang in a {type(module).__name__} that is not trained itself")
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        told = [name for name in TIMESTEP_NAMES if given.get(name) is not None]
        if told != [timestep_name(names)]:
            self._refuse(f"which argument of {type(module).__name__} is its timestep is not known")
        if self.refused:
            return {}
        first = given.pop(names[0], None)
        if isinstance(first, Tensor) and first.shape != clean.shape:
            self._refuse("the model's input holds more than the noisy sample")
        found, shared = {}, {}
        for name, value in given.items():
            if value is None or name in (*TIMESTEP_NAMES, *_PASSED_ON):
                continue
            if isinstance(value, bool) and name in parameters and value == parameters[name].default:
                continue
            if name in _PLACES and isinstance(value, Tensor) and value.dim() == 2:
                shared[name] = value.detach().cpu()
                continue
            self._check(name, value, len(clean))
            found[name] = value
        self._share(shared)
        self._may_drop = self._may_drop or any(name in DROPPED for name in found)
        return {} if self.refused else found

    def _share(self, found: dict[str, Tensor]) -> None:
        self.shared = self.shared or found
        for name in {**self.shared, **found}:
            one, other = self.shared.get(name), found.get(name)
            if one is None or other is None or not torch.equal(one, other):
                self._refuse(f"{_given(name)}, which is not the same for all samples, as of several sizes")

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
        asked = {
            name: value
            for name, value in conditions.items()
            if name not in CONDITIONS and not (name in _SETTINGS and self._steady(name, value))
        }
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

    def compare(self, sample: int, row: int, now: Mapping[str, Any], then: Mapping[str, Any]) -> None:
        """Look whether a sample that has come again had its own caption or class each time.

        Args:
            row: of the sample in this call.
            now: conditions of :meth:`read`, (B, …).
            then: its own before, (1, …).
        """
        if self._dropping.looks:
            self._dropping.add(sample, row, now, then)
        if name := self._dropping.name:
            self._refuse(
                f"{_given(name)}, which is a sample's own at one time and at another what others have, too: "
                "captions or classes are dropped, or drawn"
            )

    def _steady(self, name: str, value: Any) -> bool:
        """Whether every row's was that of all others so far."""
        if name in self._agreed or not isinstance(value, Tensor):
            return False
        given = value.detach().cpu()
        known = self._settings.setdefault(name, given[:1].clone())
        return given.shape[1:] == known.shape[1:] and bool((given == known).all())

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
