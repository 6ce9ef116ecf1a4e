from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from deploykit.cli.common import ENGINE, PRECISION, Result, deploykit_command, human_bytes
from deploykit.errors import UsageError
from deploykit.runtime.serving_settings import ServingSettings

_DEFAULT = ServingSettings()


@deploykit_command(help="Write an export as the next version of a Triton model.")
@click.argument("export", type=click.Path(path_type=Path))
@click.option("--name", required=True, help="Of the model, as clients will call it.")
@click.option("--repository", type=click.Path(path_type=Path), default=Path("model_repository"), show_default=True)
@ENGINE
@PRECISION
@click.option("--instances", type=int, help="Processes of the model. [default: 2; 1 for translation]")
@click.option("--threads", type=int, help="CPU threads of each instance; 0: twice the CPUs, shared. [default: 0]")
@click.option("--max-batch-size", type=int, help=f"Most rows of one batch. [default: {_DEFAULT.max_batch_size}]")
@click.option("--max-queue-size", type=int,
              help=f"Requests (translation: sentences) that may wait; more are refused. [default: {_DEFAULT.max_queue_size}]")  # fmt: skip
@click.option("--preferred-batch-size", type=int,
              help="Of more rows that wait, so many are one batch. [default: all, up to --max-batch-size]")  # fmt: skip
@click.option("--max-queue-delay-us", type=int, help="Microseconds to wait for a fuller batch. [default: 0]")
@click.option("--max-rows", type=int, help=f"[translation] Texts x beams of one step. [default: {_DEFAULT.max_rows}]")
@click.option("--max-cache-mb", type=int,
              help=f"[translation] Memory of their keys and values. [default: {_DEFAULT.max_cache_mb}]")  # fmt: skip
@click.option("--long-input", type=click.Choice(["split", "refuse"]),
              help="[translation] Texts longer than the model takes. [default: split]")  # fmt: skip
@click.option("--split", type=click.Choice(["sentence", "paragraph", "none"]),
              help="[translation] What is translated one by one: sentences, lines, or whole texts. [default: sentence]")  # fmt: skip
@click.option("--in-flight/--no-in-flight", default=None,
              help="[translation] Texts join while others are decoded. [default: in-flight]")  # fmt: skip
@click.option("--no-stream", is_flag=True, help="[translation] Do not write NAME_stream.")
@click.option("--overwrite-config", is_flag=True, help="Write config.pbtxt anew; otherwise an existing one is kept.")
def command(
    *,
    export: Path,
    name: str,
    repository: Path,
    engine: str,
    precision: str,
    overwrite_config: bool,
    no_stream: bool,
    **settings: Any,
) -> Result:
    from deploykit.triton.repository import CONFIG, container_command, package

    given = {key: value for key, value in settings.items() if value is not None}
    if given and (repository / name / CONFIG).exists() and not overwrite_config:
        raise UsageError(
            f"{repository / name / CONFIG} exists and is kept, so --{next(iter(given)).replace('_', '-')} would do nothing",
            "edit that file, or pass --overwrite-config",
        )
    done = package(
        export,
        name,
        repository,
        engine=engine,
        precision=precision,
        settings=ServingSettings(**given),
        overwrite_config=overwrite_config,
        stream=not no_stream,
    )
    size = sum(record.bytes for record in done.manifest.files.values())
    options = done.manifest.options
    text = (
        f"{done.path}: {'reused, made before from the same export' if done.reused else 'written'} "
        f"({options['engine']}, {options['precision']}, {human_bytes(size)})"
        f"\n{repository / name / CONFIG}: {'kept as it was' if done.config_kept else 'written'}"
    )
    record: dict[str, Any] = {
        "path": str(done.path),
        "name": name,
        "version": done.version,
        "reused": done.reused,
        **options,
    }
    if (container := container_command(done)) is not None:
        record["container"] = container
        text += f"\nto serve it in NVIDIA's container: {container}"
    return {**record, "config_kept": done.config_kept, "size_bytes": size, "digest": done.manifest.digest}, text
