"""Other ways to per-sample gradient norms, as their documentation uses them. Each makes a function that
runs one pass and returns the (B,) norms."""

from __future__ import annotations

from collections.abc import Callable

import torch
from models import Case
from torch import Tensor

Run = Callable[[], Tensor | None]


def batch_1_loop(case: Case) -> Run:
    """The honest slow way: one sample at a time."""
    parameters = [p for p in case.model.parameters() if p.requires_grad]

    def run() -> Tensor:
        norms = []
        for row in range(case.batch):
            loss = case.losses(slice(row, row + 1)).sum()
            shares = torch.autograd.grad(loss, parameters)
            norms.append(sum(share.square().sum() for share in shares))
            del shares  # of a large model, the next sample's would not fit beside them
        return torch.stack(norms).sqrt()  # type: ignore[arg-type]

    return run


def vmap_grad(case: Case) -> Run:
    """torch.func: vmap over grad."""
    parameters = {n: p.detach() for n, p in case.model.named_parameters() if p.requires_grad}

    def loss(values: dict[str, Tensor], inputs: dict[str, Tensor], target: Tensor) -> Tensor:
        one = {name: value[None] for name, value in inputs.items()}
        predicted = torch.func.functional_call(case.model, values, (), {**one, "return_dict": False})[0]
        return (predicted[0] - target).square().mean()

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0), randomness="different")

    def run() -> Tensor:
        shares = gradients(parameters, case.inputs, case.target)
        return torch.stack([s.flatten(1).square().sum(1) for s in shares.values()]).sum(0).sqrt()

    return run


def opacus(case: Case) -> Run:
    """Opacus' GradSampleModule; its hooks are taken off after every pass, for the others' sake."""
    from opacus import GradSampleModule

    parameters = [p for p in case.model.parameters() if p.requires_grad]

    def run() -> Tensor:
        case.model.zero_grad(set_to_none=True)
        wrapped = GradSampleModule(case.model, strict=False)
        try:
            case.losses().mean().backward()
            squares = [_opacus_squares(parameter) for parameter in parameters]
        finally:
            wrapped._close()
        return torch.stack(squares).sum(0).sqrt()

    return run


def _opacus_squares(parameter: Tensor) -> Tensor:
    """A parameter used several times has a list of gradients, one a use."""
    found = parameter.grad_sample  # type: ignore[attr-defined]
    sample = torch.stack(found).sum(0) if isinstance(found, list) else found
    return sample.flatten(1).square().sum(1)


def dattri_llm(case: Case) -> Run:
    """dattri-llm's HookManager on every layer that it takes, and its own norm of what was captured."""
    from dattri_llm import REGISTER_ALL, HookManager, HookManagerConfig
    from dattri_llm.gradient.ops.dot import grad_norm_sq

    def run() -> Tensor:
        case.model.zero_grad(set_to_none=True)
        manager = HookManager(case.model, config=HookManagerConfig(linear_io=REGISTER_ALL))
        try:
            with manager.collect():
                case.losses().mean().backward()
                found = manager.get_gradient()
        finally:
            manager.remove()
        squares = [grad_norm_sq(found.data[name], found.layer_types[name]) for name in found.data]
        return torch.stack(squares).sum(0).sqrt() * case.batch  # of the batch's mean loss

    return run
