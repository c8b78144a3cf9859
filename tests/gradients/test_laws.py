"""Rows are right whatever is done to a layer or a batch inside the model: each case stands for its kind."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from diffhook.errors import CaptureError, RecheckNeeded
from diffhook.gradients import PerSampleGradients
from tests.twins import double, relative_error, sample_gradients

Layers = Callable[[], nn.Module]

BATCH, WIDTH = 5, 6


def _losses(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return model(*batch).tanh().square().flatten(1).sum(1)


def _passes(engine: PerSampleGradients, batches: list[tuple[Tensor, ...]], expected: Any) -> int:
    """Passes that were left out; every other is exact, and all train as they would without the engine."""
    twin = copy.deepcopy(engine.model)
    left_out = 0
    for batch in batches:
        for each in (engine.model, twin):
            each.zero_grad()
        exact = expected(copy.deepcopy(twin), batch)  # which may move running statistics
        _losses(twin, batch).mean().backward()
        try:
            with engine:
                _losses(engine.model, batch).mean().backward()
        except RecheckNeeded:
            left_out += 1
        else:
            assert engine.coverage.complete, engine.coverage
            assert relative_error(engine.projections, exact) < 1e-5
            assert relative_error(engine.norms[:, None], exact.norm(dim=1, keepdim=True)) < 1e-5
        for one, other in zip(engine.model.parameters(), twin.parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None)
            assert one.grad is None or torch.equal(one.grad, other.grad)  # type: ignore[arg-type]
        for one, other in zip(engine.model.buffers(), twin.buffers(), strict=True):
            assert torch.equal(one, other)
    return left_out


def _alone(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """(B, P) float64, one sample at a time; in place, as a copy's patched forward runs the original."""
    parameters = [p for p in model.double().parameters() if p.requires_grad]
    rows = []
    for sample in range(len(batch[0])):
        loss = _losses(model, tuple(v[sample : sample + 1] for v in double(batch)))
        shares = torch.autograd.grad(loss.sum(), parameters, materialize_grads=True)
        rows.append(torch.cat([share.flatten() for share in shares]))
    model.float()
    return torch.stack(rows)


def _within_batch(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """(B, P) float64: the gradient of each sample's own loss, computed within the batch."""
    twin = copy.deepcopy(model).double()
    losses = _losses(twin, double(batch))
    rows = [torch.autograd.grad(loss, list(twin.parameters()), retain_graph=True) for loss in losses]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


# ── a layer that does not compute what its class does ─────────────────────────────────────────────


def _net(change: Callable[[nn.Conv2d], Any], conv: type[nn.Conv2d] = nn.Conv2d) -> Layers:
    def make() -> nn.Module:
        last = conv(4, 4, 3)
        model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), last)
        change(last)
        return model

    return make


def _twice_the_weight(layer: nn.Conv2d) -> None:
    layer.forward = lambda x: F.conv2d(x, 2 * layer.weight, layer.bias)  # type: ignore[method-assign]


def _standardised(layer: nn.Conv2d) -> None:
    def forward(self: nn.Conv2d, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)

    layer.forward = types.MethodType(forward, layer)  # type: ignore[method-assign]


def _scaled_output(layer: nn.Conv2d) -> None:
    original = layer.forward
    layer.forward = lambda x: 0.3 * original(x)  # type: ignore[method-assign]


def _circular(layer: nn.Conv2d) -> None:
    def forward(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)

    layer._conv_forward = types.MethodType(forward, layer)  # type: ignore[method-assign]


class _Seamless(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(F.pad(input, (1, 0, 2, 0)), weight.flip(0), bias)


class _Callable(nn.Conv2d):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x.roll(1, 2))  # type: ignore[no-any-return]


