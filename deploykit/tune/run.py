"""Tune a packaged model: serve it with many settings, find the best within the limits, and apply them."""

from __future__ import annotations

import datetime
import json
import shutil
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

from deploykit.artifacts import digest_of, installed_versions, load_manifest, new_file
from deploykit.bench.machine import OtherLoad, describe_machine, other_load
from deploykit.bench.run import BUSY_PERCENT
from deploykit.errors import ArtifactError, DeploykitError, MissingDependencyError, ServerError, UsageError
from deploykit.hardware import available_cpus, cpu_name
from deploykit.measurement_log import MeasurementLog
from deploykit.peak_memory import require_psutil
from deploykit.report.pages import write_tuning
from deploykit.report.svg import require_matplotlib
from deploykit.runtime.engines import ENGINES
from deploykit.runtime.engines.protocol import Precision
from deploykit.runtime.find_graphs import find_graphs
from deploykit.runtime.serving_settings import check_name
from deploykit.runtime.tuned_settings import write_tuned
from deploykit.tasks.registry import task_of
from deploykit.triton.config_edit import settings_of, with_settings
from deploykit.triton.preflight import find_triton
from deploykit.triton.repository import CONFIG, STREAM_SUFFIX, check_config, list_models, package, versions_of
from deploykit.tune.search import TUNED_SETTINGS, Configuration, Graph, Limits, Round, Trial, choose, search, verdict
from deploykit.tune.serving import Subject, measure_served

SCHEMA = 1
BACKUP = f"{CONFIG}.before-tune"


@dataclass(frozen=True)
class Tuning:
    """Result of tuning.

    - ``record``: the content of the JSON file.
    - ``backup``: the former config, None if the config did not change.
    - ``added``: the version packaged for another engine or precision.
    - ``recorded``: the file that makes the chosen ones the export's engine "auto".
    """

    record: Mapping[str, Any]
    backup: Path | None
    added: Path | None
    recorded: Path | None


def open_subject(name: str, repository: Path, export: Path | None) -> Subject:
    """Open the model to tune, and verify all its files.

    Raises ArtifactError when ``repository`` has no such model, or only one without a version, one that streams, or one
    that was not packaged from ``export``.
    """
    check_name(name)
    models = {model.name: model for model in list_models(repository) if model.versions}
    if name not in models:
        names = ", ".join(models) or "none"
        raise ArtifactError(
            f"{repository}: has no packaged model {name!r} (it has: {names})",
            f"run deploykit package EXPORT --name {name} --model-repository {repository}, or check the name",
        )
    model = models[name]
    if model.problem is not None:
        raise model.problem
    version = model.path / str(model.versions[-1])
    manifest = load_manifest(version, "model")
    if "streams" in manifest.options:
        raise UsageError(f"{name} has no weights", f"tune {manifest.options['streams']}, whose answers it streams")
    check_config(model.path / CONFIG, manifest.task, None, str(manifest.options["engine"]))
    if export is not None and load_manifest(export, "export").digest != manifest.parent:
        raise ArtifactError(
            f"{export}: is not the export that {version} was packaged from",
            f"run deploykit package {export} --name {name} --model-repository {repository} first, or name the other export",
        )
    return Subject(name, version, manifest, (model.path / CONFIG).read_text(encoding="utf-8"), export)


def tune(
    subject: Subject,
    texts: Sequence[str],
    limits: Limits,
    *,
    engines: Sequence[str] = (),
    precisions: Sequence[str] = (),
    seconds: float,
    out: Path,
    command: str,
    say: Callable[[str], None],
) -> Tuning:
    """Search, write ``out`` (JSON) and its page, and apply the best settings.

    The present settings stay unless others are better beyond the noise. ``engines`` and ``precisions`` restrict the
    search; without the export, both stay as packaged. A killed search continues from OUT.search.json. Raises
    MissingDependencyError without Triton, ServerError if no settings are within the limits; then nothing is changed.
    """
    find_triton()
    require_psutil()
    require_matplotlib()
    task = subject.manifest.task
    source = str(subject.config_path)
    present = Configuration(
        str(subject.manifest.options["engine"]),
        str(subject.manifest.options["precision"]),
        settings_of(subject.config, task, source),
    )
    # Find out now, and not after ten minutes of measuring, if the config cannot be changed.
    with_settings(subject.config, task, replace(present.settings, instances=1, threads=1), source)
    graphs = _graphs(subject, engines, precisions, say)
    here = [cpu_name(), available_cpus(), installed_versions()]
    key = digest_of(subject.manifest.digest, subject.config, texts, asdict(limits.slo), seconds, here)
    trace = MeasurementLog(out.with_name(f"{out.name}.search.json"), key, say)
    warnings = _warnings(other_load())
    for warning in warnings:
        say(f"warning: {warning}")
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    with tempfile.TemporaryDirectory(prefix="deploykit-tune-") as folder:

        def measure(choice: Configuration, number: int, expected: float | None) -> Round:
            served = partial(measure_served, subject, choice, Path(folder), texts, limits.slo)
            name = json.dumps([number, asdict(choice)], sort_keys=True)
            return Round(
                **trace.measured(name, lambda: asdict(served(expected=expected, seconds=seconds, seed=number)))
            )

        trials = search(task, present, graphs, limits, measure, say)
    chosen = choose(trials, limits)
    if chosen is None:
        raise _no_settings_error(trials, limits, subject)
    record = {
        "schema": SCHEMA,
        "started": started,
        "command": command,
        "name": subject.name,
        "task": task.name,
        "slo": asdict(limits.slo),
        "max_memory_mb": limits.max_memory_mb,
        "time_s": limits.budget_s,
        "seconds": seconds,
        "texts": {"rows": len(texts), "mean_chars": round(statistics.mean(map(len, texts)), 1)},
        "machine": describe_machine(),
        "warnings": warnings,
        "trials": [_trial_to_json(trial, subject, chosen, limits) for trial in trials],
        "present": 0,
        "chosen": trials.index(chosen),
    }
    tuning = _apply(subject, trials, chosen, limits, record)
    with new_file(out) as file:
        file.write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
    write_tuning(record, out.with_suffix(".html"))
    trace.remove()
    return tuning


