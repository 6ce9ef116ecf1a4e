from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from deploykit.cli_parts.command import RecordedCommand, Result, deploykit_command, option, say
from deploykit.cli_parts.shared_options import (
    FORCE,
    NUM_PROMPTS,
    SERVER_URL,
    THREADS,
    column_options,
    columns_for,
    generation_options,
    reading_options,
)
from deploykit.data.reading import Reading
from deploykit.errors import ArtifactError, UsageError
from deploykit.text_table import text_table


@deploykit_command(
    cls=RecordedCommand,
    help="Measure TARGETS (checkpoints, exports, or served models' names) side by side on real texts.",
)
@click.argument("targets", nargs=-1)
@click.option("--compare", "compared", nargs=2, type=click.Path(path_type=Path), hidden=True)
@click.option("--data", help="Rows to send; if they have labels or translations, accuracy is measured too.")
@reading_options()
@column_options()
@click.option(
    "--engine",
    "engines",
    multiple=True,
    default=("auto",),
    help="Engine for exports; repeat to compare. [default: auto]",
)
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    default=("auto",),
    help="Precision for exports; repeat to compare. [default: auto]",
)
@option("--max-concurrency", "concurrencies", aliases=["--concurrency"], multiple=True,
        type=click.IntRange(1, 1024), default=(1, 8, 32),
        help="Closed loop: number of callers, each waiting for its answer; repeat. [default: 1 8 32]")  # fmt: skip
@option("--request-rate", "rates", aliases=["--rate"], multiple=True, type=click.FloatRange(0, min_open=True),
        help="Open loop: texts/s, with Poisson arrivals; repeat.")  # fmt: skip
@click.option("--p99-limit", "limits", multiple=True, type=click.FloatRange(0, min_open=True), metavar="MS",
              help="Find the highest open-loop rate with a p99 latency within MS; repeat.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Number of rounds.")
@click.option(
    "--seconds", type=click.FloatRange(0.05), default=2.0, show_default=True, help="Duration of each measurement."
)
@NUM_PROMPTS
@click.option("--seed", type=int, default=0, show_default=True, help="Seed for choosing rows and arrival times.")
@option("--output", "out", aliases=["--out"], type=click.Path(path_type=Path),
        help="File to write the full result to, as JSON.")  # fmt: skip
@click.option("--report", type=click.Path(path_type=Path), help="File to write a self-contained HTML page to.")
@generation_options
@FORCE
@SERVER_URL
@THREADS
def command(
    *,
    targets: tuple[str, ...],
    compared: tuple[Path, Path] | None,
    data: str | None,
    columns: dict[str, Any],
    engines: tuple[str, ...],
    precisions: tuple[str, ...],
    concurrencies: tuple[int, ...],
    rates: tuple[float, ...],
    limits: tuple[float, ...],
    max_rows: int,
    out: Path | None,
    report: Path | None,
    generation: dict[str, Any],
    reading: Reading,
    force: bool,
    **settings: Any,
) -> Result:
    import json

    from deploykit.artifacts import new_file
    from deploykit.bench.rows import facts_of, read_rows
    from deploykit.bench.scenarios import ClosedLoop, Poisson, Within
    from deploykit.bench.targets import bench_targets
    from deploykit.hardware import available_cpus
    from deploykit.report.pages import write_report
    from deploykit.tasks.registry import task_of

    if compared is not None:
        return _compare(*compared)
    if not targets or data is None:
        raise UsageError(
            f"{'TARGETS' if not targets else '--data'} is missing",
            "name at least one model and its rows: deploykit bench exports/a --data rows.jsonl",
        )
    for path in (out, report):
        if path is not None and path.exists() and not force:
            raise ArtifactError(f"{path}: already exists", "choose another name, or pass --force to replace it")
    task = facts_of(targets[0], url=settings["url"])
    columns = columns_for(task_of(task), columns, generation)
    texts, truth = read_rows(
        data,
        task,
        columns=columns,
        reading=reading,
        most=max_rows,
        seed=settings["seed"],
    )
    result = bench_targets(
        targets,
        texts,
        truth,
        generation=generation,
        engines=engines,
        precisions=precisions,
        scenarios=[*map(ClosedLoop, concurrencies), *map(Poisson, rates), *map(Within, limits)],
        progress=say,
        **settings,
    ).to_json()
    result["command"] = RecordedCommand.command_line()
    result["threads"] = settings["threads"] or available_cpus()
    if out is not None:
        with new_file(out) as file:
            file.write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
    if report is not None:
        write_report(result, report)
    lines = [*_table(result["candidates"]), *(f"{path}: written" for path in (out, report) if path is not None)]
    return result, "\n".join(lines)


def _compare(old: Path, new: Path) -> Result:
    """Run ``deploykit compare``, which was an option of this command in earlier versions."""
    from deploykit.cli.compare import compare_files

    context = click.get_current_context()
    for parameter in context.command.params:
        given = context.get_parameter_source(str(parameter.name)) is not click.core.ParameterSource.DEFAULT
        if given and parameter.name not in ("compared", "as_json", "debug"):
            extra = context.params["targets"][0] if parameter.name == "targets" else parameter.opts[-1]
            raise UsageError(f"{extra} does not combine with --compare", "run deploykit compare OLD NEW")
    return compare_files(old, new)


def _table(candidates: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    from deploykit.metric_titles import shown_metrics, verdict, with_interval
    from deploykit.report.record import cpu_words, median_cpu_ms
    from deploykit.tasks.registry import get_task

    task = get_task(candidates[0]["task"])
    generate = task.facts.graph_kind != "encoder"
    head = ("texts/s", *(["tokens/s"] if generate else []), "p50 ms", "p99 ms")
    rows = []
    for candidate in candidates:
        for s in candidate["scenarios"]:
            rates = [s["throughput_per_s"], *([s["tokens_per_s"]] if generate else [])]
            cells = [f"{rate['median']:.0f}" if rate else "-" for rate in rates]
            cells += [
                f"{s['latency_ms'][key]['median']:.2f}" if s["latency_ms"][key] else "-" for key in ("p50", "p99")
            ]
            rows.append([candidate["name"], s["scenario"]["name"], *cells, str(s["errors"])])
    yield text_table(["model", "load", *head, "errors"], rows, left=(0, 1))
    for candidate in candidates:
        for s in candidate["scenarios"]:
            if cpu_ms := median_cpu_ms(s):
                yield f"{candidate['name']}, {s['scenario']['name']}: CPU ms a request: {cpu_words(cpu_ms)}"
    graded = [candidate for candidate in candidates if candidate["metrics"]]
    if graded:
        titles = shown_metrics(graded[0]["metrics"], task.headline)
        compared = any(candidate["differences"] for candidate in graded)
        lines = (
            [
                candidate["name"],
                *(with_interval(candidate["metrics"], name) for name in titles),
                *([verdict(candidate["differences"], titles) if candidate["differences"] else ""] if compared else []),
            ]
            for candidate in graded
        )
        titled = ["model", *titles.values(), *(["from the first"] if compared else [])]
        yield ""
        yield text_table(titled, lines, left=(0, len(titles) + 1))
