"""What a person sees in a notebook."""

from __future__ import annotations

from importlib import import_module

_RENDERER = "diffhook.report.notebook"


class Displayed:
    """An object that a notebook shows as a part of the report's page.

    How it is drawn is the report's business, looked up by name when a notebook first asks: scores
    need no templates and no pictures, and the floors under the report import nothing from it.
    """

    __slots__ = ()

    def _repr_html_(self) -> str | None:
        html: str | None = import_module(_RENDERER).render_object(self)
        return html
