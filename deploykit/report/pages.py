"""Write a bench result as one HTML page that needs neither network nor scripts."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from deploykit.errors import ArtifactError
from deploykit.metric_titles import shown_metrics, title_of
from deploykit.report import confusion_figure, figures, trial_figures
from deploykit.report.html import figure, page, section, table, warning_box, word_table, write_page
from deploykit.report.record import Record, cpu_words, median_cpu_ms, results_of
from deploykit.report.svg import NOTHING, apart, fraction, number, require_matplotlib
from deploykit.tasks.registry import get_task

_CPU_NOTE = (
    "of all threads of a process, in ms per request. The tokenizer and the engine are part of the model's process."
)


def write_report(record: Record, out: Path) -> None:
    """Write ``record`` (of ``BenchResult.to_json``, or of a suite under bench/) to the HTML file ``out``.

    Its keys ``command`` and ``threads`` are shown as the way to repeat the measurement. The same record gives the same
    bytes. Raises MissingDependencyError without matplotlib, ArtifactError for another JSON.
    """
    require_matplotlib()
    try:
        page = _suite(record) if "workloads" in record else _bench(record)
    except (KeyError, TypeError, StopIteration) as error:
        raise ArtifactError(
            f"this is not a bench result: it has no {error}", "pass a file that deploykit bench wrote"
        ) from error
    write_page(out, page)


def write_search(searches: Mapping[str, Record], limits: Mapping[str, tuple[float, float]], out: Path) -> None:
    """Write the search for layers in fp32 to the HTML file ``out``.

    ``searches`` are by engine, as in the export's manifest; ``limits`` are, for each metric, the checkpoint's and the
    lowest allowed. Raises MissingDependencyError without matplotlib.
    """
    require_matplotlib()
    title = "Which layers stay in fp32"
    note = "The most sensitive parts stay in fp32, as few as possible; all others are INT8."
    parts = [
        f"<header><h1>{escape(title)}</h1></header>",
        figure("Task metric", note, trial_figures.search(searches, limits)),
    ]
    for engine, found in searches.items():
        trials = [
            [str(t["kept"]), number(t["drop"]), *(fraction(t["metrics"][name]) for name in limits)]
            for t in found["trials"]
        ]
        head = ("parts in fp32", "points lost", *(title_of(name) for name in limits))
        parts.append(section(f"Trials, {engine}", "In the order of measurement.", table(head, trials)))
        rows = [
            [escape(part), f"{change:.2g}", "fp32" if part in found["kept"] else "INT8"]
            for part, change in zip(found["order"], found["sensitivity"])
        ]
        note = "Mean change of the outputs for some rows when only this part is INT8."
        parts.append(section(f"Sensitivity, {engine}", note, table(("part", "change", "became"), rows)))
    write_page(out, page(title, parts))


def write_tuning(record: Record, out: Path) -> None:
    """Write the measurements of ``deploykit tune`` to the HTML file ``out``: the settings chosen, and why not the
    others.

    Raises MissingDependencyError without matplotlib.
    """
    require_matplotlib()
    chosen, present = (record["trials"][record[key]] for key in ("chosen", "present"))
    slo, texts = record["slo"], record["texts"]
    title = f"Tuning {record['name']}: {slo['figure']} within {slo['limit_ms']:g} ms"
    rows = [
        [
            escape(trial["name"]) + ("<small>served before</small>" if trial is present else ""),
            _spread_of([r["rate_per_s"] for r in trial["rounds"]]),
            *(number(trial["latency_ms"][figure]) for figure in ("p50", "p99")),
            number(trial["memory_mb"]),
            _cpu(trial.get("cpu_ms")),
            escape(trial["verdict"]),
        ]
        for trial in record["trials"]
    ]
    head = ("settings", "requests/s", "p50 ms", "p99 ms", "memory MB", "CPU ms a request", "why")
    limit = f", at most {record['max_memory_mb']:,.0f} MB" if record["max_memory_mb"] is not None else ""
    found = [
        ("Chosen", f"{chosen['name']}: {number(chosen['rate_per_s'])} requests/s, {number(chosen['memory_mb'])} MB"),
        (
            "Served before",
            f"{present['name']}: {number(present['rate_per_s'])} requests/s, {number(present['memory_mb'])} MB",
        ),
        ("Limits", f"{slo['figure']} within {slo['limit_ms']:g} ms{limit}"),
    ]
    repeat = [
        ("Command", record["command"]),
        ("Texts", f"{texts['rows']:,} rows of {texts['mean_chars']:g} characters on average, in shuffled order"),
        (
            "Load",
            f"one text per request, arriving at random, for {record['seconds']:g} s or more at each rate tried; "
            "latency counts from the scheduled arrival, and the generator shares the machine with the server",
        ),
        ("Rate", "the highest rate within the limit, found to within 5%; medians if it was measured again"),
        ("Memory", "of all processes of the server after the load; shared pages count once"),
        ("CPU", _CPU_NOTE),
    ]
    note = "Up and left is better. The line joins the settings that no other setting beats in both."
    parts = [
        f"<header><h1>{escape(title)}</h1><p>Measured {escape(record['started'])}.</p></header>",
        warning_box(record["warnings"]),
        section("Result", "", word_table(found)),
        figure("Throughput against memory", note, trial_figures.frontier(record)),
        section("All settings tried", "In the order of their first measurement.", table(head, rows)),
        section("How to repeat it", "", word_table(repeat)),
        _machine(record),
    ]
    write_page(out, page(title, parts))


def _bench(record: Record) -> str:
    title = f"Bench: {_names(record)}"
    return page(title, [_header(record, _names(record)), *bench_parts(record)])


def bench_parts(record: Record) -> list[str]:
    """Return the sections of a page for a record of ``deploykit bench``."""
    return [_sections(record), _how(record, record), _machine(record)]


def _suite(suite: Record) -> str:
    """Yield a section for each workload, and one for the servers."""
    results = results_of(suite)
    parts = {key: _sections(result) + _how(suite, result) for key, result in results.items()}
    for workload in suite["workloads"]:
        if "axis" in workload:
            parts[workload["key"]] = _scaling(workload) + parts[workload["key"]]
    body = []
    for i, (name, part) in enumerate(parts.items()):
        body += [f'<h2 class="part" id="part{i}">{escape(name)}</h2>', apart(part, f"part{i}")]
    links = " · ".join(f'<a href="#part{i}">{escape(name)}</a>' for i, name in enumerate(parts))
    header = _header(suite, ", ".join(parts))
    return page(f"Bench: {', '.join(parts)}", [header, f"<nav>{links}</nav>", _skipped(suite), *body, _machine(suite)])


def _header(record: Record, what: str) -> str:
    started = escape(record["started"])
    return f"<header><h1>Bench</h1><p>{escape(what)}. Measured {started}.</p></header>"


def _names(result: Record) -> str:
    return ", ".join(candidate["name"] for candidate in result["candidates"])


def _skipped(suite: Record) -> str:
    skipped = list(suite["skipped"].items())
    return section("Not measured", "", word_table(skipped)) if skipped else ""


def _sections(result: Record) -> str:
    candidates = result["candidates"]
    scenario = result["headline"]["name"]
    first, cpu = candidates[0], _cpu_rows(candidates)
    parts = [
        warning_box(result["warnings"]),
        section("Summary", "Each in its best closed loop; medians over the rounds.", _summary(result)),
        figure(
            "Throughput",
            "Medians over the rounds; lines show min to max.",
            figures.throughput_bars(result),
        ),
        figure(
            "Latency",
            f"Share of requests answered within a time, at {scenario}.",
            figures.latency_distribution(result, scenario),
        ),
        figure(
            "Throughput against latency",
            "Numbers are callers, each of which waits for its answer; hollow diamonds are requests that arrive at random. "
            "Right and low is better.",
            figures.throughput_latency(result),
        ),
        figure(
            "Scaling with callers",
            "In one process, the callers' texts form one batch.",
            figures.scaling_with_callers(result),
        ),
        figure("Accuracy against speed", "Right and high is better.", figures.accuracy_speed(result)),
        figure(
            "Where the time goes", "For each model in this process, in its best closed loop.", figures.stages(result)
        ),
        figure("Confusion matrix", _matrix_note(first), confusion_figure.confusion(first)),
        section("CPU time", _CPU_NOTE, table(("model and load", "ms a request"), cpu)) if cpu else "",
        figure("Memory and size", _memory_note(candidates), figures.memory_size(result)),
        section("All measurements", "Medians over the rounds, with min and max below.", _details(result)),
    ]
    return "\n".join(part for part in parts if part)


def _scaling(workload: Record) -> str:
    """Render a workload whose candidates are one model at the ``values`` (by their names) of ``axis``."""
    lines: dict[str, list[tuple[float, Record]]] = {}
    for candidate in workload["bench"]["candidates"]:
        for s in candidate["scenarios"]:
            lines.setdefault(s["scenario"]["name"], []).append((workload["values"][candidate["name"]], s))
    drawn = figures.scaling(workload["axis"], [figures.Scaling(name, points) for name, points in lines.items()])
    return figure(f"Scaling with {workload['axis']}", "Medians; lines show min to max.", drawn)


def _how(record: Record, result: Record) -> str:
    return section("How to repeat it", "", word_table(_settings(record, result)))


def _summary(result: Record) -> str:
    measured = {name: value for c in result["candidates"] for name, value in (c["metrics"] or {}).items()}
    metrics_shown = shown_metrics(measured, get_task(result["candidates"][0]["task"]).headline)
    head = (
        "model",
        *_rates(result),
        "p50 ms",
        "p99 ms",
        "errors",
        *metrics_shown.values(),
        "first answer s",
        "memory MB",
        "size MB",
    )
    rows = []
    for candidate in result["candidates"]:
        best = figures.headline(candidate)
        facts = [candidate["engine"], candidate["precision"], candidate["headline"]]
        rows.append(
            [
                f"{escape(candidate['name'])}<small>{escape(' · '.join(f for f in facts if f))}</small>",
                *(_median(best[key]) for key in _rates(result).values()),
                *(_median(best["latency_ms"][key]) for key in ("p50", "p99")),
                f"{best['errors']:,}",
                *(_accuracy(candidate, key) for key in metrics_shown),
                number(candidate["first_answer_s"]),
                number(candidate["peak_memory_mb"]),
                number(candidate["size_mb"]),
            ]
        )
    return table(head, rows)


def _accuracy(candidate: Record, metric: str) -> str:
    """Return a cell with a metric, its interval, and whether it differs from the first candidate's beyond noise."""
    metrics = candidate["metrics"] or {}
    if metric not in metrics or metric not in metrics.get("intervals", {}):
        return fraction(metrics.get(metric))
    low, high = metrics["intervals"][metric]
    found = (candidate.get("differences") or {}).get(metric)
    told = (
        f"<small>{'differs from the first model beyond noise' if found['beyond_noise'] else 'same as the first model within noise'}</small>"
        if found
        else ""
    )
    return f"{fraction(metrics[metric])}<small>{fraction(low)} to {fraction(high)}</small>{told}"


