"""Lay out tables for a terminal."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence


def text_table(head: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """Return a table of plain text: columns ``left`` aligned left, the others right.

    Columns are as wide as their widest cell; a Chinese character is two columns wide. Lines are never broken.
    """
    from io import StringIO

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=any(head))
    for i, title in enumerate(head):
        table.add_column(Text(title), justify="left" if i in left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(file=StringIO(), width=100_000, color_system=None)
    console.print(table)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in lines)
