"""What the README writes in Python can be written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def test_its_imports_and_names_are_there_in_a_fresh_process() -> None:
    blocks = [code for language, code in _FENCED.findall(README) if language == "python"]
    code = "\n".join([*blocks, *re.findall(r"`([^`]+)`", _FENCED.sub("", README))])
    imports = sorted(set(re.findall(r"from diffhook[\w.]* import [\w, ]+", code)))
    names = sorted(set(re.findall(r"(?<!from )(?<![\w./-])diffhook\.[\w.]*\w", code)))
    assert len(imports) > 4
    assert len(names) > 8
    # The names first, by nothing but `import diffhook`: an import of a part makes it one of the whole.
    script = "\n".join(["import diffhook", *names, *imports])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
