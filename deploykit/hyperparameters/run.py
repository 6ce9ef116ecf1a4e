"""Search hyperparameters: train several runs, each with other options, and write the best one on the validation rows."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit import artifacts
from deploykit.data.reading import flag
from deploykit.errors import ArtifactError, DeploykitError, ExportError, MissingDependencyError, UsageError
from deploykit.hyperparameters.limits import ruled_out
from deploykit.hyperparameters.options import SearchOptions
from deploykit.hyperparameters.space import Space, default_space, read_space, starting_values
from deploykit.metric_titles import flat_metrics, lower_is_better, main_metric
from deploykit.report.svg import require_matplotlib
from deploykit.stages.finetune import Finetuned, completed, file_digests, finetune, inputs_digest
from deploykit.tasks.registry import get_task
from deploykit.training.options import FinetuneOptions
from deploykit.training.rows import Say, read_rows

if TYPE_CHECKING:
    from deploykit.hyperparameters.study import SharedStudy, TakenRun

PAGE, RECORD = "report.html", "search.json"
_POLL_S = 1.0
_VALIDATION_ROWS = "splits/validation.jsonl"


@dataclass(frozen=True)
class Searched:
    """The best run, copied to the output folder, and the ``record`` of all runs, which is in ``folder`` as JSON and as a
    page."""

    best: Finetuned
    folder: Path
    record: Mapping[str, Any]


def search(
    options: FinetuneOptions,
    chosen: SearchOptions,
    out: Path,
    *,
    force: bool = False,
    restart: bool = False,
    say: Say,
) -> Searched:
    """Train ``chosen.search`` runs in all, in the folder OUT.search, and copy the best one to ``out``.

    The first run has the given ``options``, and for the others the values of a run without a search. A
    killed search continues when it is started again with the same options, and several processes with the same options
    share the runs.

    Raises MissingDependencyError without optuna or matplotlib, ArtifactError if OUT has other content, and
    DeploykitError if no run finished within the limits.
    """
    chosen.check(options)
    options.check()
    try:
        import optuna
    except ImportError:
        raise MissingDependencyError(
            "optuna, which searches, is not installed", "pip install 'deploykit[search]'"
        ) from None
    require_matplotlib()
    from deploykit.hyperparameters.study import SharedStudy

    whole = _completed(options)
    space = default_space(whole) if chosen.search_space is None else read_space(chosen.search_space, options)
    folder = out.with_name(f"{out.name}.search")
    if restart:
        shutil.rmtree(folder, ignore_errors=True)
    if not (folder / "study.db").exists():
        artifacts.existing(out, "checkpoint", "none yet", force=force)
    key = artifacts.digest_of(
        inputs_digest(options, file_digests(options)), {name: dataclasses.asdict(entry) for name, entry in space.items()},
        chosen.search_objective, chosen.max_size_mb, chosen.max_p50_ms,
    )  # fmt: skip
    study = SharedStudy(
        folder, key, space=space, start=starting_values(space, whole), pruner=chosen.search_pruner,
        runs=chosen.search, seed=options.seed,
    )  # fmt: skip
    deadline = math.inf if chosen.time_s is None else time.monotonic() + chosen.time_s
    while True:
        run = study.take(new=time.monotonic() < deadline)
        if run is None and not study.running:
            break
        if run is None:
            time.sleep(_POLL_S)
            continue
        try:
            _train(study, run, options, chosen, say)
        except optuna.TrialPruned:
            study.end(run, pruned=True)
            say(f"run {run.number}: ended early, worse than the others at this point")
        except BaseException:
            study.release(run)
            raise
    return _publish(study, options, chosen, space, out, force=force)


def _completed(options: FinetuneOptions) -> FinetuneOptions:
    """Return the options, with the values that a run without a search would choose for unset ones."""
    if not options.unset:
        return options
    from deploykit.training.checkpoint import quiet

    quiet()
    stage = get_task(options.task).training_stage(options)
    return completed(stage, options, read_rows(stage, options, lambda _: None))[0]


def _train(study: SharedStudy, run: TakenRun, options: FinetuneOptions, chosen: SearchOptions, say: Say) -> None:
    """Train, measure and record one run."""
    words = " ".join(f"{flag(name)} {_shown(value)}" for name, value in run.values.items())
    say(f"run {run.number}{', continued' if run.continued else ''}: {words}")
    if run.same is not None:
        say(f"run {run.number}: has the options of run {run.same.number}, and its result")
        study.repeat(run, run.same)
        return
    begun = time.monotonic()

    def watch(done: float, selection: float) -> None:
        say(f"run {run.number}: {100 * done:.0f} % done, {selection:.4f} on the validation rows")
        study.report(run, done, selection)

    try:
        trained = finetune(
            dataclasses.replace(options, **run.values), study.path(run.number), say=lambda _: None, watch=watch
        )
        _check_rows(study, trained)
        metric, value = _objective(trained, chosen.search_objective)
        facts = _within_limits(study, run, chosen, say)
    except (DeploykitError, RuntimeError) as error:  # torch raises RuntimeError when memory runs out
        study.end(run, error=str(error))
        # An error of the first run would fail all runs.
        if run.number == 0 or isinstance(error, UsageError):
            raise
        say(f"run {run.number}: failed: {error}")
        return
    seconds = time.monotonic() - begun
    interval = trained.manifest.metrics["validation"].get("intervals", {}).get(metric)
    study.end(run, value, metric=metric, interval=interval, inputs=trained.manifest.inputs, seconds=seconds, **facts)
    say(f"run {run.number}: {metric} {sign_of(metric) * value:.4f}, {seconds:.0f} s")


def _check_rows(study: SharedStudy, trained: Finetuned) -> None:
    """Raise UsageError if the run was measured on other validation rows than the best one."""
    best = study.best
    if best is None:
        return
    first = artifacts.load_manifest(study.path(best.number), "checkpoint", verify=False)
    if first.files[_VALIDATION_ROWS] != trained.manifest.files[_VALIDATION_ROWS]:
        raise UsageError(
            "the searched options change the validation rows, so the runs cannot be compared",
            "name the rows with --validation and --test, or remove the options that change them from the search space",
        )


def _objective(trained: Finetuned, name: str | None) -> tuple[str, float]:
    """Return the metric's name, and its value, negated if lower is better. Raises UsageError if there is none."""
    metrics = flat_metrics(trained.manifest.metrics["validation"])
    name = name or main_metric(metrics, get_task(trained.manifest.task.name).headline)
    if name not in metrics:
        raise UsageError(f"--search-objective {name} is not a metric of this task", f"known: {', '.join(metrics)}")
    value = metrics[name]
    if not math.isfinite(value):
        raise DeploykitError(f"{name} is {value}: the run diverged", "lower --learning-rate")
    return name, sign_of(name) * value


