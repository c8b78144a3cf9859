"""Our own methods and signals keep the contracts that we give to others; a wrong one breaks them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffhook.analysis.methods import METHODS, Method
from diffhook.analysis.methods import register as register_method
from diffhook.analysis.signals import SIGNALS, Found, Signal, View
from diffhook.analysis.signals import register as register_signal
from diffhook.analysis.testing import MethodContract, SignalContract


def contracted(contract: type) -> list[str]:
    return [name for name in vars(contract) if name.startswith("test_")]


def run(contract: type, test: str, folder: Path, **named: Any) -> None:
    made, call = type("Contract", (contract,), named)(), getattr(contract, test)
    call(made, *([folder] if "tmp_path" in call.__annotations__ else []))


@pytest.fixture
def _registries() -> Iterator[None]:
    tables: list[dict[str, Any]] = [METHODS, SIGNALS]
    before = [dict(table) for table in tables]
    yield
    for table, kept in zip(tables, before, strict=True):
        table.clear()
        table.update(kept)


@pytest.mark.parametrize("test", contracted(MethodContract))
@pytest.mark.parametrize("method", sorted(METHODS))
def test_methods(method: str, test: str, tmp_path: Path) -> None:
    run(MethodContract, test, tmp_path, method=type(METHODS[method]))


@pytest.mark.parametrize("test", contracted(SignalContract))
@pytest.mark.parametrize("signal", ["loss", "norm", "repeat", "tracin", "retrac"])
def test_signals(signal: str, test: str, tmp_path: Path) -> None:
    """The others need labels, pictures, probes or many samples, and have tests of their own."""
    run(SignalContract, test, tmp_path, signal=type(SIGNALS[signal]))


@pytest.mark.usefixtures("_registries")
def test_a_method_that_reads_a_column_in_secret_breaks_the_contract(tmp_path: Path) -> None:
    @register_method
    class Secret(Method):
        name, title, formula, reference = "secret", "secret", "?", "here"

        def rates(self, columns: Mapping[str, Any]) -> Any:
            return np.asarray(columns["timestep"])

    with pytest.raises(KeyError, match="timestep"):
        run(MethodContract, contracted(MethodContract)[0], tmp_path, method=Secret)


@pytest.mark.usefixtures("_registries")
def test_a_signal_that_goes_by_the_order_of_rows_breaks_the_contract(tmp_path: Path) -> None:
    @register_signal
    class First(Signal):
        name, title, meaning = "first", "first", "by the first row"

        def look(self, view: View) -> Found | None:
            sample, loss = view.table["sample"], view.table["loss"]
            return Found(np.array([loss[sample == i][0] for i in view.sample_ids]), {})

    with pytest.raises(AssertionError):
        run(SignalContract, "test_the_order_of_rows_changes_nothing", tmp_path, signal=First)
