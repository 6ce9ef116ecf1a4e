from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from deploykit.cli_parts.command import RecordedCommand, Result, deploykit_command, option, say
from deploykit.cli_parts.shared_options import (
    FORCE,
    MODEL_REPOSITORY,
    NUM_PROMPTS,
    column_options,
    columns_for,
    reading_options,
)
from deploykit.data.reading import Reading
from deploykit.text_table import text_table


@deploykit_command(
    cls=RecordedCommand,
    help="Find the settings with which the packaged model TARGET answers the most requests/s within a latency limit.",
)
@click.argument("name", metavar="TARGET")
@click.option("--slo", required=True, metavar="p99=50ms", help="Latency limit: p50, p90 or p99.")
@click.option("--max-memory", metavar="1GB", help="Memory limit for the server and all its processes.")
@MODEL_REPOSITORY
@click.option("--export", type=click.Path(path_type=Path),
              help="Export that TARGET was packaged from. With it, engine and precision are searched too.")  # fmt: skip
@click.option("--engine", "engines", multiple=True, help="Engine to try; repeat. [default: all that run here]")
@click.option("--precision", "precisions", multiple=True, help="Precision to try; repeat. [default: all in the export]")
@click.option("--data", help="Rows to send. [default: the export's test rows]")
@reading_options()
@column_options(inputs_only=True)
@NUM_PROMPTS
@click.option("--time", "budget", default="10m", show_default=True, help="Time limit for measuring.")
@click.option(
    "--seconds", type=click.FloatRange(0.05), default=2.0, show_default=True, help="Duration of each measurement."
)
@option("--output", "out", aliases=["--out"], type=click.Path(path_type=Path), metavar="FILE.json",
        help="File for all measurements; an .html page is written next to it. [default: tune-TARGET.json]")  # fmt: skip
@FORCE
def command(
    *,
    name: str,
    slo: str,
    max_memory: str | None,
    repository: Path,
    export: Path | None,
    engines: tuple[str, ...],
    precisions: tuple[str, ...],
    data: str | None,
    columns: dict[str, Any],
    max_rows: int,
    budget: str,
    seconds: float,
    out: Path | None,
    reading: Reading,
    force: bool,
) -> Result:
    from deploykit.artifacts import SAMPLES
    from deploykit.bench.rows import read_rows
    from deploykit.errors import ArtifactError, UsageError
    from deploykit.tasks.registry import task_of
    from deploykit.tune.limits import parse_slo
    from deploykit.tune.run import open_subject, tune
    from deploykit.tune.search import Limits
    from deploykit.units import parse_size, parse_time

    memory = parse_size("--max-memory", max_memory) if max_memory is not None else None
    limits = Limits(parse_slo(slo), memory, parse_time("--time", budget))
    out = out or Path(f"tune-{name}.json")
    page = out.with_suffix(".html")
    if out.suffix != ".json":
        raise UsageError(f"--output {out} does not end in .json", f"write it as --output {out}.json")
    subject = open_subject(name, repository, export)
    for path in (out, page):
        if path.exists() and not force:
            raise ArtifactError(f"{path}: already exists", "choose another --output, or pass --force to replace it")
    if data is None:
        if export is None or not (export / SAMPLES).is_file():
            raise UsageError("there are no rows to send", "give --data FILE, or an --export that keeps test rows")
        data = str(export / SAMPLES)
    task = subject.manifest.task
    columns = columns_for(task_of(task), columns)
    texts, _ = read_rows(
        data,
        task,
        columns=columns,
        reading=reading,
        most=max_rows,
        seed=0,
    )
    done = tune(
        subject,
        texts,
        limits,
        engines=engines,
        precisions=precisions,
        seconds=seconds,
        out=out,
        command=RecordedCommand.command_line(),
        say=say,
    )
    chosen, present = (done.record["trials"][done.record[key]] for key in ("chosen", "present"))
    changes = {
        "config": str(subject.config_path) if done.backup else None,
        "backup": str(done.backup) if done.backup else None,
        "version": str(done.added) if done.added else None,
        "recorded": str(done.recorded) if done.recorded else None,
    }
    lines = [_table(done.record), "", *_change_lines(changes, chosen), f"{out}, {page}: written"]
    return {
        **done.record,
        "chosen": chosen,
        "present": present,
        **changes,
        "out": str(out),
        "report": str(page),
    }, "\n".join(lines)


def _table(record: Mapping[str, Any]) -> str:
    rows = []
    for trial in record["trials"]:
        latency = (trial["latency_ms"][figure] for figure in ("p50", "p99"))
        cells = [trial["rate_per_s"], *latency, trial["memory_mb"]]
        texts = (f"{cell:,.1f}" if cell is not None else "-" for cell in cells)
        rows.append([trial["name"], *texts, trial["verdict"]])
    return text_table(["settings", "requests/s", "p50 ms", "p99 ms", "MB", "verdict"], rows, left=(0, 5))


def _change_lines(changes: Mapping[str, str | None], chosen: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each change, with the command that undoes it."""
    if changes["config"]:
        yield f"{changes['config']}: changed (undo: mv {changes['backup']} {changes['config']})"
    if changes["version"]:
        yield f"{changes['version']}: packaged, {chosen['engine']} {chosen['precision']} (undo: rm -r {changes['version']})"
    if changes["recorded"]:
        yield f"{changes['recorded']}: --engine auto is {chosen['engine']} {chosen['precision']} here (undo: rm it)"
    if changes["config"] or changes["version"]:
        yield "restart deploykit serve to use them"
    else:
        yield "the present settings are as good as any that were tried: nothing was changed"
