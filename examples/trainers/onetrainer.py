"""OneTrainer, every row by its image's path. In its folder, where its own Python finds diffhook:

    python onetrainer.py runs/mine scripts/train.py --config-path mine.json

It uses no Accelerate, so what it trains is watched here: on one GPU, and with "Fused Back Pass" off, which
would change weights in the midst of the backward.
"""

import runpy
import sys
from pathlib import Path

from torch.nn import Module, ModuleDict

from diffhook.integrations.torch import TorchHook

_, log, *sys.argv = sys.argv
sys.path[:0] = [str(folder) for folder in Path(sys.argv[0]).resolve().parents[:2]]

from modules.trainer import GenericTrainer as module  # noqa: E402, N813

train, make_scaler = module.GenericTrainer.train, module.create_grad_scaler


def train_watched(trainer):
    if trainer.config.optimizer.fused_back_pass:
        sys.exit("diffhook: turn off Fused Back Pass, which changes weights in the midst of the backward")
    parts = vars(trainer.model).values()
    adapters = {
        low.prefix.rstrip(".").replace(".", "_"): getattr(low, "module", low)  # a fused group has one inside
        for part in parts
        for low in getattr(part, "lora_modules", {}).values()
    }
    models = [*(part for part in parts if isinstance(part, Module)), ModuleDict(adapters)]
    loader = trainer.data_loader.get_data_loader()
    with TorchHook(log, *models, trainer.model.optimizer, loader) as hook:

        def make_watched_scaler():
            scaler = make_scaler()
            hook.watch(scaler)
            return scaler

        module.create_grad_scaler = make_watched_scaler
        train(trainer)


module.GenericTrainer.train = train_watched
runpy.run_path(sys.argv[0], run_name="__main__")
