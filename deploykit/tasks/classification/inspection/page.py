"""Write the page of a classifier's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from deploykit.metric_titles import title_of
from deploykit.report import figures
from deploykit.report.html import figure, page, section, table, word_table, write_page
from deploykit.report.svg import INK, add_legend, colour_of, number, require_matplotlib, shown, to_svg

Record = Mapping[str, Any]

_SHOWN_SLICES = 40


def write_report(title: str, record: Record, out: Path) -> None:
    """Write ``record``, of ``report``, to the HTML file ``out``. Raises MissingDependencyError without matplotlib."""
    require_matplotlib()
    parts = [
        f"<header><h1>{escape(title)}</h1></header>",
        section("Metrics", f"On {record['rows']:,} rows. In brackets: bootstrap 95 % intervals over rows.", _metrics(record)),
        *_slices(record),
        figure("Confusion matrix", "Rows are the truth, columns the answer.", figures.confusion(record)),
        *(_robustness(record["robustness"]) if "robustness" in record else ()),
        *(_calibration(record["calibration"]) if "calibration" in record else ()),
        *(_label_errors(record["label_errors"]) if record.get("label_errors") else ()),
        *(_tied_words(record["tied_words"]) if record.get("tied_words") else ()),
        *(_flips(record["flips"]) if record.get("flips") else ()),
        *(_drift(record["drift"]) if "drift" in record else ()),
    ]  # fmt: skip
    write_page(out, page(title, parts))


def _metrics(record: Record) -> str:
    metrics = record["metrics"]
    rows = []
    for name, (low, high) in metrics["intervals"].items():
        value: Any = metrics
        for key in name.split("."):
            value = value[key]
        named = f"F1 of {name[10:-3]}" if name.startswith("per_class.") else title_of(name)
        rows.append((named, f"{value:.4f}  [{low:.4f}, {high:.4f}]"))
    return word_table(rows)


def _slices(record: Record) -> list[str]:
    slices = record["slices"]
    if not slices:
        return []
    names = [name for name in ("accuracy", "macro_f1", "rmse", "mae") if name in slices[0]]
    rows = [
        [
            escape(one["slice"]) + ("<small>worse than all rows, beyond noise</small>" if one["worse"] else ""),
            f"{one['rows']:,}",
            *(
                f"{one[n]:.4f}<small>{one['intervals'][n][0]:.4f} to {one['intervals'][n][1]:.4f}</small>"
                for n in names
            ),
        ]
        for one in slices
    ]
    note = "Worst first; slices of fewer than 10 rows are left out. Bars: bootstrap 95 % intervals; dotted: all rows."
    return [
        figure("Slices", note, _slice_figure(slices[:_SHOWN_SLICES], names[0], record["metrics"][names[0]])),
        section("All slices", "", table(("slice", "rows", *map(title_of, names)), rows)),
    ]


def _slice_figure(slices: Sequence[Record], metric: str, whole: float) -> str:
    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for i, one in enumerate(slices):
            low, high = one["intervals"][metric]
            colour = colour_of(4) if one["worse"] else colour_of(0)
            axes.plot([low, high], [i, i], color=colour, linewidth=2)
            axes.plot([one[metric]], [i], "o", color=colour, markersize=6)
        axes.axvline(whole, color=INK, linestyle=":", linewidth=1.2)
        axes.set_yticks(range(len(slices)), [shown(f"{one['slice']} ({one['rows']:,})", 44) for one in slices])
        axes.invert_yaxis()
        axes.set_xlabel(title_of(metric))

    return to_svg("slices", draw, (9.0, 1.0 + 0.32 * len(slices)))


def _robustness(lines: Sequence[Record]) -> list[str]:
    names = list(lines[0]["intervals"])
    rows = [
        [
            one["noise"],
            *(
                f"{one[n]:.4f}<small>{one['intervals'][n][0]:.4f} to {one['intervals'][n][1]:.4f}</small>"
                for n in names
            ),
        ]
        for one in lines
    ]
    note = "The same rows with a letter mistyped in 20 % of the words, in the other case, and with other punctuation."
    return [section("Robustness", note, table(("", *map(title_of, names)), rows))]


def _calibration(calibration: Record) -> list[str]:
    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], ":", color=INK, linewidth=1.2, label="perfect")
        most = max(one["rows"] for one in calibration["reliability"])
        points = [(one["confidence"], one["accuracy"]) for one in calibration["reliability"]]
        axes.plot(*zip(*points), color=colour_of(0), linewidth=1.2, label="the model")
        for one, (x, y) in zip(calibration["reliability"], points):
            axes.plot([x], [y], "o", color=colour_of(0), markersize=3 + 9 * (one["rows"] / most) ** 0.5)
        axes.set(xlabel="confidence", ylabel="share of right answers", ylim=(0, 1.02))
        add_legend(figure)

    words = [
        ("Expected calibration error", f"{calibration['error']:.4f}"),
        ("With a fitted temperature", f"{calibration['error_after']:.4f} (fitted on each half for the other)"),
        ("Temperature", f"{calibration['temperature']:g} now, {calibration['fitted_temperature']:g} would fit these rows best; "
                        "finetune --temperature-scaling fits it on the validation rows"),
    ]  # fmt: skip
    note = "A point below the line: the model is too sure of itself. The size shows the number of rows."
    return [
        figure("Reliability", note, to_svg("reliability", draw, (6.0, 4.2))),
        section("Calibration", "", word_table(words)),
    ]


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


def _drift(drift: Record) -> list[str]:
    rows = [
        [escape(one["property"]), number(one["before"]), number(one["after"]), f"{one['statistic']:.3f}", f"{one['p']:.2g}",
         "drifts" if one["drifts"] else "no"]
        for one in drift["tests"]
    ]  # fmt: skip
    words = ", ".join(
        f"{one['word']} ({100 * one['before']:.1f} → {100 * one['after']:.1f} %)" for one in drift["words"]
    )
    note = f"{drift['rows']:,} new rows; {drift['unknown_words']:,} of their words are new. Means; Kolmogorov-Smirnov tests."
    head = ("", "measured rows", "new rows", "distance", "p", "")
    body = table(head, rows) + word_table([("Words that became more frequent", words or "none")])
    return [section("Drift", note, body)]
