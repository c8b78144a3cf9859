"""The folders of the capture and of its loop: each imports only from those before it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ORDER = {
    "diffhook/capture": ("alerts samples objective recognition model probes recording loop checkpoints"),
    "diffhook/capture/loop": "identity tracing watches probes run losses steps session",
}


@pytest.mark.parametrize("parent", ORDER)
def test_a_folder_imports_only_from_those_before_it(parent: str) -> None:
    order = ORDER[parent].split()
    folders = {path.parent.name for path in (ROOT / parent).glob("*/__init__.py")}
    assert folders == set(order), "put a new folder where it belongs in the order, and in CONTRIBUTING.md"
    for position, folder in enumerate(order):
        for path in (ROOT / parent / folder).rglob("*.py"):
            wrong = set(_neighbours(path, parent)) & set(order[position + 1 :])
            assert not wrong, f"{path.relative_to(ROOT)} imports from {sorted(wrong)}"


def _neighbours(path: Path, parent: str) -> Iterator[str]:
    """The folders of ``parent`` that a file imports from."""
    package = parent.replace("/", ".") + "."
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (
            name.removeprefix(package).partition(".")[0] for name in names if name.startswith(package)
        )
