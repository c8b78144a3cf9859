"""The machine that a number was measured on, in words."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def machine() -> str:
    """Processor, cores, GPU if any, and torch."""
    if torch.cuda.is_available():
        processor = torch.cuda.get_device_name()
    else:
        processor = f"{_processor()}, {os.cpu_count()} cores, no GPU"
    return f"{processor}; torch {torch.__version__}"


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
