"""The recipes of .github/CONTRIBUTING.md work as they stand there, and what it says of the tree is so."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import diffhook
from diffhook.analysis.methods import METHODS
from diffhook.analysis.signals import SIGNALS
from diffhook.analysis.testing import MethodContract, SignalContract
from diffhook.capture.loop.testing import LoopContract, items, losses_of
from diffhook.errors import ConfigurationError
from diffhook.gradients.rules import registry
from diffhook.gradients.rules.testing import LayerRuleContract
from tests.analysis.formulas import close, direct
from tests.analysis.synthetic import synthetic

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"^```python ([\w-]+)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE))


def _follow(recipe: str, *, without: str = "") -> dict[str, Any]:
    """The names that the recipe's block defines; ``without`` a part that matches."""
    code = re.sub(without, "", RECIPES[recipe], count=1, flags=re.DOTALL) if without else RECIPES[recipe]
    assert not without or code != RECIPES[recipe]
    names: dict[str, Any] = {"__name__": f"recipe_{recipe}"}
    exec(compile(code, f"CONTRIBUTING.md, {recipe}", "exec", dont_inherit=True), names)
    return names


@pytest.fixture(autouse=True)
def _registries() -> Iterator[None]:
    """What a recipe registers is gone after its test."""
    tables: list[dict[Any, Any]] = [registry._rules, registry._methods, METHODS, SIGNALS]
    before = [dict(table) for table in tables]
    yield
    for table, kept in zip(tables, before, strict=True):
        table.clear()
        table.update(kept)


CONTRACT = [name for name in vars(LayerRuleContract) if name.startswith("test_")]


@pytest.mark.parametrize("test", CONTRACT)
def test_the_recipe_for_a_layer_rule_keeps_the_contract_of_rules(test: str) -> None:
    getattr(_follow("layer-rule")["TestScale"](), test)()


@pytest.mark.parametrize(
    ("missing", "line"),
    [
        ("modules", r"    modules = .*?\n"),
        ("parameters", r"    parameters = .*?\n"),
        ("samples_first", r"    def samples_first.*?\n\n"),
        ("mixes_channels", r"    def mixes_channels.*?\n\n"),
        ("products", r"    def products.*?\n\n"),
    ],
)
def test_a_rule_is_refused_where_any_of_its_lines_is_forgotten(missing: str, line: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^ScaleRule is no layer rule yet: it leaves out {missing}"):
        _follow("layer-rule", without=line)


def test_a_wrong_rule_breaks_the_contract() -> None:
    contract = _follow("layer-rule", without=r" \* call\.inputs\.to\(grad\.dtype\)")["TestScale"]()
    with pytest.raises(diffhook.errors.RecheckNeeded, match="do not add up to autograd's"):
        contract.test_gradients_are_the_batch_1_loops()


def test_the_recipe_for_a_method_weighs_rows_by_timestep(tmp_path: Path) -> None:
    made = synthetic(tmp_path / "log")
    _follow("method")
    late = made.train.columns["timestep"] >= 500
    assert 0 < late.sum() < len(late)
    made.train.columns["lr"][late] = 0  # so that the formula of ReTrac gives them no weight
    found = diffhook.influence(made.log, "new", "early-retrac", "train")
    close(found.values, direct(made.train, made.queries["new"], "retrac"))


def test_the_recipe_for_a_signal_tells_and_changes_no_ranking(tmp_path: Path) -> None:
    log = synthetic(tmp_path / "log").log
    before = diffhook.outliers(log, "train")
    _follow("signal")
    after = diffhook.outliers(log, "train")
    assert after.signals.keys() - before.signals.keys() == {"steep"}
    assert np.isfinite(after.signals["steep"]).all()
    assert np.array_equal(after.sample_ids, before.sample_ids)
    assert np.array_equal(after.scores, before.scores)
    assert after.reasons == before.reasons
    alone = diffhook.outliers(log, "train", ["steep"])
    assert np.array_equal(alone.scores, np.sort(after.signals["steep"])[::-1])


@pytest.mark.parametrize(
    ("recipe", "name", "contract"),
    [("method", "TestEarlyReTrac", MethodContract), ("signal", "TestSteep", SignalContract)],
)
def test_the_recipes_of_the_analysis_keep_their_contracts(
    recipe: str, name: str, contract: type, tmp_path: Path
) -> None:
    made = _follow(recipe)[name]()
    for number, test in enumerate(each for each in vars(contract) if each.startswith("test_")):
        call = getattr(made, test)
        call(*([tmp_path / str(number)] if "tmp_path" in call.__annotations__ else []))


class TestFramework(LoopContract):
    """The adapter of the recipe, called as a trainer would call it."""

    def train(self, model: nn.Module, log: Path | None, folder: Path) -> None:
        callback = _follow("framework")["Callback"](
            folder / "off" if log is None else log,
            enabled=log is not None,
            projection_dim=0,
            sample_ids="ids",
        )
        optimizer = torch.optim.SGD(model.parameters(), self.lr)
        loader: Any = DataLoader(items(), self.batch)  # type: ignore[arg-type]
        callback.on_start(model, optimizer)
        for number, batch in enumerate(loader):
            callback.on_batch(batch)
            loss = losses_of(model, batch).mean() / self.accumulation
            callback.on_loss(self.accumulation)
            loss.backward()
            if (number + 1) % self.accumulation == 0:
                optimizer.step()
                optimizer.zero_grad()
        callback.on_end()


def _named() -> Iterator[str]:
    for name in re.findall(r"`([\w./-]+)`", PAGE):
        if name.split("/")[0] in ("diffhook", "integrations", "tests", "examples"):
            yield name


@pytest.mark.parametrize("name", sorted(set(_named())))
def test_what_the_page_names_exists(name: str) -> None:
    assert (ROOT / name).exists()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([A-Z]\w+?)(?:\.\w+)?`", PAGE))))
def test_what_the_page_calls_by_name_is_defined(name: str) -> None:
    sources = [*(ROOT / "diffhook").rglob("*.py"), *(ROOT / "integrations").rglob("*.py")]
    assert any(re.search(rf"^class {name}\b", path.read_text(encoding="utf-8"), re.M) for path in sources)


def test_each_folder_imports_only_from_those_to_its_right() -> None:
    (line,) = re.findall(r"to its right: (.*?), which do not know each other", PAGE, re.DOTALL)
    floors = [re.findall(r"`(?:diffhook/)?(\w+)/`", part) for part in line.split("→")]
    assert [len(floor) for floor in floors] == [1, 1, 2, 1, 1, 2], floors
    for height, floor in enumerate(floors):
        under = {name for lower in floors[height + 1 :] for name in lower}
        for folder in floor:
            others = {name for each in floors for name in each} - under - {folder}
            place = ROOT if folder == "integrations" else ROOT / "diffhook"
            for path in (place / folder).rglob("*.py"):
                text = path.read_text(encoding="utf-8")
                found = set(re.findall(r"^\s*(?:from|import) diffhook\.(\w+)", text, re.MULTILINE))
                assert not found & others, f"{path} imports {found & others}"
