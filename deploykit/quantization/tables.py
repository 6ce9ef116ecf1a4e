"""Render tables of an export and of a calibration as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deploykit.metric_titles import title_of, verdict, with_interval
from deploykit.text_table import text_table

SEARCH_PAGE = "search.html"
"""File in an export with a plot of the search for layers in fp32."""

_NOT_METRICS = ("precision", "engine", "int8_kernels", "intervals", "differences")
_SHOWN_TENSORS = 12


def render(table: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the accuracy table as lines of text, one for each form of the model.

    ``agreement`` is the share of rows with the same answer as the checkpoint's. The last column says whether a form differs
    from it beyond noise.
    """
    columns = {key: title_of(key) for key in table[0] if key not in _NOT_METRICS}
    compared = "differences" in table[0]
    rows = (
        [
            line["precision"],
            line["engine"],
            *(with_interval(line, key) for key in columns),
            str(line["int8_kernels"]),
            *([verdict(line["differences"], columns) if line["differences"] else ""] if compared else []),
        ]
        for line in table
    )
    head = ["precision", "engine", *columns.values(), "INT8 kernels", *(["from the checkpoint"] if compared else [])]
    return text_table(head, rows, left=(0, 1, len(columns) + 3)).splitlines()


def render_searches(searches: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return lines of text with the result of each engine's search for layers in fp32; ``SEARCH_PAGE`` plots them."""
    lines = []
    for engine, found in searches.items():
        kept = len(found["kept"])
        lost = next(trial["drop"] for trial in found["trials"] if trial["kept"] == kept)
        lines.append(
            f"{engine}: {kept} of {len(found['order'])} parts stay in fp32, and it loses {lost:.2f} points "
            f"({len(found['trials'])} trials, see {SEARCH_PAGE})"
        )
    return lines


def render_calibration(record: Mapping[str, Any]) -> list[str]:
    """Return lines of text about a calibration: its rows, and the magnitude that each method keeps of some tensors.

    ``record`` is the metrics of a calibration's manifest. The tensors are those on which the methods differ most.
    """

    def kept(limits: Sequence[float]) -> float:
        return max(map(abs, limits))

    ranges: Mapping[str, Mapping[str, Sequence[float]]] = record["ranges"]
    spread = {name: min(map(kept, of.values())) / max(map(kept, of.values())) for name, of in ranges.items()}
    shown = sorted(spread, key=lambda name: spread[name])[:_SHOWN_TENSORS]
    methods = list(ranges[shown[0]])
    lines = [
        f"{record['rows']:,} rows, {len(ranges)} tensors, {record['seconds']:.1f} s, "
        f"peak memory {record['peak_memory_mb']:,.0f} MB",
        text_table(
            ["largest magnitude kept", *methods],
            ([name, *(f"{kept(ranges[name][method]):.4g}" for method in methods)] for name in shown),
        ),
    ]
    if len(ranges) > len(shown):
        lines.append(f"and {len(ranges) - len(shown)} more, on which the methods differ less (--json has all)")
    return lines
