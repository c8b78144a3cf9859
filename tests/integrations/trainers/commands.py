"""The commands that README.md gives for each trainer, run on a stand-in as its user has it installed."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent
from types import ModuleType

from accelerate.state import AcceleratorState

from diffhook.cli import main
from tests.integrations.trainers.trainer import Trainer

_ROOT = Path(__file__).parents[3]
_RECIPES = _ROOT / "examples" / "trainers"
_ROW = re.compile(r"^\| \[?([\w' -]+?)\]?(?:\([^)]*\))? \| `([^`]+)`", re.MULTILINE)

COMMANDS = dict(_ROW.findall((_ROOT / "README.md").read_text(encoding="utf-8")))
"""Trainer → its command, with runs/mine for the log."""


def install(kind: type[Trainer], place: Path) -> None:
    """Write the files of a trainer where a user has them."""
    for path, content in kind.files.items():
        file = place / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(dedent(content))


def run(name: str, *arguments: str) -> int:
    """Run a trainer's command in the working directory; answers its exit status."""
    words = shlex.split(COMMANDS[name].replace("…", ""))
    if "simpletuner" in words:  # its command line starts its script by accelerate
        extra = words[0].partition("=")[2]
        words = ["accelerate", "launch", *shlex.split(extra), "simpletuner/train.py"]
    words = [str(_RECIPES / word) if (_RECIPES / word).is_file() else word for word in words]
    return start([*words, *arguments])


def start(words: Sequence[str]) -> int:
    """What a shell would, in this process."""
    with _own_interpreter():
        if words[:4] == ["accelerate", "launch", "-m", "diffhook.run"]:
            return main(["run", *words[4:]])
        if words[0] == "diffhook":
            return main(list(words[1:]))
        assert words[0] == "python", words
        sys.argv = list(words[1:])
        try:
            runpy.run_path(words[1], run_name="__main__")
        except SystemExit as error:
            return error.code if isinstance(error.code, int) else 1
        return 0


@contextmanager
def _own_interpreter() -> Iterator[None]:
    """As if a process of its own had been started in the working directory, where things are installed."""
    argv, path, modules = sys.argv, sys.path[:], set(sys.modules)
    AcceleratorState._reset_state(reset_partial_state=True)
    sys.path.insert(0, str(Path.cwd()))
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, path
        here = {name for name in set(sys.modules) - modules if _is_here(sys.modules[name])}
        for name in here:
            del sys.modules[name]


def _is_here(module: ModuleType) -> bool:
    places = [module.__dict__.get("__file__"), *module.__dict__.get("__path__", ())]
    return any(str(place).startswith(str(Path.cwd())) for place in places)