DERIVED: dict[str, Layers] = {
    "prune-structured": _net(lambda layer: prune.ln_structured(layer, "weight", 0.5, 2, 0)),
    "prune-random": _net(lambda layer: prune.random_unstructured(layer, "weight", 0.4)),
    "prune-bias": _net(lambda layer: prune.random_unstructured(layer, "bias", 2)),
    "weight-norm-old": _net(lambda layer: nn.utils.weight_norm(layer)),
    "weight-norm": _net(lambda layer: parametrizations.weight_norm(layer)),
    "spectral-norm-old": _net(lambda layer: nn.utils.spectral_norm(layer).eval()),
    "spectral-norm": _net(lambda layer: parametrizations.spectral_norm(layer).eval()),
    "orthogonal": lambda: nn.Sequential(nn.Flatten(), parametrizations.orthogonal(nn.Linear(2 * 36, 4))),
    "forward-scaled-weight": _net(_twice_the_weight),
    "forward-standardised-weight": _net(_standardised),
    "forward-scaled-output": _net(_scaled_output),
    "conv-forward-patched": _net(_circular),
    "conv-forward-overridden": _net(lambda layer: None, _Seamless),
    "call-overridden": _net(lambda layer: None, _Callable),
    "transposed": lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.ConvTranspose2d(4, 3, 3, stride=2)),
    "pruned-alone": lambda: prune.ln_structured(nn.Conv2d(2, 4, 3), "weight", 0.5, 2, 0),
    "weight-norm-alone": lambda: nn.utils.weight_norm(nn.Conv2d(2, 4, 3)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("weight_gradients", [True, False], ids=["in-step", "probe"])
@pytest.mark.parametrize("name", DERIVED)
def test_a_layer_that_does_not_compute_what_its_class_does_is_exact(
    name: str, weight_gradients: bool
) -> None:
    torch.manual_seed(0)
    model = DERIVED[name]()
    engine = PerSampleGradients(model, projection_dim="full", weight_gradients=weight_gradients)
    for _ in range(3):
        batch = (torch.randn(BATCH, 2, 6, 6),)
        expected = _alone(model, batch)
        with engine:
            _losses(model, batch).mean().backward()
        assert engine.coverage.complete, engine.coverage
        assert relative_error(engine.projections, expected) < 1e-5


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: prune.random_unstructured(layer, "weight", 0.4),
        lambda layer: nn.utils.spectral_norm(layer).eval(),
        _twice_the_weight,
        _circular,
    ],
    ids=["pruned", "spectral-norm", "forward", "conv-forward"],
)
def test_a_layer_that_is_changed_during_training_costs_a_pass(change: Callable[[nn.Conv2d], Any]) -> None:
    torch.manual_seed(0)
    model = _net(lambda layer: None)()
    batch = (torch.randn(BATCH, 2, 6, 6),)
    engine = PerSampleGradients(model, projection_dim=0)
    for step in range(4):
        if step == 1:
            change(model[2])  # type: ignore[index]
        expected = _alone(model, batch).norm(dim=1)
        if step == 1:
            with pytest.raises(RecheckNeeded, match=r"^2 is used in another way") as raised, engine:
                _losses(model, batch).mean().backward()
            assert (raised.value.law, raised.value.names) == ("usage", ("2",))
            continue
        with engine:
            _losses(model, batch).mean().backward()
        torch.testing.assert_close(engine.norms, expected.float(), rtol=1e-5, atol=0)


def test_a_wrong_rule_is_found_out_and_its_layer_goes_to_the_fallback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A class-level patch, which no look at the instance shows."""
    original = F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, b=None: original(x, w, b))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    rule = PerSampleGradients(model)._assignment.layers["2"].rule
    products = type(rule).products

    def wrong(*args: Any) -> Any:
        for local, product in products(*args):
            yield local, product * 1.05 if isinstance(product, Tensor) else product

    engine = PerSampleGradients(model, projection_dim="full")
    monkeypatch.setattr(type(rule), "products", wrong)
    batches = [(torch.randn(BATCH, 3, WIDTH),) for _ in range(3)]
    assert _passes(engine, batches, _alone) == 1
    assert engine.coverage.ruled == ()


def test_a_gradient_that_a_hook_changes_is_named() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    model[0].weight.register_hook(lambda gradient: gradient * torch.eye(WIDTH))
    engine = PerSampleGradients(model, projection_dim="full")
    batch = (torch.randn(BATCH, WIDTH),)
    with pytest.raises(RecheckNeeded) as raised, engine:
        _losses(model, batch).mean().backward()
    assert (raised.value.law, raised.value.names) == ("completeness", ("0.weight",))
    for expectation in (pytest.warns(UserWarning, match="leave out 1 of 4"), nullcontext()):
        with expectation, engine:
            _losses(model, batch).mean().backward()
        assert dict(engine.coverage.missing) == {
            "0.weight": "a hook on the parameter changes the gradient that training uses"
        }
        expected = _alone(model, batch)
        expected[:, : WIDTH * WIDTH] = 0
        assert relative_error(engine.projections, expected) < 1e-5


# ── rows that are not the samples, in order ───────────────────────────────────────────────────────


class _Around(nn.Module):
    """Two layers, and something done to the batch between, which is undone at the end."""

    def __init__(self, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH)
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.inner(self.before(self.first(x).tanh()))).sin()
        return self.last(self.after(hidden))


class _Sorted(_Around):
    """By length, as packed sequences are, and sorted back."""

    def __init__(self) -> None:
        super().__init__(lambda x: x, lambda x: x)

    def forward(self, x: Tensor) -> Tensor:
        order = x.flatten(1).sum(1).argsort()
        hidden = self.inner(x[order].cos()).sin()
        return self.last(self.norm(self.first(hidden)).index_select(0, order.argsort()))


class _Table(nn.Module):
    """Called on a table first, which has as many rows as the batch by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, table: Tensor, x: Tensor) -> Tensor:
        return self.inner((x + self.table(table).sin()[: x.shape[1]]).tanh())


