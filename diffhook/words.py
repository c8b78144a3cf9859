"""Numbers, names and lists as a person reads them."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Sequence

_NO_UNICODE = re.compile("[\ud800-\udfff]")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""Commands to a terminal, and what turns text around; not newline and tab."""
_NUMERIC = re.compile("[+−–∞]?[0-9,.]*( × 10[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)?∞?%?")
_DECIMALS = 9  # float32 has no more
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float, digits: int = 3) -> str:
    """Significant digits, a true minus sign, "–" for NaN: 0.000123 → 1.23 × 10⁻⁴."""
    if isinstance(value, int) or (math.isfinite(value) and value == int(value) and abs(value) < 1e6):
        return f"{int(value):,}".replace("-", "−")
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if 1e-3 <= abs(value) < 1e6:
        decimals = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
        return f"{value:,.{decimals}f}".replace("-", "−")
    return scientific(value, digits)


def scientific(value: float, digits: int = 3) -> str:
    """1234567.0 → 1.23 × 10⁶."""
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    return f"{mantissa} × {power(int(exponent))}".replace("-", "−")


def apart(values: Iterable[float]) -> list[str]:
    """Numbers with as many decimals as tell different ones apart: 0, 333, 999, or 0.02, 0.35, 0.38."""
    given = [float(value) for value in values]
    texts: list[str] = []
    for decimals in range(_DECIMALS + 1):
        texts = [f"{value:.{decimals}f}".replace("-", "−") for value in given]
        if len(set(texts)) >= len(set(given)):
            break
    return texts


def power(exponent: int) -> str:
    """−4 → 10⁻⁴."""
    return f"10{str(exponent).translate(_SUPERSCRIPT)}"


def p_value(value: float) -> str:
    """With its relation: "p < 0.001", "p = 0.02"; "p unknown" for NaN."""
    if math.isnan(value):
        return "p unknown"
    return "p < 0.001" if value < 0.001 else f"p = {value:.2g}"


def duration(seconds: float) -> str:
    """75 → "1 min 15 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def size(count: float) -> str:
    """1_234_567 → "1.2 MB"."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count /= 1000
        units.pop(0)
    return f"{count:,.0f} bytes" if units[0] == "bytes" else f"{count:,.1f} {units[0]}"


def at_steps(steps: Sequence[int]) -> str:
    """[10] → "1, at step 10"; of more than six, the first three and the last."""
    if not steps:
        return "none"
    texts = [f"{step:,}" for step in steps]
    shown = texts if len(texts) <= 6 else [*texts[:3], "…", texts[-1]]
    return f"{len(texts):,}, at {'steps' if len(texts) > 1 else 'step'} {', '.join(shown)}"


def printable(text: str) -> str:
    """With a "�" for what is no Unicode, such as bytes of a file name that is not UTF-8, and "\\x1b" for what
    would command a terminal; lines stay lines."""
    shown = _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    return _NO_UNICODE.sub("\ufffd", shown)


def one_line(text: str) -> str:
    """:func:`printable`, and no text can look like two entries of a list."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def spreadsheet_cell(text: str) -> str:
    """With a quote before what a spreadsheet would compute: such a name is data."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def table(header: Sequence[str], rows: Iterable[Sequence[object]], longest: int = 60) -> str:
    """Lines of text in columns, numbers to the right; a text of more than ``longest`` letters is cut."""
    cells = [[cut(one_line(str(cell)), longest) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    right = [all(_NUMERIC.fullmatch(row[i]) for row in cells) for i in range(len(header))]
    lines = (
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in (header, *cells)
    )
    return "\n".join(lines)


def cut(text: str, longest: int) -> str:
    """With "…" for what is too much."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def middle(text: str, longest: int) -> str:
    """With "…" for what is too much in the middle: a path's end tells most."""
    half = (longest - 1) // 2
    return text if len(text) <= longest else f"{text[:half]}…{text[-half:]}"


def brief(value: object) -> str:
    """What a user gave, in a message: a number or short text as it is, of anything else the kind."""
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    if isinstance(value, str):
        return repr(cut(value, 60))
    return article(type(value).__name__)


def article(noun: str) -> str:
    """ "a Ranking", "an Alert"."""
    return f"{'an' if noun[:1] in 'AEIOUaeiou' else 'a'} {noun}"


def guess(given: object, choices: Iterable[str]) -> str:
    """ " Did you mean 'train'?" where one of the choices is like what was given; else nothing."""
    close = difflib.get_close_matches(str(given).lower(), list(choices), 1)
    return f" Did you mean {close[0]!r}?" if close else ""


def plural(count: int, noun: str) -> str:
    """1 → "1 alert", 1200 → "1,200 alerts"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
