"""What a pass over the log will take, said before it starts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from diffhook.analysis.execution import Execution
from diffhook.analysis.grouped import Division
from diffhook.log import Block, Table
from diffhook.words import size

_COPIES = 3  # of a block in float32: projections as read, converted, and their products


@dataclass(frozen=True)
class Cost:
    """Bytes.

    Attributes:
        rows: rows that are read.
        read: bytes of them.
        memory: held at once by one process, at most, besides the interpreter and its libraries.
        spilled: written to temporary files and read back, at most.
    """

    rows: int
    read: int
    memory: int
    spilled: int

    def __str__(self) -> str:
        spilled = f", {size(self.spilled)} at most through temporary files" if self.spilled else ""
        read, held = size(self.read), size(self.memory)
        return f"reads {self.rows:,} rows ({read}), holds at most {held}{spilled}"


def cost_of(table: Table, plan: Division, samples: int, kept: int, execution: Execution) -> Cost:
    """The cost of one pass.

    Args:
        samples: ids that are held, 8 bytes each.
        kept: bytes of the result and of what goes along with every task.
    """
    rows, blocks = len(table), list(table.blocks())
    steps = 0 if all(group.all_count for group in table.groups) else 9  # of a row, and whether it counts
    block_rows = max((block.stop - block.start for block in blocks), default=0)
    block = block_rows * (table.dim * 4 * _COPIES + plan.width * 16 + steps)
    return Cost(
        rows=rows,
        read=rows * (table.dim * _itemsize(table, blocks) + 44),
        memory=execution.workers * block + plan.memory(execution) + 8 * samples + kept,
        spilled=0 if plan.parts == 1 else rows * (plan.width * 4 + 8),
    )


def _itemsize(table: Table, blocks: list[Block]) -> int:
    return table.read(replace(blocks[0], stop=blocks[0].start), "projection").itemsize if blocks else 0
