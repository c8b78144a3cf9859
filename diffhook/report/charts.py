"""Plots as SVG that takes its colours and its type from the page around it. Drawn by matplotlib."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from itertools import count
from typing import Any

from markupsafe import Markup, escape

from diffhook.errors import ConfigurationError

Axes = Any

# What matplotlib is told to paint with, and the page's own colour that replaces it.
_INKS = ("ink", "soft", "line", "accent", "warm")
_STAND_IN = {name: f"#00{index:02x}fe" for index, name in enumerate(_INKS, 1)}
INK, SOFT, LINE, ACCENT, WARM = _STAND_IN.values()

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a "$" in a name is no formula
    "svg.hashsalt": "diffhook",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
}
_WIDTH = 8.4  # inches of 72 pixels
_numbers = count(1)


def chart(draw: Callable[[Axes], None], title: str, *, height: float = 2.9) -> Markup:
    """An ``<svg>`` to stand in a page.

    Args:
        draw: puts marks on matplotlib axes, painting with this module's colours.
        title: what it shows, for those who cannot see it.
        height: inches of 72 pixels.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigurationError("charts need matplotlib: pip install 'diffhook[report]'") from error
    buffer = io.StringIO()
    with rc_context(_STYLE):
        figure = Figure((_WIDTH, height), layout="constrained")
        draw(figure.subplots())
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return Markup(_inline(buffer.getvalue(), title))


def _inline(svg: str, title: str) -> str:
    """Without what only a file needs, with ids of its own and the page's colours."""
    body = svg[svg.index("<defs") : svg.rindex("</svg>")]
    box = re.search(r'viewBox="[^"]*"', svg)
    prefix = f"chart{next(_numbers)}-"
    body = re.sub(r'(id="|url\(#|href="#)', lambda found: found[1] + prefix, body)
    body = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", body)
    body = re.sub(r"\s*\n\s*", "\n", body)
    for name, stand_in in _STAND_IN.items():
        body = body.replace(stand_in, f"var(--{name})")
    frame = f'<svg class="chart" role="img" {box[0] if box else ""}>'
    return f"{frame}<title>{escape(title)}</title>{body}</svg>"
