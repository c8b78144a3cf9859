"""The experiments' results as tables for documents: result → Markdown."""

from __future__ import annotations

from statistics import fmean, stdev
from typing import Any

Result = dict[str, Any]


def bias(result: Result) -> str:
    lines = [
        f"| queries | events | method | top-10 that drew a timestep under {result['early']} | at random "
        "| top-10 cardinality | samples in more than a fifth of the top-10s "
        "| top-10 with the query's label | at random |",
        "|---" * 9 + "|",
    ]
    for row in result["rows"]:
        cells = [
            row["queries"],
            row["events"],
            _name(row["method"]),
            _told(row["early"]),
            f"{row['early_chance']['mean']:.2f}",
            _told(row["cardinality"]),
            _told(row["general_samples"], 1),
        ]
        lines.append(_row([*cells, _told(row["own_label"]), f"{row['chance']['mean']:.2f}"]))
    lines += [
        "",
        f"Spearman correlation of a sample's timestep with its gradient norm: {_told(result['correlation'])} "
        f"({_p(result['p_value'])}). " + _made(result, "bias", _seeds(result)),
    ]
    return "\n".join(lines)


def specificity(result: Result) -> str:
    lines = [
        "| rows | method | top-10 with the query's label | top-10 cardinality "
        "| samples in more than a fifth of the tops |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        figures = (_told(row["own_label"]), _told(row["cardinality"]), _told(row["general_samples"], 1))
        lines.append(_row([row["source"], _name(row["method"]), *figures]))
    more = f"{result['training_samples']} digits, {result['asked']} queries; {_seeds(result)}"
    return "\n".join([*lines, "", _made(result, "specificity", more)])


def own_pictures(result: Result) -> str:
    lines = [
        "| rows | method | find themselves in their top-10 | median rank | worst rank |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        ranks = (_told(row[name], 1) for name in ("median_rank", "worst_rank"))
        lines.append(_row([row["source"], _name(row["method"]), _told(row["within"]), *ranks]))
    more = f"{result['asked']} of {result['training_samples']} pictures asked; {_seeds(result)}"
    return "\n".join([*lines, "", _made(result, "own_pictures", more)])


def tracing(result: Result) -> str:
    queries = list(dict.fromkeys(row["queries"] for row in result["rows"]))
    share = f"share of the top-{result['k']} from the other source"
    lines = [
        _row(["events", share, *(f"{q} queries" for q in queries), "in over a fifth of the held out's tops"]),
        "|---" * (len(queries) + 3) + "|",
    ]
    for events, method in dict.fromkeys((row["events"], row["method"]) for row in result["rows"]):
        rows = {r["queries"]: r for r in result["rows"] if (r["events"], r["method"]) == (events, method)}
        general = _told(rows["held out"]["general_samples"], 1)
        shares = (_told(rows[q]["wrong"], 3) for q in queries)
        lines.append(_row([events or "–", _name(method), *shares, general]))
    more = f"{result['asked']} queries of each kind; first source: {result['first_source']}; {_seeds(result)}"
    return "\n".join([*lines, "", _made(result, "tracing", more)])


def outliers(result: Result) -> str:
    kinds = list(dict.fromkeys(row["kind"] for row in result["rows"]))
    lines = [_row(["AUROC / average precision", *kinds]), "|---" * (len(kinds) + 1) + "|"]
    for method in dict.fromkeys(row["method"] for row in result["rows"]):
        rows = {row["kind"]: row for row in result["rows"] if row["method"] == method}
        cells = (
            f"{_told(rows[k]['auroc'])} / {_told(rows[k]['average_precision'])}" if k in rows else "–"
            for k in kinds
        )
        lines.append(_row([method, *cells]))
    more = f"{result['of_each_kind']} planted of each kind among {result['samples']:,}; {_seeds(result)}"
    return "\n".join([*lines, "", _made(result, "outliers", more)])


def lds(result: Result) -> str:
    groups = list(dict.fromkeys((row["case"], row["queries"]) for row in result["rows"]))
    lines = [
        _row(["LDS", *(f"{case}, {queries}" for case, queries in groups)]),
        "|---" * (len(groups) + 1) + "|",
    ]
    by_method: dict[str, dict[tuple[str, str], Result]] = {}
    for row in [*result["rows"], *({**row, "method": "ceiling: another seed"} for row in result["ceilings"])]:
        by_method.setdefault(row["method"], {})[row["case"], row["queries"]] = row
    for method, found in by_method.items():
        lines.append(_row([method, *(_told(found[g]) if g in found else "–" for g in groups)]))
    check = result["outside"]
    settings = "; ".join(
        f"{each['case']}: {each['halves']} halves, each trained {result['retrained_seeds']} times, "
        f"{each['watched']} watched trainings, {each['date']}, {each['machine']}"
        for each in result["settings"]
    )
    made = (
        f"`python examples/evidence/lds.py`; {result['training_samples']} pictures, {result['asked']} "
        f"queries of each kind. {settings}."
    )
    outside = (
        f"dattri's TracIn of the same snapshots differs from ours by {check['tracin']:.0e} of the largest "
        f"score, and its normalised form from ReTrac by {check['retrac']:.0e}."
    )
    return "\n".join([*lines, "", f"{_leads(result)} {outside} {made}"])


RIVALS = (
    *("EK-FAC, by kronfluence", "Gauss–Newton, projected"),
    *("TRAK, grid", "D-TRAK", "DAS", "pixels", "ReTrac, grid", "TracIn, grid"),
)


def _leads(result: Result) -> str:
    """How far the default method is above others, in paired errors."""
    own = result["rows"][0]["method"]
    found = []
    for rival in RIVALS:
        rows = [row["behind"] for row in result["rows"] if row["method"] == rival]
        if rows:  # EK-FAC's are there where kronfluence is
            found.append(f"{rival} by {', '.join(_told(row) for row in rows)}")
    return f"In the order of the columns, {own}, is ahead of {'; of '.join(found)}."


def counterfactual(result: Result) -> str:
    lines = [
        "| removed | siblings among them | change of the query's loss, % | above random | above pixels |",
        "|---|---|---|---|---|",
    ]
    for name, found in result["cases"].items():
        for row in found["rows"]:
            differences = (row[difference] for difference in ("above_random", "above_pixels"))
            figures = (_told(each) if each["error"] else "–" for each in differences)
            siblings = f"{row['siblings']:.2f}" if row["siblings"] is not None else "–"
            lines.append(_row([f"{found['k']} of {name}: {row['method']}", siblings, _told(row), *figures]))
    made = "; ".join(
        f"{name}: {found['asked']} held-out queries, trainings of each: {found['trainings']}, "
        f"{found['date']}, {found['machine']}"
        for name, found in result["cases"].items()
    )
    command = (
        "`python examples/evidence/counterfactual.py`; each query set against itself, errors over queries."
    )
    return "\n".join([*lines, "", f"{command} {made}."])


def ablations(result: Result) -> str:
    methods = dict.fromkeys(row["method"] for row in result["rows"])
    titles = [f"{what}, {_name(method)}" for what in ("LDS", "rank agreement") for method in methods]
    lines = [_row(["changed", "value", *titles]), "|---" * (2 + len(titles)) + "|"]
    for thing, value in dict.fromkeys((row["thing"], row["value"]) for row in result["rows"]):
        cells = []
        for number in ("mean", "rank_agreement"):
            for method in methods:
                found = [
                    row[number]
                    for row in result["rows"]
                    if (row["thing"], row["value"], row["method"]) == (thing, value, method)
                ]
                spread = stdev(found) / len(found) ** 0.5 if len(found) > 1 else float("nan")
                cells.append(_told({"mean": fmean(found), "error": spread}))
        lines.append(_row([thing, str(value), *cells]))
    error = max(row["error"] for row in result["rows"])
    reference = ", ".join(f"{name} {value}" for name, value in result["reference"].items())
    more = f"{_seeds(result)}, within one of which an LDS errs by up to {error:.2f}; otherwise {reference}"
    return "\n".join([*lines, "", _made(result, "ablations", more)])


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _told(value: Result, digits: int = 2) -> str:
    return f"{value['mean']:.{digits}f} ± {value['error']:.{digits}f}"


def _name(method: str) -> str:
    return {
        "tracin": "TracIn",
        "retrac": "ReTrac",
        "trak": "TRAK",
        "whitened-retrac": "whitened ReTrac",
        "pixels": "nearest pixels",
    }.get(method, method)


def _p(value: float) -> str:
    return "p < 1e-300" if value < 1e-300 else f"p ≤ {value:.0e}"


def _seeds(result: Result) -> str:
    return f"mean ± standard error over {len(result['seeds'])} seeds"


def _made(result: Result, name: str, more: str) -> str:
    command = f"`python examples/evidence/{name}.py`"
    return f"{command}, {result['date']}, {result['machine']}; {more}."
