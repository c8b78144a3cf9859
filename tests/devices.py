"""The device of tests that are marked ``gpu``.

``DIFFHOOK_TEST_DEVICE=cpu`` rehearses them where there is no GPU: it shows that their code runs.
"""

from __future__ import annotations

import os

DEVICE = os.environ.get("DIFFHOOK_TEST_DEVICE", "cuda")


def has_gpu() -> bool:
    """Whether there is one, or another device stands for it."""
    import torch

    return DEVICE != "cuda" or torch.cuda.is_available()
