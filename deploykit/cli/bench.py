from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from deploykit.cli.common import (
    ENCODING,
    FORCE,
    SERVER_URL,
    THREADS,
    Result,
    WithItsWords,
    deploykit_command,
    generation_options,
    refuse_columns,
    say,
)


@deploykit_command(
    cls=WithItsWords,
    help="Measure TARGETS (checkpoints, exports, or served models' names) side by side on real texts.",
)
@click.argument("targets", nargs=-1)
@click.option("--compare", "compared", nargs=2, type=click.Path(path_type=Path), metavar="OLD NEW",
              help="Instead of measuring: say what got faster or slower, beyond the noise, between two --out files.")  # fmt: skip
@click.option("--data", help="Texts to ask with; with labels or translations, accuracy is measured too.")
@click.option("--text-column", multiple=True, help="(default: the training columns, or detected)")
@click.option("--label-column", help="(default: the training column, or detected)")
@click.option("--source-column", help="Of texts to translate (default: the training column, or detected).")
@click.option("--target-column", help="Of their translations (default: the training column, or detected).")
@click.option(
    "--engine", "engines", multiple=True, default=("auto",), help="Of exports; repeat to compare. [default: auto]"
)
@click.option("--precision", "precisions", multiple=True, default=("auto",), help="Of exports; repeat. [default: auto]")
@click.option("--concurrency", "concurrencies", multiple=True, type=click.IntRange(1, 1024), default=(1, 8, 32),
              help="Callers that each wait for their answer; repeat. [default: 1 8 32]")  # fmt: skip
@click.option("--rate", "rates", multiple=True, type=click.FloatRange(0, min_open=True),
              help="Texts per second of an open loop with Poisson arrivals; repeat.")  # fmt: skip
@click.option("--p99-limit", "limits", multiple=True, type=click.FloatRange(0, min_open=True), metavar="MS",
              help="Find the highest rate of such arrivals whose p99 stays within it; repeat.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--seconds", type=click.FloatRange(0.05), default=2.0, show_default=True, help="Of each measurement.")
@click.option("--max-rows", type=click.IntRange(1), default=2000, show_default=True, help="Texts to use.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write the whole result here, as JSON.")
@click.option("--report", type=click.Path(path_type=Path), help="Write a self-contained HTML page here.")
@generation_options
@ENCODING
@FORCE
@SERVER_URL
@THREADS
def command(
    *,
    targets: tuple[str, ...],
    compared: tuple[Path, Path] | None,
    data: str | None,
    text_column: tuple[str, ...],
    label_column: str | None,
    source_column: str | None,
    target_column: str | None,
    engines: tuple[str, ...],
    precisions: tuple[str, ...],
    concurrencies: tuple[int, ...],
    rates: tuple[float, ...],
    limits: tuple[float, ...],
    max_rows: int,
    out: Path | None,
    report: Path | None,
    generation: dict[str, Any],
    encoding: str | None,
    force: bool,
    **settings: Any,
) -> Result:
    import json

    from deploykit.artifacts import new_file
    from deploykit.bench.rows import facts_of, read_rows
    from deploykit.bench.scenarios import ClosedLoop, Poisson, Within
    from deploykit.bench.targets import bench_targets
    from deploykit.errors import ArtifactError, UsageError
    from deploykit.hardware import available_cpus
    from deploykit.report.pages import write_report
    from deploykit.tasks.registry import task_of

    if compared is not None:
        return _compare(*compared)
    if not targets or data is None:
        raise UsageError(
            "there is nothing to measure without " + ("TARGETS" if not targets else "--data"),
            "name models and texts: deploykit bench exports/a --data rows.jsonl",
        )
    for path in (out, report):
        if path is not None and path.exists() and not force:
            raise ArtifactError(f"{path}: exists", "choose another name, or pass --force to replace it")
    task = facts_of(targets[0], url=settings["url"])
    columns = {
        "text_column": text_column, "label_column": label_column, "source_column": source_column,
        "target_column": target_column,
    }  # fmt: skip
    refuse_columns(task_of(task), columns, generation)
    texts, truth = read_rows(
        data,
        task,
        columns=columns,
        encoding=encoding,
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
    result["command"] = WithItsWords.words()
    result["threads"] = settings["threads"] or available_cpus()
    if out is not None:
        with new_file(out) as file:
            file.write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
    if report is not None:
        write_report(result, report)
    lines = [*_table(result["candidates"]), *(f"{path}: written" for path in (out, report) if path is not None)]
    return result, "\n".join(lines)


def _compare(old: Path, new: Path) -> Result:
    from deploykit.bench.compare import compare
    from deploykit.errors import UsageError
    from deploykit.report.record import read_record

    context = click.get_current_context()
    for parameter in context.command.params:
        given = context.get_parameter_source(str(parameter.name)) is not click.core.ParameterSource.DEFAULT
        if given and parameter.name not in ("compared", "as_json", "debug", "targets"):
            raise UsageError(f"{parameter.opts[-1]} is not for --compare, which measures nothing", "leave it out")
    if context.params["targets"]:
        raise UsageError(f"--compare takes two files, and there is {context.params['targets'][0]} too", "leave it out")
    records = [read_record(path) for path in (old, new)]
    found = compare(*records)
    lines = [
        f"{whose}: {path}, measured {record['started']}"
        for whose, path, record in zip(("old", "new"), (old, new), records)
    ]
    return {"old": str(old), "new": str(new), **found.to_json()}, "\n".join([*lines, "", found.to_text()])


def _table(candidates: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    from deploykit.tasks.registry import get_task

    generate = get_task(candidates[0]["task"]).facts.graph_kind != "encoder"
    head = ("texts/s", *(["tokens/s"] if generate else []), "p50 ms", "p99 ms")
    yield f"{'':<40}" + "".join(f"{title:>10}" for title in head) + f"{'errors':>8}"
    for candidate in candidates:
        for s in candidate["scenarios"]:
            rates = [s["throughput_per_s"], *([s["tokens_per_s"]] if generate else [])]
            cells = [f"{rate['median']:.0f}" if rate else "-" for rate in rates]
            cells += [
                f"{s['latency_ms'][key]['median']:.2f}" if s["latency_ms"][key] else "-" for key in ("p50", "p99")
            ]
            name = f"{candidate['name']}, {s['scenario']['name']}"
            yield f"{name:<40}" + "".join(f"{cell:>10}" for cell in cells) + f"{s['errors']:>8}"
    for candidate in candidates:
        if generate and candidate["metrics"]:
            yield "{}: BLEU {bleu:.2f}, chrF {chrf:.2f}".format(candidate["name"], **candidate["metrics"])