REORDERED: dict[str, Layers] = {
    "sorted": _Sorted,
    "rolled": lambda: _Around(lambda x: x.roll(1, 0), lambda x: x.roll(-1, 0)),
    "flipped": lambda: _Around(lambda x: x.flip(0), lambda x: x.flip(0)),
    "pairs-swapped": lambda: _Around(_swap_two, _swap_two),
}


def _swap_two(x: Tensor) -> Tensor:
    return torch.cat([x[:2], x[3:4], x[2:3], x[4:]])


@pytest.mark.parametrize("tokens", [(), (3,)], ids=["flat", "tokens"])
@pytest.mark.parametrize("name", REORDERED)
def test_samples_that_the_model_reorders_are_followed(name: str, tokens: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    engine = PerSampleGradients(REORDERED[name](), projection_dim="full")
    batches = [(torch.randn(BATCH, *tokens, WIDTH),) for _ in range(4)]
    assert _passes(engine, batches, _alone) == 1
    assert engine.coverage.inseparable


def test_a_table_as_long_as_the_batch_is_no_batch() -> None:
    torch.manual_seed(0)
    engine = PerSampleGradients(_Table(), projection_dim="full")
    table = torch.randn(BATCH, WIDTH)
    batches = [(table, torch.randn(BATCH, BATCH, WIDTH)) for _ in range(3)]

    def expected(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return sample_gradients(model, lambda m, b: _losses(m, (double(table), *b)), batch[1:])

    assert _passes(engine, batches, expected) == 1


class _MeanSubtracted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


class _MinibatchDeviation(nn.Module):
    """As progressive GANs append it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x.std(0).mean().expand(len(x), 1, *x.shape[2:])], 1)


class _Mixed(nn.Module):
    """Manifold mixup."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.7 * x + 0.3 * x[torch.arange(len(x)).roll(2)]


COUPLED: dict[str, Layers] = {
    "batchnorm2d": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 3, 1),
    ),
    "batchnorm2d-inplace": lambda: nn.Sequential(
        nn.Conv2d(2, BATCH, 3), nn.BatchNorm2d(BATCH), nn.ReLU(inplace=True), nn.Conv2d(BATCH, 3, 1)
    ),
    "batchnorm1d": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(72, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)
    ),
    "syncbatchnorm": lambda: nn.SyncBatchNorm.convert_sync_batchnorm(
        nn.Sequential(nn.Flatten(), nn.Linear(72, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
    ),
    "batchnorm3d": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2)), nn.Conv3d(1, 4, (2, 3, 3)), nn.BatchNorm3d(4), nn.SiLU(), nn.Conv3d(4, 2, 1)
    ),
    "batchnorm-no-statistics": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.SiLU(), nn.Conv2d(4, 2, 1)
    ).eval(),
    "batch-mean": lambda: nn.Sequential(nn.Conv2d(2, 4, 3), _MeanSubtracted(), nn.SiLU(), nn.Conv2d(4, 2, 1)),
    "minibatch-deviation": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3), _MinibatchDeviation(), nn.SiLU(), nn.Conv2d(5, 2, 1)
    ),
    "mixup": lambda: nn.Sequential(nn.Conv2d(2, 4, 3), _Mixed(), nn.SiLU(), nn.Conv2d(4, 2, 1)),
}  # fmt: skip


