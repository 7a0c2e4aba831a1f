"""Tables in Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    r"""Write a table with one line per row; a bar within a cell is escaped, unless it is already.

    >>> print(table(["entries", "nats"], [["|M| = 8", 2.08]]))
    | entries | nats |
    |---|---|
    | \|M\| = 8 | 2.08 |
    """

    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(re.sub(r"(?<!\\)\|", r"\|", str(cell)) for cell in cells) + " |"

    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)])
