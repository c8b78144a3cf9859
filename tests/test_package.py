"""What is installed is whole, also from a clone whose link to the adapters is a plain file (Windows)."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def _run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed and uncommitted files of the project, without links."""
    target = tmp_path_factory.mktemp("clone")
    names = _run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).splitlines()
    for name in names:
        source, copy = ROOT / name, target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(os.readlink(source).encode() if source.is_symlink() else source.read_bytes())
    assert (target / "diffhook" / "integrations").is_file(), "what Git for Windows makes of the link"
    return target


def _adapters() -> list[str]:
    return sorted(
        "diffhook/integrations/" + path.relative_to(ROOT / "integrations").as_posix()
        for path in (ROOT / "integrations").rglob("*.py")
    )


@pytest.fixture(scope="module")
def built(clone: Path) -> Path:
    for kind in ("wheel", "sdist"):
        script = f"from setuptools import build_meta; build_meta.build_{kind}('dist')"
        _run(sys.executable, "-c", script, cwd=clone)
    return clone / "dist"


def test_a_wheel_has_every_file_of_the_package(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    found = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "diffhook"
    others = (
        path
        for name in ("*.py", "py.typed", "*.jinja", "*.js", "*.css", "*.md")
        for path in package.rglob(name)
    )
    assert {path.relative_to(ROOT).as_posix() for path in others} | set(_adapters()) <= found


def test_every_adapter_of_the_wheel_can_be_imported(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    names = [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in _adapters()]
    script = (
        "import importlib, sys\n"
        f"for name in {names}: importlib.import_module(name)\n"
        "print(importlib.import_module('diffhook').__file__)"
    )
    printed = _run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert Path(printed.splitlines()[-1]).is_relative_to(tmp_path)


def test_a_source_archive_has_the_adapters_and_the_changelog(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        found = {name.partition("/")[2] for name in opened.getnames()}
    assert {"CHANGELOG.md", "LICENSE", "README.md", "integrations/accelerate/hook.py"} <= found