@pytest.mark.parametrize("weight_gradients", [True, False], ids=["in-step", "probe"])
@pytest.mark.parametrize("name", COUPLED)
def test_where_the_model_couples_samples_a_row_is_of_the_sample_within_its_batch(
    name: str, weight_gradients: bool
) -> None:
    torch.manual_seed(0)
    model = COUPLED[name]()
    engine = PerSampleGradients(model, projection_dim="full", weight_gradients=weight_gradients)
    outcomes = []
    for _ in range(4):
        batch = (torch.randn(BATCH, 2, 6, 6),)
        expected = _within_batch(model, batch)
        try:
            with engine:
                _losses(model, batch).mean().backward()
        except RecheckNeeded as again:
            outcomes.append(again.law)
            continue
        outcomes.append("exact")
        assert engine.coverage.complete
        assert relative_error(engine.projections, expected) < 1e-5
    assert outcomes == ["separability", "exact", "exact", "exact"]
    assert engine.coverage.inseparable, "samples are coupled, and nothing says so"
    if "batchnorm" in name:
        assert all("BatchNorm" in why for why in engine.coverage.inseparable.values())


def test_coupled_samples_are_told_in_one_warning() -> None:
    model = COUPLED["batchnorm2d"]()
    engine, batch = PerSampleGradients(model), (torch.randn(BATCH, 2, 6, 6),)
    with pytest.raises(RecheckNeeded), engine:
        _losses(model, batch).mean().backward()
    with pytest.warns(UserWarning, match=r"within its batch: 1 \(BatchNorm2d couples samples"), engine:
        _losses(model, batch).mean().backward()


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_statistics_that_are_not_of_the_batch_couple_nothing(kind: Any) -> None:
    torch.manual_seed(0)
    norm = kind(4, affine=True, track_running_stats=True)
    if kind is nn.BatchNorm2d:
        norm.eval()
    model = nn.Sequential(nn.Conv2d(2, 4, 3), norm, nn.SiLU(), nn.Conv2d(4, 2, 1))
    engine = PerSampleGradients(model, projection_dim="full")
    batches = [(torch.randn(BATCH, 2, 6, 6),) for _ in range(3)]
    assert _passes(engine, batches, _alone) == 0
    assert not engine.coverage.inseparable


def test_a_batch_of_one_says_nothing_about_others() -> None:
    torch.manual_seed(0)
    engine = PerSampleGradients(_Sorted(), projection_dim="full")
    batches = [(torch.randn(rows, WIDTH),) for rows in (1, 1, 5, 5, 5, 1, 4)]
    assert _passes(engine, batches, _alone) == 2, "one finds out about rows, one about what happens to them"


# ── spot checks ───────────────────────────────────────────────────────────────────────────────────