def _details(result: Record) -> str:
    head = ("model and load", *_rates(result), "p50 ms", "p90 ms", "p99 ms", "slowest ms", "requests", "errors")
    rows = []
    for candidate in result["candidates"]:
        for s in candidate["scenarios"]:
            examples = "; ".join(f"{count:,} × {message}" for message, count in s["error_examples"].items())
            few = " (few samples)" if s["few_samples"] else ""
            rows.append(
                [
                    f"{escape(candidate['name'])}<small>{escape(s['scenario']['name'] + few)}</small>"
                    + (f"<small>{escape(examples)}</small>" if examples else ""),
                    *(_spread(s[key]) for key in _rates(result).values()),
                    *(_spread(s["latency_ms"][key]) for key in ("p50", "p90", "p99", "max")),
                    f"{s['requests']:,}",
                    f"{s['errors']:,}",
                ]
            )
    return table(head, rows)


def _rates(result: Record) -> dict[str, str]:
    """Return the titles of the throughput columns, and their keys."""
    tokens = {"target tokens/s": "tokens_per_s"} if figures.generates(result) else {}
    return {"requests/s": "throughput_per_s", **tokens}


def _machine(record: Record) -> str:
    machine = record["machine"]
    words = [
        ("CPU", f"{machine['cpu']}, {machine['cpus_usable']} of {machine['cpus']} usable"),
        ("CPU features", ", ".join(machine["cpu_flags"]) or NOTHING),
        ("Memory", f"{machine['memory_gb']} GB"),
        ("System", f"{machine['system']}, Python {machine['python']}"),
        ("Packages", ", ".join(f"{name} {version}" for name, version in machine["packages"].items())),
    ]
    return section("Machine", "", word_table(words))