def sign_of(metric: str) -> int:
    """Return -1 for a metric that is better if lower, else 1: the study maximizes their product."""
    return -1 if lower_is_better(metric) else 1


def _within_limits(study: SharedStudy, run: TakenRun, chosen: SearchOptions, say: Say) -> dict[str, Any]:
    """Measure the run's export, if there are limits, and report to the study by how much it exceeds them."""
    limits = {"size_mb": chosen.max_size_mb, "p50_ms": chosen.max_p50_ms}
    if not any(limits.values()):
        return {}
    from deploykit.hyperparameters.measure_export import measure_export

    out = study.folder / f"export-{run.number:04}"
    try:
        size, p50 = measure_export(study.path(run.number), out, lambda _: None)
    except ExportError as error:
        say(f"run {run.number}: has no INT8 export: {error.message}")
        run.trial.set_constraint("export", 1.0)
        return {"error": error.message}
    finally:
        shutil.rmtree(out, ignore_errors=True)
    measured = {"size_mb": size, "p50_ms": p50}
    for name, limit in limits.items():
        if limit is not None:
            run.trial.set_constraint(name, measured[name] - limit)
    excess = "".join(f"; {reason}" for reason in ruled_out(measured, limits))
    say(f"run {run.number}: the INT8 export has {size:.1f} MB and a median latency of {p50:.1f} ms{excess}")
    return measured


