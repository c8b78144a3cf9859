"""What has changed from one run to the next: samples, losses and norms by timestep, places in the ranking."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from diffhook import words
from diffhook.analysis import Comparison, Ranking
from diffhook.analysis.comparison import Curves
from diffhook.analysis.reason import Reason
from diffhook.log.samples import sample_words, short_names, split_id
from diffhook.report import charts
from diffhook.report.rendering import Part, part
from diffhook.report.thumbnails import PictureCache, Thumbnail

_SURE = 2.0  # standard errors


@dataclass(frozen=True)
class Entry:
    """One sample of a list."""

    name: str
    picture: Thumbnail | None
    notes: tuple[str, ...]  # places and scores
    reasons: tuple[Reason, ...]


def change_part(found: Comparison, thumbnails: PictureCache, k: int = 24) -> Part:
    """How the runs differ, what became of the loss, and the samples that were left out."""
    facts = {
        "Before": f"{found.locations[0]}, {words.plural(len(found.before) + len(found.left_out), 'sample')}",
        "After": f"{found.locations[1]}, {words.plural(len(found.after) + len(found.added), 'sample')}",
        "Left out": words.plural(len(found.left_out), "sample"),
        "New": words.plural(len(found.added), "sample") if len(found.added) else "",
        "The rankings agree": f"rank correlation {found.agreement:.2f}".replace("-", "−"),
    }
    return part(
        "change",
        "What has changed",
        "Change",
        facts={name: text for name, text in facts.items() if text},
        sentence=change_sentence(found),
        named=bool(found.before.names),
        left_out=_entries(found.left_out.take(slice(k)), thumbnails),
        more=max(len(found.left_out) - k, 0),
    )


def change_sentence(found: Comparison) -> str:
    """What became of the loss of the samples that both runs have."""
    if found.change is None:
        return "The logs do not know their samples' losses, so what became of them cannot be told."
    mean, error = (100 * value for value in found.change)
    rows = "at the last snapshot" if found.source == "probe" else "over the last quarter of each run"
    figures = f"{abs(mean):.1f}% (± {error:.1f}%) "
    told = "is as it was, within its error:" if abs(mean) < _SURE * error else "has changed:"
    direction = "lower" if mean < 0 else "higher"
    return (
        f"The loss of the {words.plural(len(found.before), 'sample')} that both runs have {told} "
        f"{figures}{direction}, {rows}. The error is over samples: two trainings that differ in nothing but "
        "their seed differ, too."
    )


def curves_part(curves: Curves | None, column: str, source: str) -> Part | None:
    """A column by timestep in both runs."""
    if curves is None:
        return None
    title = f"{column.capitalize()} by timestep, before and after"
    texts = iter(words.apart(edge for b in curves.before for edge in (b.low, b.high)))
    ranges = dict(zip((b.low for b in curves.before), zip(texts, texts, strict=True), strict=True))
    after = {b.low: b for b in curves.after}
    rows = [(ranges[b.low], b, after[b.low]) for b in curves.before if b.low in after]
    made = part(
        "curves",
        title,
        column.capitalize(),
        chart=charts.chart(lambda axes: _draw(axes, curves, column), title),
        rows=rows,
        column=column,
        source=source,
    )
    return replace(made, anchor=column.replace(" ", "-"))


def _draw(axes: charts.Axes, curves: Curves, column: str) -> None:
    for bins, color, name in ((curves.before, charts.SOFT, "before"), (curves.after, charts.ACCENT, "after")):
        middle = np.array([(b.low + b.high) / 2 for b in bins])
        lower, median, upper = (np.array([getattr(b, q) for b in bins]) for q in ("lower", "median", "upper"))
        axes.fill_between(middle, lower, upper, color=color, alpha=0.12, linewidth=0)
        axes.plot(middle, median, color=color, linewidth=1.8, marker="o", markersize=3.5, label=name)
    if min(b.lower for bins in (curves.before, curves.after) for b in bins) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: "")
    axes.set_xlabel("timestep")
    axes.set_ylabel(column)
    axes.legend(frameon=False)


def moved_part(found: Comparison, thumbnails: PictureCache, k: int = 24) -> Part:
    """The samples whose score rose or fell most."""
    lists = [_moved(found, found.moved(k, down=down), thumbnails) for down in (False, True)]
    return part(
        "moved",
        "Who moved in the ranking",
        "Who moved",
        up=lists[0],
        down=lists[1],
        named=bool(found.before.names),
        total=len(found.before),
    )


def _moved(found: Comparison, positions: npt.NDArray[np.intp], thumbnails: PictureCache) -> list[Entry]:
    places, now = found.places[positions], found.after
    entries = _entries(found.before.take(positions), thumbnails)
    return [
        replace(
            entry,
            notes=(
                f"place {before:,} → {after:,}",
                f"{entry.notes[0]} → {words.number(float(now.scores[after - 1]))}",
            ),
            reasons=tuple(map(Reason.of, now.reasons[after - 1])) or entry.reasons,
        )
        for entry, (before, after) in zip(entries, places.tolist(), strict=True)
    ]


def _entries(ranking: Ranking, thumbnails: PictureCache) -> list[Entry]:
    short = short_names(ranking.names)
    return [
        Entry(
            sample_words(int(sample), short)
            if split_id(int(sample))[0] in short
            else f"#{sample_words(int(sample))}",
            thumbnails(int(sample)),
            (f"score {words.number(float(score))}",),
            tuple(map(Reason.of, given)),
        )
        for sample, score, given in zip(ranking.sample_ids, ranking.scores, ranking.reasons, strict=True)
    ]