def _settings(record: Record, result: Record) -> list[tuple[str, str]]:
    texts, settings = result["texts"], result["settings"]
    busiest = max((load["cpu_percent"] for load in result["other_load"]), default=0.0)
    told = {"Command": record.get("command"), "Threads": record.get("threads")}
    return [
        *((title, str(value)) for title, value in told.items() if value),
        ("Texts", f"{texts['rows']:,} rows of {texts['mean_chars']:g} characters on average, in shuffled order"),
        (
            "Load",
            f"{settings['rounds']} rounds of {settings['seconds']:g} s for each model and scenario, taking turns; "
            f"{settings['warmup_s']:g} s of warm-up before each; seed {settings['seed']}",
        ),
        ("Latency", "of a request that arrives at random: from its scheduled arrival, queueing included"),
        ("Inside one process", "the callers' texts are merged into one call, and each caller waits for the whole call"),
        (
            "On a server",
            "one text per request over HTTP keep-alive; the generator shares the machine with a local server",
        ),
        ("Other programs", f"at most {busiest:.0f}% of the CPUs just before a round"),
    ]


def _matrix_note(candidate: Record) -> str:
    note = f"Of {candidate['name']}: rows are the truth, columns the answer; percent and colour are shares of the row."
    matrix = (candidate["metrics"] or {}).get("confusion_matrix")
    if isinstance(matrix, Mapping) and len(matrix) > confusion_figure.MAX_MATRICES:
        note += f" The first {confusion_figure.MAX_MATRICES} of {len(matrix)} labels."
    return note


