"""The stages that write a folder: fine-tune, export, package."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from deploykit.api.model import StrPath
from deploykit.errors import UsageError
from deploykit.runtime.serving_settings import ServingSettings

if TYPE_CHECKING:
    from deploykit.stages.export import Exported
    from deploykit.stages.finetune import Finetuned
    from deploykit.triton.repository import Packaged

Say = Callable[[str], None]
_Options = TypeVar("_Options")


def finetune(
    model: StrPath | None = None,
    *,
    train: StrPath | None = None,
    output_dir: StrPath,
    task: str | None = None,
    validation: StrPath | None = None,
    test: StrPath | None = None,
    force: bool = False,
    restart: bool = False,
    folds: int = 0,
    learning_curve: bool = False,
    processes: int = 1,
    progress: Say | None = None,
    **options: Any,
) -> Finetuned:
    """Fine-tune a Hugging Face checkpoint on labelled rows, and write it to ``output_dir``.

    A run with the same inputs as an earlier one is reused. A killed run is continued, unless ``restart`` is set. With
    ``search=20``, 20 runs are trained, each with other options, and the best one is written.

    Args:
        model: Folder of a checkpoint, or a hub id. None for ``from_config``, which trains a new model.
        train: File of rows, folder of a dataset, or a hub id. With ``qat``, by default the rows of the run ``model``.
        output_dir: Folder to write the checkpoint to.
        task: One of the names that ``deploykit finetune --help`` lists. Default: the first of them.
        validation: Rows for choosing the best step. Default: split off ``train``.
        test: Rows for measuring the result. Default: split off ``train``.
        force: Replace what an earlier run wrote to ``output_dir``.
        restart: Start over instead of continuing a killed run.
        folds: Also cross-validate: train that many times, each time on all folds except one. The result has ``folds``.
        learning_curve: Also train on 10 to 75 % of the rows. The result has ``learning_curve``.
        processes: Number of processes that share each batch.
        progress: Called with each message, a line.
        **options: All other options of ``deploykit finetune``: ``num_train_epochs=1``, ``text_column=("title",
        "body")``.

    Raises:
        UsageError: An option is unknown, out of range, or of another task.
        DataError: The rows cannot be read, or there are too few.
        ArtifactError: ``model`` is not a checkpoint, or ``output_dir`` has other content.
    """
    from deploykit.hyperparameters.options import SearchOptions
    from deploykit.stages.finetune import finetune as run
    from deploykit.stages.finetune_options import make_options
    from deploykit.stages.finetune_processes import check_processes, finetune_together
    from deploykit.stages.repeated_runs import check_repeats, repeat

    names = {field.name for field in dataclasses.fields(SearchOptions)}
    searched = SearchOptions(**{name: value for name, value in options.items() if name in names})
    options = {name: value for name, value in options.items() if name not in names}
    files = {"model": model, "train": train, "validation": validation, "test": test}
    given = {name: str(path) for name, path in files.items() if path is not None}
    named = {"task": task} if task is not None else {}
    chosen = make_options({**given, **named, **{k: v for k, v in options.items() if v is not None}})
    searched.check(chosen)
    check_repeats(chosen, folds, learning_curve, searches=bool(searched.search))
    check_processes(processes, searches=bool(searched.search), repeats=bool(folds or learning_curve))
    out, say = Path(output_dir), progress or _quiet
    if processes > 1:
        return finetune_together(chosen, processes, out, force=force, restart=restart, say=say)
    if searched.search:
        from deploykit.hyperparameters.run import search

        return search(chosen, searched, out, force=force, restart=restart, say=say).best
    done = run(chosen, out, force=force, restart=restart, say=say)
    return repeat(chosen, done, out, folds=folds, curve=learning_curve, say=say)


def export(
    checkpoint: StrPath, output_dir: StrPath, *, force: bool = False, progress: Say | None = None, **options: Any
) -> Exported:
    """Export a checkpoint to ONNX, with ``int8=True`` also calibrated INT8, checked and measured.

    Args:
        checkpoint: Folder of a checkpoint, from ``finetune`` or elsewhere.
        output_dir: Folder to write the export to.
        force: Replace what an earlier run wrote to ``output_dir``.
        progress: Called with each message, a line.
        **options: Fields of ``ExportOptions``, the options of ``deploykit export``: ``int8=True``, ``max_drop=1.0``,
            ``calibration_data="rows.csv"``, ``trt=EngineOptions(gpu="sm_86")``.

    Raises:
        UsageError: An option is unknown or invalid.
        ExportError: A graph differs from PyTorch, or INT8 loses more than ``max_drop`` points. Nothing is written.
    """
    from deploykit.graphs.export_options import ExportOptions
    from deploykit.stages.export import export as run

    chosen = _make(ExportOptions, {k: str(v) if isinstance(v, PathLike) else v for k, v in options.items()})
    return run(Path(checkpoint), Path(output_dir), chosen, force=force, say=progress or _quiet)


def package(
    export: StrPath,
    name: str,
    model_repository: StrPath = "model_repository",
    *,
    engine: str = "auto",
    precision: str = "auto",
    overwrite_config: bool = False,
    stream: bool = True,
    require_signature: StrPath | None = None,
    draft_model: StrPath | None = None,
    **settings: Any,
) -> Packaged:
    """Add an export to a Triton model repository, as the next version of the model ``name``.

    Args:
        export: Folder of an export.
        name: Name of the model, for clients.
        model_repository: Folder of packaged models; made if missing.
        engine: "auto", "tensorrt", "native", "openvino", "onnxruntime" or "cuda".
        precision: "auto" (INT8 if there is one), "int8", "fp16", "bf16" or "fp32".
        overwrite_config: Replace an existing config.pbtxt; by default it is kept.
        stream: Also write NAME_stream, for tasks that have one.
        require_signature: Public key (PEM) that the export must be signed with.
        draft_model: Folder of the export of a smaller language model with the same tokenizer, which guesses tokens.
        **settings: Fields of ``ServingSettings``: ``instances=2``, ``max_batch_size=32``.

    Raises:
        UsageError: A name or a setting is not allowed, or the settings would have no effect because config.pbtxt is
        kept. ArtifactError: The export has no such graph or is not signed, or an existing config.pbtxt does not fit it.
    """
    from deploykit.triton.repository import package as run
    from deploykit.triton.repository import refuse_ignored

    if settings and not overwrite_config:
        refuse_ignored(Path(model_repository) / name, next(iter(settings)))
    return run(
        Path(export),
        name,
        Path(model_repository),
        engine=engine,
        precision=precision,
        settings=_make(ServingSettings, settings) if settings else None,
        overwrite_config=overwrite_config,
        stream=stream,
        require_signature=None if require_signature is None else Path(require_signature),
        draft_model=None if draft_model is None else Path(draft_model),
    )


def _make(kind: type[_Options], given: Mapping[str, Any]) -> _Options:
    """Return a dataclass of options. Raises UsageError for one that it does not have."""
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in given:
        if name not in known:
            raise UsageError(f"unknown option {name!r}", f"known: {', '.join(known)}")
    return kind(**given)


def _quiet(message: str) -> None:
    """Print nothing."""
