"""Which samples a batch holds: its own ids, or those of the items that its rows are shown to equal."""

from diffhook.capture.loop.identity.identity import Identity, RowIds, Unmatched, blocks

__all__ = ["Identity", "RowIds", "Unmatched", "blocks"]
