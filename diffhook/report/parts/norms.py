"""Gradient norm against timestep, and what that does to influence."""

from __future__ import annotations

import numpy as np
from markupsafe import Markup

from diffhook import words
from diffhook.analysis import BiasReport
from diffhook.errors import ConfigurationError
from diffhook.report import charts
from diffhook.report.rendering import Part, part

_WEAK = 0.1  # rank correlations under this are called weak


def norms_part(report: BiasReport, *, need_chart: bool = True) -> Part:
    """Quantile bands, the rank correlation, and two sentences on what they mean.

    Raises:
        ConfigurationError: matplotlib is missing, and ``need_chart``.
    """
    drawn: Markup | None = None
    try:
        drawn = charts.chart(lambda axes: _draw(axes, report), "Gradient norm against timestep")
    except ConfigurationError:
        if need_chart:
            raise
    return part(
        "norms",
        "Gradient norm against timestep",
        "Norms by timestep",
        chart=drawn,
        sentences=sentences(report),
        bins=list(zip(ranges(report), report.norms, strict=True)),
    )


def ranges(report: BiasReport) -> list[tuple[str, str]]:
    """The first and last timestep of each bin, in words."""
    texts = iter(words.apart(edge for b in report.norms for edge in (b.low, b.high)))
    return list(zip(texts, texts, strict=True))


def sentences(report: BiasReport) -> tuple[str, str]:
    """What was measured, and what follows."""
    return _measured(report), _follows(report)


def _measured(report: BiasReport) -> str:
    if len(report.norms) < 2:
        return (
            f"All rows are in one range of timesteps, {' to '.join(ranges(report)[0])}: how a gradient's "
            "length depends on the timestep cannot be told from them."
        )
    low, high = _extremes(report)
    ratio = f"{words.number(high[1] / low[1], 2)} times" if low[1] > 0 else "far"
    return (
        f"A gradient's length depends on the timestep that its sample drew: the median norm is {ratio} as "
        f"large at timesteps {high[0]} as at {low[0]} (rank correlation of timestep and norm "
        f"{report.correlation:+.2f}, {words.p_value(report.p_value)}).".replace("-", "−")
    )


def _follows(report: BiasReport) -> str:
    if abs(report.correlation) < _WEAK:
        return (
            "The correlation is weak here, but TracIn multiplies by this length wherever it is large, while "
            "ReTrac divides it out and the outlier ranking compares norms within a timestep only."
        )
    return (
        "TracIn multiplies by this length, so the draw of a timestep alone can make a sample look "
        "influential for every query; ReTrac divides it out, and the outlier ranking compares norms "
        "within a timestep only."
    )


def _extremes(report: BiasReport) -> tuple[tuple[str, float], tuple[str, float]]:
    named = [(" to ".join(r), b.median) for r, b in zip(ranges(report), report.norms, strict=True)]
    return min(named, key=lambda each: each[1]), max(named, key=lambda each: each[1])


def _draw(axes: charts.Axes, report: BiasReport) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    middle = np.array([(b.low + b.high) / 2 for b in report.norms])
    lower, median, upper = (
        np.array([getattr(b, name) for b in report.norms]) for name in ("lower", "median", "upper")
    )
    axes.fill_between(middle, lower, upper, color=charts.ACCENT, alpha=0.16, linewidth=0)
    axes.plot(middle, median, color=charts.ACCENT, linewidth=1.8, marker="o", markersize=3.5)
    if lower.min() > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if upper.max() < 200 * lower.min() else (1,)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    if report.norms[0].low < report.norms[-1].high:
        axes.set_xlim(report.norms[0].low, report.norms[-1].high)
    axes.set_xlabel("timestep")
    axes.set_ylabel("gradient norm")
    axes.annotate("median", (middle[-1], median[-1]), xytext=(6, 0), textcoords="offset points",
                  va="center", color=charts.ACCENT, annotation_clip=False)  # fmt: skip
