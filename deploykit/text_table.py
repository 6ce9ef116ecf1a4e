"""Lay out tables for a terminal."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from io import StringIO


def text_table(head: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """Return a table of plain text: columns ``left`` aligned left, the others right.

    Columns are as wide as their widest cell; a Chinese character is two columns wide. Lines are never broken.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=any(head))
    for i, title in enumerate(head):
        table.add_column(Text(title), justify="left" if i in left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    text = StringIO()
    Console(file=text, width=100_000, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def stacked(texts: Mapping[str, str]) -> str:
    """Return texts one below the other, each under its name; an empty name is left out."""
    return "\n\n".join(f"{name}\n{text}" if name else text for name, text in texts.items())