def _warnings(load: OtherLoad) -> list[str]:
    if load.cpu_percent <= BUSY_PERCENT:
        return []
    return [f"other programs used {load.cpu_percent:.0f}% of the CPUs at the beginning: the figures may be too low"]


def _graphs(
    subject: Subject, engines: Sequence[str], precisions: Sequence[str], say: Callable[[str], None]
) -> list[Graph]:
    """Return the export's graphs that can be served here, by the config's kind of device; without an export, the
    packaged one.
    """
    packaged = (str(subject.manifest.options["engine"]), str(subject.manifest.options["precision"]))
    if subject.export is None:
        if engines or precisions:
            raise UsageError(
                f"the package has one graph, {' '.join(packaged)}", "pass --export to search engine and precision"
            )
        say(f"{' '.join(packaged)} as packaged; pass --export EXPORT to search engine and precision too")
        return [packaged]
    manifest = load_manifest(subject.export, "export")
    found = []
    for engine in engines or [name for name, info in ENGINES.items() if info.installed]:
        for precision in precisions or get_args(Precision):
            try:
                find_graphs(subject.export, manifest, engine=engine, precision=precision)
                check_config(subject.config_path, subject.manifest.task, None, engine)
                found.append((engine, precision))
            except (ArtifactError, UsageError, MissingDependencyError) as error:
                if engines or precisions:
                    say(f"left out: {error.message}")
    if not found:
        raise ArtifactError(
            f"{subject.export}: has no graph of that engine and precision that runs here",
            "leave out --engine and --precision",
        )
    return found


def _no_settings_error(trials: Sequence[Trial], limits: Limits, subject: Subject) -> DeploykitError:
    """Return an error that names the best measurement, and what to change."""
    task, slo = subject.manifest.task, limits.slo
    in_time = [trial for trial in trials if trial.rate_per_s]
    if in_time:
        least = min(in_time, key=lambda trial: trial.memory_mb or float("inf"))
        return ServerError(
            f"no settings hold {slo} in {limits.max_memory_mb:,.0f} MB; the least was {least.memory_mb:,.0f} MB, with "
            f"{least.rate_per_s:.1f} requests a second: {least.choice.describe(task)}",
            "allow more --max-memory, or give more --time to find others; nothing was changed",
        )
    answered = [trial for trial in trials if trial.latency_ms(slo.figure) is not None]
    if not answered:
        return ServerError(
            f"no settings could be served: {trials[0].failure}", "fix that and run it again; nothing was changed"
        )
    best = min(answered, key=lambda trial: trial.latency_ms(slo.figure) or 0.0)
    return ServerError(
        f"no settings hold {slo}; the best was {best.latency_ms(slo.figure):.1f} ms with one caller: "
        f"{best.choice.describe(task)}",
        f"allow more (--slo {slo.figure}=...), export a smaller or an INT8 model, or give more --time; nothing was changed",
    )


def _apply(subject: Subject, trials: Sequence[Trial], chosen: Trial, limits: Limits, record: dict[str, Any]) -> Tuning:
    present, choice, model = trials[0].choice, chosen.choice, subject.version.parent
    recorded = added = backup = None
    graphs = {(trial.choice.engine, trial.choice.precision) for trial in trials}
    if subject.export is not None and len(graphs) > 1:  # otherwise nothing was compared
        recorded = write_tuned(
            subject.export,
            load_manifest(subject.export, "export"),
            engine=choice.engine,
            precision=choice.precision,
            slo=str(limits.slo),
            rate_per_s=chosen.rate_per_s,
        )
    if subject.export is not None and (choice.engine, choice.precision) != (present.engine, present.precision):
        before = versions_of(model)
        done = package(
            subject.export,
            subject.name,
            model.parent,
            engine=choice.engine,
            precision=choice.precision,
            stream=(model.parent / f"{subject.name}{STREAM_SUFFIX}").is_dir(),
        )
        added = done.path if done.version not in before else None
    if choice.settings != present.settings:
        text = with_settings(subject.config, subject.manifest.task, choice.settings, str(subject.config_path))
        backup = model / BACKUP
        with new_file(backup) as file:
            shutil.copyfile(subject.config_path, file)
        with new_file(subject.config_path) as file:
            file.write_text(text, encoding="utf-8")
    return Tuning(record, backup, added, recorded)


def _trial_to_json(trial: Trial, subject: Subject, chosen: Trial, limits: Limits) -> dict[str, Any]:
    settings = asdict(trial.choice.settings)
    names = ["instances", "threads"]
    names += [name for name in TUNED_SETTINGS if name in task_of(subject.manifest.task).settings]
    return {
        "name": trial.choice.describe(subject.manifest.task),
        "engine": trial.choice.engine,
        "precision": trial.choice.precision,
        "settings": {name: settings[name] for name in names},
        "rate_per_s": trial.rate_per_s or None,
        "latency_ms": {figure: trial.latency_ms(figure) for figure in ("p50", "p90", "p99")},
        "memory_mb": trial.memory_mb,
        "cpu_ms": trial.cpu_ms,
        "holds": limits.holds(trial),
        "verdict": verdict(trial, chosen, limits),
        "rounds": [asdict(round) for round in trial.rounds],
    }
