"""Stand-ins for trainers that people use: what is prepared, called, batched and reordered, in our own words.

Read in the trainers' code of summer 2026. They train on two buckets of two sizes, with one image repeated
and two of them also flipped.
"""

from tests.integrations.trainers.ai_toolkit import AiToolkit
from tests.integrations.trainers.kohya import Kohya
from tests.integrations.trainers.lucidrains import Lucidrains
from tests.integrations.trainers.musubi import Musubi
from tests.integrations.trainers.onetrainer import OneTrainer
from tests.integrations.trainers.simpletuner import SimpleTuner
from tests.integrations.trainers.trainer import Trainer

TRAINERS: dict[str, type[Trainer]] = {
    "SimpleTuner": SimpleTuner,
    "ai-toolkit": AiToolkit,
    "musubi-tuner": Musubi,
    "sd-scripts": Kohya,
    "OneTrainer": OneTrainer,
    "denoising-diffusion-pytorch": Lucidrains,
}
