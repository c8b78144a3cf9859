"""A class that leaves out what is needed of it, or takes another's name, is refused when it is registered."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from diffhook.analysis import methods, signals
from diffhook.analysis.signals import Found, Signal, View
from diffhook.capture import alerts
from diffhook.errors import ConfigurationError

WHOLE = {
    methods.register: (
        methods.Method,
        {"name": "late", "title": "late rows", "formula": "Σ_r", "reference": "here"},
    ),
    signals.register: (
        Signal,
        {"name": "late", "title": "lateness", "meaning": "when it came", "look": lambda self, view: None},
    ),
    alerts.register: (alerts.Detector, {"kind": "late", "look": lambda self, rows: iter(())}),
}
CASES = [(register, name) for register, (_, answers) in WHOLE.items() for name in answers]


@pytest.fixture(autouse=True)
def _registries() -> Iterator[None]:
    tables: list[dict[str, object]] = [methods.METHODS, signals.SIGNALS, alerts.DETECTORS]  # type: ignore[list-item]
    before = [dict(table) for table in tables]
    yield
    for table, kept in zip(tables, before, strict=True):
        table.clear()
        table.update(kept)


@pytest.mark.parametrize(("register", "missing"), CASES)
def test_a_class_without_an_answer_is_refused_by_the_name_of_what_it_lacks(register, missing) -> None:  # type: ignore[no-untyped-def]
    base, answers = WHOLE[register]
    register(type("Late", (base,), answers))
    left = {name: answer for name, answer in answers.items() if name != missing}
    with pytest.raises(ConfigurationError, match=f"^Later is no .* yet: it leaves out {missing}[,(]"):
        register(type("Later", (base,), left))


def test_a_name_is_one_classs_own() -> None:
    with pytest.raises(ConfigurationError, match=r"^Other cannot be the method 'retrac': .*ReTrac is\. Give"):

        @methods.register
        class Other(methods.Method):
            name, title, formula, reference = "retrac", "mine", "Σ", "here"

    assert isinstance(methods.METHODS["retrac"], methods.ReTrac)


def test_a_notebooks_cell_may_run_again() -> None:
    for told in ("first", "second"):

        @signals.register
        class Again(Signal):
            name, title, meaning = "again", told, "a cell that runs twice"

            def look(self, view: View) -> Found | None:
                return None

    assert signals.SIGNALS["again"].title == "second"


def test_detectors_are_found_by_the_kind_of_their_alerts() -> None:
    assert len(alerts.DETECTORS) >= 7
    assert all(kind == detector.kind for kind, detector in alerts.DETECTORS.items())
