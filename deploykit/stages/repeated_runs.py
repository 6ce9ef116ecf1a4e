"""Train several times on parts of the rows, for any task: cross-validation, and a learning curve."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from deploykit import artifacts
from deploykit.errors import DataError, MissingDependencyError, UsageError
from deploykit.measurement_log import MeasurementLog
from deploykit.metric_titles import flat_metrics, lower_is_better, main_metric, points_of
from deploykit.report.training_figures import write_learning_curve
from deploykit.stages.finetune import Finetuned, Stage, file_digests, inputs_digest
from deploykit.tasks.registry import get_task
from deploykit.training.options import FinetuneOptions
from deploykit.training.rows import Rows, Say, read_rows

SHARES = (0.1, 0.25, 0.5, 0.75)
"""Shares of the training rows for the points of a learning curve, in addition to all rows."""
_MOST_FOLDS = 100


def check_repeats(options: FinetuneOptions, folds: int, curve: bool, *, searches: bool = False) -> None:
    """Raise UsageError if ``--folds`` or ``--learning-curve`` does not fit the options of the run, or a search."""
    if searches and (folds or curve):
        raise UsageError("--search trains other runs", "give --folds and --learning-curve with the best run's options")
    if folds and not 2 <= folds <= _MOST_FOLDS:
        raise UsageError(f"--folds is {folds}", f"give a number from 2 to {_MOST_FOLDS}")
    if folds and (options.validation is not None or options.test is not None):
        raise UsageError("--folds splits the rows of --train", "leave out --validation and --test")
    if curve and not (options.test or options.test_fraction or options.validates):
        raise UsageError("--learning-curve needs held-out rows", "give --validation or --test")


def repeat(options: FinetuneOptions, done: Finetuned, out: Path, *, folds: int, curve: bool, say: Say) -> Finetuned:
    """Return the run ``done`` at ``out`` with its repeated runs: ``folds`` of cross-validation, a learning curve."""
    return dataclasses.replace(
        done,
        folds=cross_validate(options, folds, out, say) if folds else None,
        learning_curve=learning_curve(options, done, out, say) if curve else None,
    )


def cross_validate(options: FinetuneOptions, folds: int, out: Path, say: Say) -> dict[str, Any]:
    """Split the rows of ``--train`` into ``folds``, and train as often, each time measured on another fold.

    Returns ``folds``, a list of metrics, and ``mean`` and ``deviation`` (standard deviation over folds) of each metric. They
    are kept in OUT.folds.json, from which a killed command continues.
    """
    stage: Stage[Any, Any, Any] = get_task(options.task).training_stage(options)
    whole = dataclasses.replace(options, validation_fraction=0.0, test_fraction=0.0)
    rows: Rows[Any, Any] = read_rows(stage, whole, say)
    # Folds have all rows, however few of them a task holds out otherwise.
    uncapped: dict[str, Any] = {"held_out_rows": len(rows.splits["train"])} if hasattr(options, "held_out_rows") else {}
    splitter: Stage[Any, Any, Any] = get_task(options.task).training_stage(dataclasses.replace(options, **uncapped))
    parts, left = [], rows.splits["train"]
    for number in range(folds, 1, -1):
        left, _, part = splitter.split(left, validation=0, test=1 / number)
        parts.append(part)
    parts.append(left)
    log = MeasurementLog(
        out.with_name(f"{out.name}.folds.json"),
        artifacts.digest_of(inputs_digest(options, file_digests(options)), folds),
        say,
    )
    runs = []
    for i, held_out in enumerate(parts):
        rest = [row for j, part in enumerate(parts) if j != i for row in part]
        train, validation, _ = stage.split(rest, validation=options.validation_fraction, test=0)
        runs.append(dataclasses.replace(rows, splits={"train": train, "validation": validation, "test": held_out}))
        stage.check(runs[-1].splits)
    measured = []
    for i, fold in enumerate(runs):
        train, held_out = fold.splits["train"], fold.splits["test"]
        say(f"fold {i + 1} of {folds}: training on {len(train):,} rows, measuring on {len(held_out):,}")
        measured.append(log.measured(f"fold {i + 1}", partial(_metrics, options, fold, out, "test")))
    names = [name for name in measured[0] if name != "intervals" and all(name in metrics for metrics in measured)]
    values = {name: [metrics[name] for metrics in measured] for name in names}
    return {
        "folds": measured,
        "mean": {name: float(np.mean(of_folds)) for name, of_folds in values.items()},
        "deviation": {name: float(np.std(of_folds, ddof=1)) for name, of_folds in values.items()},
    }


def learning_curve(options: FinetuneOptions, whole: Finetuned, out: Path, say: Say) -> dict[str, Any]:
    """Train on 10 to 75 % of the training rows of the run ``whole``, each time measured on its held-out rows.

    Returns ``metric``, ``points`` (``rows``, ``value`` and its 95 % ``interval``), and ``expected``: the value with twice as many rows, by a
    power law of the error (Hestness et al., 2017), or None where the error does not fall. The metrics are kept in
    OUT.curve.json, from which a killed command continues, and drawn in OUT.curve.html.

    Raises DataError if there are too few rows.
    """
    stage: Stage[Any, Any, Any] = get_task(options.task).training_stage(options)
    rows: Rows[Any, Any] = read_rows(stage, options, lambda _: None)
    train = rows.splits["train"]
    counts = sorted({round(share * len(train)) for share in SHARES})
    if counts[0] < 10:
        raise DataError(
            f"{options.train}: 10 % of {len(train)} training rows are too few to train on", "give more rows"
        )
    log = MeasurementLog(
        out.with_name(f"{out.name}.curve.json"),
        artifacts.digest_of(inputs_digest(options, file_digests(options)), counts),
        say,
    )
    measured = whole.manifest.metrics[rows.held_out]
    every = flat_metrics(measured)
    metric = main_metric(every, get_task(options.task).headline)
    points = []
    parts = [dataclasses.replace(rows, splits={**rows.splits, "train": stage.take(train, n)}) for n in counts]
    for part in parts:
        stage.check(part.splits)
    for count, part in zip(counts, parts):
        say(f"learning curve: training on {count:,} of {len(train):,} rows")
        found = log.measured(str(count), partial(_metrics, options, part, out, rows.held_out))
        points.append(_point(count, metric, found))
    points.append(_point(len(train), metric, {**every, "intervals": measured.get("intervals", {})}))
    curve = {"metric": metric, "points": points, "expected": expected(points, metric, 2 * len(train))}
    try:
        write_learning_curve(curve, out.with_name(f"{out.name}.curve.html"))
    except MissingDependencyError as error:
        say(f"the learning curve is not drawn: {error.message}: {error.remedy}")
    return curve


def _point(rows: int, metric: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {"rows": rows, "value": metrics[metric], "interval": metrics.get("intervals", {}).get(metric)}


def expected(points: Sequence[Mapping[str, Any]], metric: str, rows: int) -> float | None:
    """Return the value of a metric with ``rows`` rows, by a power law through the errors at ``points``; None if they do not
    fall with the rows."""
    lower = lower_is_better(metric)
    best = 0.0 if lower else 100 / points_of(metric)
    errors = [point["value"] if lower else best - point["value"] for point in points]
    if min(errors) <= 0:
        return None
    slope, offset = np.polyfit(np.log([point["rows"] for point in points]), np.log(errors), 1)
    if slope >= 0:
        return None
    error = math.exp(offset + slope * math.log(rows))
    return float(error if lower else best - error)


def _metrics(options: FinetuneOptions, rows: Rows[Any, Any], out: Path, split: str) -> dict[str, Any]:
    """Train once, and return the metrics of a split under dotted names, and their "intervals"."""
    from transformers import set_seed

    stage: Stage[Any, Any, Any] = get_task(options.task).training_stage(options)
    work = out.absolute().with_name(f".{out.name}.part.training")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        set_seed(options.seed)
        metrics = stage.train(rows, work, lambda _: None).metrics[split]
        return {**flat_metrics(metrics), "intervals": metrics.get("intervals", {})}
    finally:
        shutil.rmtree(work, ignore_errors=True)
