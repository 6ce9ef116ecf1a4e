"""The accuracy table of an export, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_COLUMNS = {"accuracy": ("accuracy", 4), "macro_f1": ("macro-F1", 4), "bleu": ("BLEU", 2), "chrf": ("chrF", 2),
            "agreement": ("agreement", 4)}  # fmt: skip


def render(table: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of text: a form of the model each, with the metrics that its task has.

    ``agreement`` is the share of rows answered as the checkpoint answers them.
    """
    columns = {key: shown for key, shown in _COLUMNS.items() if key in table[0]}
    lines = [
        f"{'precision':<10}{'engine':<14}"
        + "".join(f"{head:>11}" for head, _ in columns.values())
        + f"{'INT8 kernels':>14}"
    ]
    for line in table:
        cells = "".join(f"{line[key]:>11.{digits}f}" for key, (_, digits) in columns.items())
        lines.append(f"{line['precision']:<10}{line['engine']:<14}{cells}{line['int8_kernels']:>14}")
    return lines