def _publish(
    study: SharedStudy, options: FinetuneOptions, chosen: SearchOptions, space: Space, out: Path, *, force: bool
) -> Searched:
    """Copy the best run to ``out``, and write the record and the page of the search."""
    from deploykit.hyperparameters.page import write_search_page

    record = _record(study, options, chosen, space)
    with study.locked():
        with artifacts.new_file(study.folder / RECORD) as file:
            file.write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
        write_search_page(record, study.folder / PAGE)
        best = study.best
        if best is None:
            raise _no_run(record)
        source = study.path(best.number)
        manifest = artifacts.load_manifest(source, "checkpoint", verify=False)
        own = {run.user_attrs["inputs"] for run in study.runs if "inputs" in run.user_attrs}
        there = _inputs(out)
        if not force and there in own:
            if there == manifest.inputs:
                return Searched(Finetuned(out, manifest, reused=True), study.folder, record)
        else:
            artifacts.existing(out, "checkpoint", manifest.inputs, force=force)
        with artifacts.new_directory(out) as directory:
            shutil.copytree(source, directory, dirs_exist_ok=True)
    return Searched(Finetuned(out, manifest, reused=False), study.folder, record)


def _inputs(out: Path) -> str | None:
    """Return the digest of the inputs of the checkpoint at ``out``; None if there is no checkpoint."""
    try:
        return artifacts.load_manifest(out, "checkpoint", verify=False).inputs
    except ArtifactError:
        return None


def _no_run(record: Mapping[str, Any]) -> DeploykitError:
    ended = [run for run in record["runs"] if run["state"] == "complete"]
    if not ended:
        return DeploykitError("no run finished", "give more --search-time or a larger --search")
    measured = [run for run in ended if run["size_mb"] is not None]
    if not measured:
        return DeploykitError(f"no run has an INT8 export: {ended[0]['error']}", "search without limits")
    smallest, fastest = (min(run[name] for run in measured) for name in ("size_mb", "p50_ms"))
    return DeploykitError(
        f"no run is within the limits: the smallest export has {smallest:.1f} MB, the fastest {fastest:.1f} ms",
        ("give more --search-time, " if len(record["runs"]) < record["asked"] else "")
        + "allow more, or add smaller checkpoints to the search space: model = [...]",
    )


def _record(study: SharedStudy, options: FinetuneOptions, chosen: SearchOptions, space: Space) -> dict[str, Any]:
    from deploykit.hyperparameters.study import fits

    best = study.best
    metric = next(
        (run.user_attrs["metric"] for run in study.runs if "metric" in run.user_attrs), chosen.search_objective
    )
    runs = [
        {
            "run": run.number,
            "state": run.state.name.lower(),
            "value": None if run.value is None or "metric" not in run.user_attrs else sign_of(str(metric)) * run.value,
            "selections": {str(tenth): value for tenth, value in run.intermediate_values.items()},
            "options": run.params,
            "fits": fits(run),
            **{name: run.user_attrs.get(name) for name in ("interval", "seconds", "size_mb", "p50_ms", "error")},
        }
        for run in study.runs
    ]
    return {
        "task": options.task,
        "objective": metric,
        "lower_is_better": lower_is_better(str(metric)),
        "pruner": chosen.search_pruner,
        "limits": {"size_mb": chosen.max_size_mb, "p50_ms": chosen.max_p50_ms},
        "asked": chosen.search,
        "space": {name: dataclasses.asdict(entry) for name, entry in space.items()},
        "best": None if best is None else best.number,
        "importance": study.importance(),
        "runs": runs,
    }


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
