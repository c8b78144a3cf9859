"""The API reference, from docstrings, by pdoc: python tests/reference.py FOLDER."""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path

import pdoc

PUBLIC = (
    "diffhook",
    "diffhook.integrations.accelerate",
    "diffhook.integrations.lightning",
    "diffhook.integrations.torch",
    "diffhook.integrations.transformers",
    "diffhook.analysis.methods",
    "diffhook.analysis.signals",
    "diffhook.analysis.evaluation",
    "diffhook.capture.alerts",
    "diffhook.gradients.rules",
)


def build(folder: Path) -> None:
    for name in PUBLIC:
        module = importlib.import_module(name)
        for public in module.__all__:
            setattr(module, public, getattr(module, public))  # pdoc does not look behind __getattr__
    specs = [
        spec for name in PUBLIC for spec in (name, f"!{name}\\..+")
    ]  # what it exports, not where that lies
    pdoc.render.configure(docformat="google", search=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Error parsing type annotation")  # of names for type checkers alone
        pdoc.pdoc(*specs, output_directory=folder)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