def _memory_note(candidates: Sequence[Record]) -> str:
    note = "Resident memory of the process that holds the model, Python and libraries included."
    if any(candidate["served"] for candidate in candidates):
        note += " A server's is the sum of its processes."
    return note


def _cpu_rows(candidates: Sequence[Record]) -> list[list[str]]:
    return [
        [
            f"{escape(candidate['name'])}<small>{escape(s['scenario']['name'])}</small>",
            _cpu(cpu_ms),
        ]
        for candidate in candidates
        for s in candidate["scenarios"]
        if (cpu_ms := median_cpu_ms(s))
    ]


def _cpu(cpu_ms: Mapping[str, float] | None) -> str:
    return NOTHING if cpu_ms is None else escape(cpu_words(cpu_ms))


def _median(spread: Mapping[str, float] | None) -> str:
    return number(spread["median"] if spread else None)


def _spread_of(values: Sequence[float | None]) -> str:
    """Return the spread of several measurements; one without a result counts as 0."""
    found = [value or 0.0 for value in values]
    if len(found) == 1:
        return number(values[0])
    return _spread({"median": statistics.median(found), "min": min(found), "max": max(found)})


def _spread(spread: Mapping[str, float] | None) -> str:
    if not spread:
        return NOTHING
    return f"{number(spread['median'])}<small>{number(spread['min'])} to {number(spread['max'])}</small>"
