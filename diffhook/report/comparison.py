"""A page about two runs: what leaving samples out has changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffhook.analysis import compare
from diffhook.analysis.defaults import as_log
from diffhook.analysis.execution import HERE, Execution
from diffhook.log import RunLog
from diffhook.log.store import Location
from diffhook.report.images import images_of_run
from diffhook.report.parts.comparison import change_part, curves_part, moved_part
from diffhook.report.rendering import check_page_path, write_parts
from diffhook.report.thumbnails import PictureCache


def write_comparison(
    path: str | Path,
    before: RunLog | Location,
    after: RunLog | Location,
    images: Any = None,
    *,
    excluded: str | Path | None = None,
    k: int = 24,
    title: str = "",
    execution: Execution = HERE,
) -> int:
    """Write the page. It needs no network, and asks for none.

    Args:
        path: the HTML file.
        before, after, excluded: as for :func:`diffhook.compare`.
        images: the first run's training images, as for :func:`~diffhook.report.page.write_page`.
        k: samples of each list.
        title: heading; by default the logs' places.
        execution: as for :func:`diffhook.influence`.

    Returns:
        The file's size in bytes.

    Raises:
        LogError, ConfigurationError: as the comparison and the images raise them; matplotlib is missing.
    """
    check_page_path(path)
    first, second = as_log(before), as_log(after)
    found = compare(first, second, excluded=excluded, execution=execution)
    pictures, _ = images_of_run(first, images, found.before.sample_ids, execution)
    thumbnails = PictureCache(pictures)
    parts = [
        change_part(found, thumbnails, k),
        curves_part(found.loss, "loss", found.source),
        curves_part(found.norm, "gradient norm", found.source),
        moved_part(found, thumbnails, k),
    ]
    thumbnails.check()
    places = f"{second.location}, against {first.location}"
    return write_parts(path, title, places, parts)
