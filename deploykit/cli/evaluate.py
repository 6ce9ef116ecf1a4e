from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from deploykit.cli_parts.asked_texts import failed_rows
from deploykit.cli_parts.command import Result, deploykit_command, option, progress_bar, say
from deploykit.cli_parts.shared_options import (
    FORCE,
    check_page,
    column_options,
    columns_for,
    generation_options,
    measuring_options,
    model_options,
    reading_options,
)
from deploykit.data.reading import AS_FOUND, Reading
from deploykit.errors import DataError, UsageError
from deploykit.metric_titles import title_of
from deploykit.tasks.protocol import Evaluation, Task, TaskFacts
from deploykit.tasks.types import Reporting, ReportOptions
from deploykit.text_table import text_table


@deploykit_command(
    help="Measure the accuracy of TARGET (checkpoint folder or .gguf file, export, packaged model, or a served model's name) on labelled rows."
)
@click.argument("target")
@click.option("--baseline", metavar="TARGET", help="Measure this model on the same rows, and print both.")
@click.option("--data", required=True, help="Rows: csv, tsv, jsonl, parquet, HF dataset folder or hub id; for translation also "
              "TMX, .po, .mo, or two text files as a.en,a.fr; for questions SQuAD's JSON.")  # fmt: skip
@reading_options(on_error="skip")
@column_options()
@click.option("--report", type=click.Path(path_type=Path), metavar="FILE.html", help="HTML page about the errors: slices, "
              "calibration, worst rows; for a classifier also likely label errors, words, flips.")  # fmt: skip
@click.option(
    "--slice", "slices", multiple=True, metavar="COLUMN", help="Also report the slices by this column of --data."
)
@click.option("--against", metavar="FILE", help="Also report how these new rows, labelled or not, differ from --data.")
@click.option("--seen", metavar="FILE", help="Training rows of TARGET, to report the metrics of rows that it has seen (default: "
              "the run's training rows, if TARGET is a run).")  # fmt: skip
@click.option("--swaps", type=click.Path(path_type=Path), metavar="FILE.toml", help="Words to swap for the flips of a classifier (default: English "
              "names, genders, origins, religions).")  # fmt: skip
@FORCE
@measuring_options
@option(
    "--dataset-split", "split", aliases=["--split"], default="test", show_default=True, help="Split of an HF dataset."
)
@generation_options
@model_options
def command(
    *,
    target: str,
    baseline: str | None,
    data: str,
    columns: dict[str, Any],
    report: Path | None,
    slices: tuple[str, ...],
    against: str | None,
    seen: str | None,
    swaps: Path | None,
    force: bool,
    measuring: dict[str, Any],
    split: str,
    generation: dict[str, Any],
    reading: Reading,
    **where: Any,
) -> Result:
    from deploykit.data.read import check_file
    from deploykit.report.svg import require_matplotlib
    from deploykit.tasks.opening import open_predictor
    from deploykit.tasks.registry import task_of

    columns = {**columns, **measuring}
    if report is None and (slices or against or seen or swaps):
        raise UsageError(
            "--slice, --against, --seen and --swaps are for a report", "add --report FILE.html, or leave them out"
        )
    check_page("--report", report)
    if report is not None:
        if report.exists() and not force:
            raise UsageError(f"{report}: already exists", "choose another --report, or pass --force to replace it")
        require_matplotlib()
    check_file(data)
    reported: dict[str, Any] = {}

    def measure(name: str, wanted: Task | None = None) -> tuple[Task, Evaluation]:
        predictor = open_predictor(name, **where)
        try:
            task = task_of(predictor.task)
            if wanted is not None and task.name != wanted.name:
                raise UsageError(f"{name} {task.does}, and {target} {wanted.does}", "give two models of one task")
            own = columns_for(task, columns, generation)
            with progress_bar("rows") as progress:
                if report is not None and wanted is None:
                    if not isinstance(task, Reporting):
                        raise UsageError(f"a model that {task.does} has no report", "leave out --report")
                    if swaps is not None and not getattr(task, "counts_flips", False):
                        raise UsageError("--swaps is for classifiers", "leave it out")
                    known = _seen(task, predictor.task, name, seen, own, reading)
                    found, behind = task.report(
                        predictor, data, split=split, reading=reading, columns=own, generation=generation,
                        options=ReportOptions(slices, against, swaps, known), progress=progress,
                    )  # fmt: skip
                    task.write_report(f"{name} on {data}", behind, report)
                    reported.update(behind)
                else:
                    found = task.evaluate(
                        predictor, data, split=split, reading=reading, columns=own, generation=generation,
                        progress=progress,
                    )  # fmt: skip
        finally:
            predictor.close()
        reading.stop_at(found.problems)
        for note in found.notes:
            say(note)
        return task, found

    if baseline == target:
        raise UsageError(f"--baseline is {target}, as TARGET", "give another model")
    task, done = measure(target)
    record: dict[str, Any] = {"target": target, "rows": done.rows, "skipped": done.skipped, "metrics": done.metrics}
    if report is not None:
        record["report"] = {"file": str(report), **{k: v for k, v in reported.items() if k not in ("metrics", "rows")}}
    sides = {"": done.metrics}
    if baseline is not None:
        _, base = measure(baseline, task)
        _check_same_rows(target, done, baseline, base)
        record["baseline"] = {"target": baseline, "metrics": base.metrics}
        sides = {baseline: base.metrics, target: done.metrics}
        if done.measure is not None and base.measure is not None:
            from deploykit.bootstrap import differences

            record["differences"] = differences(done.measure, base.measure, done.rows)
    skipped = f" ({done.skipped:,} skipped)" if done.skipped else ""
    text = f"{target} on {done.rows:,} rows of {data}{skipped}\n{task.metrics_text(sides)}"
    if "differences" in record:
        text += f"\n\n{target} against {baseline} (paired bootstrap, 95 %):\n{_differences_text(record['differences'])}"
    if report is not None:
        text += f"\n\n{report}: written"
    return record, text, failed_rows(done.problems)


def _seen(
    task: Task, facts: TaskFacts, target: str, seen: str | None, columns: Mapping[str, Any], reading: Reading
) -> frozenset[str] | None:
    """Return the keys of the texts that the model was trained on: of the file ``seen``, or of the run ``target``."""
    from deploykit.inspection.rows import seen_keys

    if seen is not None:
        return seen_keys(task, facts, seen, reading=reading, columns=columns)
    own = Path(target, "splits", "train.jsonl")
    return seen_keys(task, facts, str(own), reading=AS_FOUND, columns={}) if own.is_file() else None


def _differences_text(differences: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, found in differences.items():
        low, high = found["interval"]
        verdict = "beyond noise" if found["beyond_noise"] else "within noise"
        rows.append([title_of(name), f"{found['difference']:+.4f}", f"[{low:+.4f}, {high:+.4f}]", verdict])
    return text_table(["", "difference", "interval", ""], rows, left=(0, 3))


def _check_same_rows(target: str, done: Evaluation, baseline: str, base: Evaluation) -> None:
    """Raise DataError if a row was skipped for only one of the models."""
    skipped = [{problem.partition(": ")[0] for problem in one.problems} for one in (done, base)]
    if differing := sorted(skipped[0] ^ skipped[1]):
        raise DataError(
            f"{differing[0]}: only one of {target} and {baseline} takes this row, so their metrics are of different rows",
            "give --data without such rows",
        )
