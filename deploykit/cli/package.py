from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from deploykit.cli_parts.command import Result, deploykit_command, human_bytes, option
from deploykit.cli_parts.shared_options import (
    DRAFT_MODEL,
    ENGINE,
    LONG_INPUT_HELP,
    MODEL_REPOSITORY,
    NAME_HELP,
    PRECISION,
    REQUIRE_SIGNATURE,
    SPLIT_HELP,
)
from deploykit.runtime.serving_settings import ServingSettings

_DEFAULT = ServingSettings()


@deploykit_command(help="Write the export TARGET to a model repository, as the next version of a Triton model.")
@click.argument("export", metavar="TARGET", type=click.Path(path_type=Path))
@click.option("--name", required=True, help=NAME_HELP)
@MODEL_REPOSITORY
@ENGINE
@PRECISION
@click.option(
    "--instances", type=int, help="Number of model processes. [default: 2; 1 for translation and text generation]"
)
@option(
    "--instance-threads",
    "threads",
    aliases=["--threads"],
    type=int,
    help="CPU threads per instance; 0: the instances share twice the CPUs. [default: 0]",
)
@click.option("--max-batch-size", type=int, help=f"Maximum rows of a batch. [default: {_DEFAULT.max_batch_size}]")
@click.option("--max-queue-size", type=int,
              help=f"Maximum waiting requests (translation: sentences); further ones are refused. [default: {_DEFAULT.max_queue_size}]")  # fmt: skip
@click.option("--preferred-batch-size", type=int,
              help="Batch size when more rows are waiting. [default: all, up to --max-batch-size]")  # fmt: skip
@click.option("--max-queue-delay-us", type=int, help="Maximum wait for a fuller batch, in microseconds. [default: 0]")
@option(
    "--max-num-seqs",
    "max_rows",
    aliases=["--max-rows"],
    type=int,
    help=f"[translation, text generation] Maximum rows (texts x beams, answers) of a decode step. [default: {_DEFAULT.max_rows}]",
)
@click.option("--max-cache-mb", type=int,
              help=f"[translation, text generation] Maximum memory of the key-value caches, in MiB. [default: {_DEFAULT.max_cache_mb}]")  # fmt: skip
@click.option("--long-input", type=click.Choice(["split", "refuse"]), show_default="split", help=LONG_INPUT_HELP)
@click.option("--split", type=click.Choice(["sentence", "paragraph", "none"]), show_default="sentence",
              help=SPLIT_HELP)  # fmt: skip
@click.option("--in-flight/--no-in-flight", default=None,
              help="[translation] Let requests join the running batch, or wait until it is done. [default: in-flight]")  # fmt: skip
@click.option("--no-stream", is_flag=True, help="[translation] Do not write NAME_stream.")
@DRAFT_MODEL
@click.option("--kubernetes", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
              help="Also write Kubernetes manifests, a Helm chart and KServe's resources for NVIDIA's container to DIR.")  # fmt: skip
@REQUIRE_SIGNATURE
@click.option("--overwrite-config", is_flag=True, help="Replace an existing config.pbtxt. [default: keep it]")
def command(
    *,
    export: Path,
    name: str,
    repository: Path,
    engine: str,
    precision: str,
    overwrite_config: bool,
    no_stream: bool,
    draft_model: str | None,
    kubernetes: Path | None,
    require_signature: Path | None,
    **settings: Any,
) -> Result:
    from deploykit.triton.repository import CONFIG, container_command, package, refuse_ignored

    given = {key: value for key, value in settings.items() if value is not None}
    if given and not overwrite_config:
        refuse_ignored(repository / name, _option_of(next(iter(given))))
    done = package(
        export,
        name,
        repository,
        engine=engine,
        precision=precision,
        settings=ServingSettings(**given),
        overwrite_config=overwrite_config,
        stream=not no_stream,
        require_signature=require_signature,
        draft_model=None if draft_model is None else Path(draft_model),
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
    if kubernetes is not None:
        from deploykit.triton.kubernetes import write_kubernetes

        write_kubernetes(f"deploykit-{name}", kubernetes, gpus=1 if "container" in record else 0)
        record["kubernetes"] = str(kubernetes)
        text += f"\n{kubernetes}: manifests (kubectl apply -k {kubernetes}), a Helm chart ({kubernetes}/chart), KServe resources ({kubernetes}/kserve)"
    return {**record, "config_kept": done.config_kept, "size_bytes": size, "digest": done.manifest.digest}, text


def _option_of(setting: str) -> str:
    """Return the name of the option that sets ``setting``."""
    parameters = click.get_current_context().command.params
    return next(parameter.opts[0] for parameter in parameters if parameter.name == setting)
