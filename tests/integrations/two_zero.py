"""ZeRO trainings, for torchrun: … --nproc-per-node 2 two_zero.py OUT. Writes OUT/found-RANK.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import DistributedType
from torch import Tensor, nn

from diffhook.gradients import PerSampleGradients
from diffhook.integrations.torch import TorchHook
from tests.gradients.test_sharding import BATCH, TOKENS, WIDTH, Model, losses_of
from tests.integrations import two_sharded as sharded
from tests.integrations.two_processes import told_loss
from tests.integrations.two_sharded import KEPT, GatedDenoiser, equal
from tests.runs import identified, probed
from tests.twins import relative_error, sample_gradients


def engine_of(model: nn.Module, stage: int, **config: Any) -> tuple[Any, Any]:
    """DeepSpeed's engine and optimiser."""
    given = {
        "train_micro_batch_size_per_gpu": 3,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # not 1, as for some versions
        **config,
    }
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=given)[:2]  # type: ignore[no-any-return]


def train(log: Path | None, stage: int, *, accumulation: int = 1, **config: Any) -> list[Tensor]:
    """Everything that training leaves on this process."""
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    model = GatedDenoiser()
    config = {"gradient_accumulation_steps": accumulation, **config}
    engine, optimizer = engine_of(model, stage, **config)
    options = {"rank": rank, "processes": 2, "every": 1, "strict": True, **KEPT}
    hook = TorchHook(log or "none", engine, optimizer, enabled=log is not None, **options)
    losses = []
    for step in range(4 * accumulation):
        ids = 6 * (step % 2) + 3 * rank + torch.arange(3)
        clean = identified()[ids].to(next(model.parameters()).dtype)
        with hook.step(sample_ids=ids, batch=clean):
            loss = told_loss(engine, clean)
            engine.backward(loss)
        losses.append(loss.detach())
        engine.step()
    hook.close()
    return [*losses, *(parameter.detach().clone() for parameter in model.parameters())]


def accelerated() -> Accelerator:
    """Accelerate hands models to DeepSpeed on accelerators only; the preparation itself runs anywhere."""
    given = {"train_micro_batch_size_per_gpu": 3, "zero_optimization": {"stage": 2}, "gradient_clipping": 0.0}
    plugin = DeepSpeedPlugin(
        hf_ds_config={**given, "gradient_accumulation_steps": 1, "zero_allow_untested_optimizer": True}
    )
    accelerator = Accelerator(cpu=True, deepspeed_plugin=plugin)
    accelerator.state.distributed_type = DistributedType.DEEPSPEED
    accelerator.state.deepspeed_plugins = {"default": plugin}
    plugin._set_selected(True)
    accelerator.deepspeed_engine_wrapped = None
    return accelerator


def rows(stage: int) -> float:
    """The largest error of rows of a model whose last operation uses a bare parameter."""
    torch.manual_seed(0)
    model = Model()
    engine, _ = engine_of(model, stage)
    gradients = PerSampleGradients(engine, projection_dim="full")
    torch.manual_seed(1 + torch.distributed.get_rank())
    errors = []
    for _ in range(3):
        batch = (torch.randn(BATCH, TOKENS, WIDTH),)
        twin = Model()
        twin.load_state_dict(model.state_dict())
        with gradients:
            engine.backward(losses_of(engine, batch).mean())
        engine.step()
        errors.append(relative_error(gradients.projections, sample_gradients(twin, losses_of, batch)))
    return max(errors)


def main(out: Path) -> None:
    Accelerator(cpu=True)
    deepspeed.init_distributed(dist_backend="gloo")
    found: dict[str, Any] = {}
    for stage in (1, 2):
        same = equal(train(None, stage), train(out / f"log-{stage}", stage))
        accumulated = train(None, stage, accumulation=2)
        same_too = equal(accumulated, train(out / f"accumulated-{stage}", stage, accumulation=2))
        found[str(stage)] = [same, same_too, rows(stage)]
    half = {"bf16": {"enabled": True}}
    found["bf16"] = equal(train(None, 2, **half), train(out / "bf16", 2, **half))
    kind = mock.PropertyMock(return_value=DistributedType.DEEPSPEED)
    with mock.patch.object(Accelerator, "distributed_type", kind):
        plain = sharded.train(None, sharded.loader(3), accelerated())
        log = out / "accelerated"
        found["accelerated"] = equal(
            plain, sharded.train(log, sharded.loader(3), accelerated(), every=1, **KEPT)
        )
        options = {"every": 1, **KEPT, **probed()}
        found["probed"] = equal(
            plain, sharded.train(out / "probed", sharded.loader(3), accelerated(), **options)
        )
    (out / f"found-{torch.distributed.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