def test_what_begins_to_couple_samples_later_is_found_by_a_spot_check() -> None:
    class Later(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.rolls = False

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.inner(x.roll(1, 0) if self.rolls else x).sin()
            return self.last(hidden.roll(-1, 0) if self.rolls else hidden)

    torch.manual_seed(0)
    model, batch = Later(), (torch.randn(BATCH, WIDTH),)
    engine = PerSampleGradients(model, projection_dim="full")
    assert _passes(engine, [batch] * 10, _alone) == 0
    model.rolls = True
    outcomes = []
    for _ in range(10):
        try:
            with engine:
                _losses(model, batch).mean().backward()
            outcomes.append(relative_error(engine.projections, _alone(model, batch)) < 1e-5)
        except RecheckNeeded as again:
            outcomes.append(again.law)
    assert outcomes == [False] * 5 + ["separability"] + [True] * 4


@pytest.mark.parametrize("reentrant", [False, True])
def test_checks_leave_dropout_and_statistics_of_checkpointed_blocks_alone(reentrant: bool) -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(WIDTH, WIDTH)
            self.block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5), nn.Tanh())
            self.register_buffer("calls", torch.zeros(()))

        def _run(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.block(x)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            options = {} if reentrant else {"preserve_rng_state": False}
            return checkpoint(self._run, hidden, use_reentrant=reentrant, **options)

    results = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = Blocks()
        engine = PerSampleGradients(model, projection_dim=16)
        for _ in range(2):
            model.zero_grad()
            if watched:
                with engine:
                    _losses(model, (torch.ones(BATCH, WIDTH),)).mean().backward()
            else:
                _losses(model, (torch.ones(BATCH, WIDTH),)).mean().backward()
        results.append([model.calls, torch.rand(3), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert (engine.coverage.unchecked is not None) == reentrant


# ── backward passes of another kind ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize("first", [True, False], ids=["first-pass", "later-pass"])
@pytest.mark.parametrize("bare", [False, True], ids=["ruled", "fallback"])
def test_a_gradient_penalty_costs_the_pass_and_nothing_else(first: bool, bare: bool) -> None:
    torch.manual_seed(0)
    kind = nn.ConvTranspose2d if bare else nn.Conv2d
    model = nn.Sequential(kind(2, 4, 3), nn.Tanh(), kind(4, 1, 3))
    twin = copy.deepcopy(model)
    engine = PerSampleGradients(model, projection_dim="full")

    def penalised(model: nn.Module, batch: Tensor) -> Tensor:
        batch = batch.clone().requires_grad_()
        losses = _losses(model, (batch,))
        (slope,) = torch.autograd.grad(losses.sum(), batch, create_graph=True)
        return (losses + slope.square().flatten(1).sum(1)).mean()

    plain = (torch.randn(BATCH, 2, 6, 6),)
    if not first:
        assert _passes(engine, [plain], _alone) == 0
    for each in (model, twin):
        each.zero_grad()
    penalised(twin, plain[0]).backward()
    with pytest.raises(CaptureError, match="create_graph") as raised, engine:
        penalised(model, plain[0]).backward()
    assert raised.value.kind == "double backward"
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0)
    assert _passes(engine, [plain, plain], _alone) == 0


def test_a_backward_of_the_loops_own_before_the_real_one_costs_the_pass() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    engine = PerSampleGradients(model)
    batch = torch.randn(BATCH, WIDTH, requires_grad=True)
    engine.begin()
    engine.attach()
    losses = _losses(model, (batch,))
    torch.autograd.grad(losses.sum(), batch, retain_graph=True)
    losses.mean().backward()
    with pytest.raises(CaptureError) as raised:
        engine.finish()
    engine.detach()
    assert raised.value.kind == "double backward"


# ── modules that others run ───────────────────────────────────────────────────────────────────────


class _LoRA(nn.Module):
    """Trained beside a frozen layer, whose forward it takes over (own wording of a common pattern)."""

    def __init__(self, host: nn.Linear) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)
        original = host.forward
        host.forward = lambda x: original(x) + self.up(self.down(x))  # type: ignore[method-assign]


def test_adapters_that_a_frozen_host_runs_are_captured_by_passing_its_calls_in() -> None:
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)).requires_grad_(False)
    adapters = nn.ModuleList([_LoRA(host[0]), _LoRA(host[2])])
    engine = PerSampleGradients(adapters, projection_dim="full")
    engine.attach()
    for _ in range(3):
        batch = torch.randn(BATCH, 4, WIDTH)
        parameters = list(adapters.parameters())
        rows = [torch.autograd.grad(loss, parameters) for loss in (_losses(host, (x[None],)) for x in batch)]
        expected = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        engine.begin()
        engine.enter_model(host, (batch,))
        output = host(batch)
        engine.leave_model(host, (batch,), output)
        output.tanh().square().flatten(1).sum(1).mean().backward()
        engine.finish()
        assert engine.coverage.complete
        assert relative_error(engine.projections, expected) < 1e-5
    engine.detach()


def test_layers_that_are_called_outside_of_the_model_say_what_to_do() -> None:
    host = nn.Sequential(nn.Linear(WIDTH, WIDTH)).requires_grad_(False)
    adapters = nn.ModuleList([_LoRA(host[0])])
    engine = PerSampleGradients(adapters)
    with pytest.raises(CaptureError, match="enter_model") as raised, engine:
        _losses(host, (torch.randn(BATCH, WIDTH),)).mean().backward()
    assert raised.value.kind == "outside"


def test_a_wrapper_that_returns_its_loss_is_checked_inside() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = COUPLED["batchnorm2d"]()

        def forward(self, x: Tensor) -> Tensor:
            return _losses(self.model, (x,)).mean()

    engine = PerSampleGradients(Wrapper())
    with pytest.raises(RecheckNeeded) as raised, engine:
        engine.model(torch.randn(BATCH, 2, 6, 6)).backward()
    assert raised.value.law == "separability"
