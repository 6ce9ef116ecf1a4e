"""Write the page of a classifier's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from deploykit.inspection import page as inspection
from deploykit.inspection.page import (
    drift_parts,
    metrics_section,
    reliability_figure,
    robustness_parts,
    slices_parts,
    with_interval,
)
from deploykit.report.confusion_figure import confusion
from deploykit.report.html import figure, section, table, word_table
from deploykit.report.svg import number, require_matplotlib

Record = Mapping[str, Any]


def write_report(title: str, record: Record, out: Path) -> None:
    """Write ``record``, of ``report``, to the HTML file ``out``. Raises MissingDependencyError without matplotlib."""
    require_matplotlib()
    parts = [
        metrics_section(record),
        *slices_parts(record),
        figure("Confusion matrix", "Rows are the truth, columns the answer.", confusion(record)),
        *(robustness_parts(record["robustness"]) if "robustness" in record else ()),
        *(_calibration(record["calibration"]) if "calibration" in record else ()),
        *(_label_errors(record["label_errors"]) if record.get("label_errors") else ()),
        *(_tied_words(record["tied_words"]) if record.get("tied_words") else ()),
        *(_groups(record["groups"]) if record.get("groups") else ()),
        *(_flips(record["flips"]) if record.get("flips") else ()),
        *(drift_parts(record["drift"]) if "drift" in record else ()),
    ]
    inspection.write_report(title, parts, out)


def _calibration(calibration: Record) -> list[str]:
    words = [
        ("Expected calibration error", f"{calibration['error']:.4f}"),
        ("With a fitted temperature", f"{calibration['error_after']:.4f} (fitted on each half for the other)"),
        ("Temperature", f"{calibration['temperature']:g} now, {calibration['fitted_temperature']:g} would fit these rows best; "
                        "finetune --temperature-scaling fits it on the validation rows"),
    ]  # fmt: skip
    return [reliability_figure(calibration["reliability"]), section("Calibration", "", word_table(words))]


def _label_errors(errors: Sequence[Record]) -> list[str]:
    rows = [
        [escape(str(one[name])) for name in ("origin", "label", "likely")]
        + [f"{one['probability']:.3f}", escape(one["text"])]
        for one in errors
    ]
    note = "By confident learning. Look at them before you trust the metrics. In rows that the model was trained on it finds few."
    return [
        section("Likely label errors", note, table(("row", "label", "likely", "probability", "text"), rows, words=True))
    ]


def _tied_words(words: Sequence[Record]) -> list[str]:
    rows = [
        [escape(one["word"]), escape(one["label"]), f"{one['texts']:,}", f"{100 * one['share']:.0f} %",
         f"{100 * one['chance']:.0f} %", number(one["z"])]
        for one in words
    ]  # fmt: skip
    note = "A name or a marker among them is a short cut that the model may have learned."
    head = ("word", "label", "texts with it", "with the label", "of all texts", "standard deviations")
    return [section("Words tied to one label beyond chance", note, table(head, rows))]


def _groups(gaps: Sequence[Record]) -> list[str]:
    names = ("demographic_parity", "equalized_odds")
    rows = [
        [escape(f"{one['column']}, label {one['label']}"), *(with_interval(one, name) for name in names),
         escape(", ".join(f"{group} {100 * rate:.0f} %" for group, rate in one["rates"].items()))]
        for one in gaps
    ]  # fmt: skip
    note = (
        "Largest difference between two groups in how often they get the label: of all their rows (demographic parity), and of those "
        "whose label it is or is not (equalized odds). A difference is never below 0, and of few rows large by chance."
    )
    head = ("column and label", "demographic parity difference", "equalized odds difference", "get the label")
    return [section("Groups", note, table(head, rows))]


def _flips(flips: Sequence[Record]) -> list[str]:
    rows = [
        [escape(f"{one['group']}: {one['from']} → {one['to']}"), f"{one['texts']:,}", f"{one['flips']:,}",
         f"{100 * one['share']:.1f} %", escape(", ".join(f"{change} (×{n})" for change, n in one["changes"].items())),
         escape(one["examples"][0]) if one["examples"] else ""]
        for one in flips
    ]  # fmt: skip
    note = "Texts with a word of the list are asked again with its counterpart. Own lists: --swaps FILE.toml."
    head = ("swap", "texts", "answers that change", "share", "changes", "an example")
    return [section("Counterfactual flips", note, table(head, rows, words=True))]
