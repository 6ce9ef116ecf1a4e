"""Fine-tune a checkpoint on rows. The steps are the same for every task."""

from __future__ import annotations

import dataclasses
import glob
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from deploykit import artifacts
from deploykit.data.read import check_file
from deploykit.errors import ArtifactError, MissingDependencyError, UsageError
from deploykit.locks import lock
from deploykit.stages import model_card
from deploykit.stages.finetune_options import ROWS
from deploykit.tasks.registry import get_task
from deploykit.training import processes
from deploykit.training.options import FinetuneOptions, write_toml
from deploykit.training.recipe import GIVEN, Recipe, recipe_lines, recipe_of
from deploykit.training.rows import Columns, Raw, Row, Rows, RowSource, Say, named_paths, read_rows, write_splits
from deploykit.training.source import check_source, refuse_adapter

if TYPE_CHECKING:
    from deploykit.training.trainer import Trained, Watch


class Stage(RowSource[Raw, Row, Columns], Protocol[Raw, Row, Columns]):
    """The part of fine-tuning that a task implements: reading rows, and training."""

    def train(self, rows: Rows[Row, Columns], work: Path, say: Say) -> Trained:
        """Train and measure. Files that a resumed run needs, such as checkpoints, go to ``work``."""


@dataclass(frozen=True)
class Finetuned:
    """The checkpoint at ``path``; ``reused`` if it already existed, made from the same inputs.

    ``manifest.metrics`` has the metrics of the held-out rows under "test", or "validation" where there are no test rows;
    neither if no rows were held out. ``folds`` and ``learning_curve`` are what ``cross_validate`` and ``learning_curve``
    of ``deploykit.stages.repeated_runs`` return, if they were asked for.
    """

    path: Path
    manifest: artifacts.Manifest
    reused: bool
    folds: Mapping[str, Any] | None = None
    learning_curve: Mapping[str, Any] | None = None


def finetune(
    options: FinetuneOptions,
    out: Path,
    *,
    force: bool = False,
    restart: bool = False,
    say: Say,
    watch: Watch | None = None,
) -> Finetuned:
    """Read, clean, split, train, measure, and write the checkpoint to ``out``.

    A killed run continues when it is started again with the same options, unless ``restart`` is set. ``watch`` is
    called after each evaluation, and may raise to end the run.
    """
    options.check()
    _check_machine(options)
    files = file_digests(options)
    inputs = _inputs_of(out, as_chosen_before(options, out), files)
    if (manifest := artifacts.existing(out, "checkpoint", inputs, force=force)) is not None:
        return Finetuned(out, manifest, reused=True)
    # These imports take seconds, so they happen only when there is something to train.
    from deploykit.training.checkpoint import quiet

    quiet()
    if not processes.is_first():
        say = _silent
    stage = get_task(options.task).training_stage(options)
    return _run(stage, options, out, files, restart=restart, say=say, watch=watch)


def _silent(line: str) -> None:
    """Print nothing: only the first of several processes prints."""


def _check_machine(options: FinetuneOptions) -> None:
    """Raise an error for a model or options that cannot be trained on this machine, before the slow imports."""
    if processes.count() > 1 and not options.shares_batches:
        raise UsageError(f"--task {options.task} trains in one process", "leave out --processes, or the launcher")
    if options.mixed_precision == "fp16":
        import torch

        if not torch.cuda.is_available():
            raise UsageError("--mixed-precision fp16 needs a GPU", "use bf16, or leave it out")
    if options.model is not None:
        check_source(options.model, options.task)
        # One trained on top of an adapter would not fit the base that the adapter names.
        refuse_adapter(Path(options.model))


def _run(
    stage: Stage[Raw, Row, Columns],
    options: FinetuneOptions,
    out: Path,
    files: Mapping[str, Sequence[str]],
    *,
    restart: bool,
    say: Say,
    watch: Watch | None,
) -> Finetuned:
    from transformers import set_seed

    from deploykit.training.interruption import interruptible
    from deploykit.training.trainer import watched

    rows = read_rows(stage, options, say)
    options, chosen = completed(stage, options, rows)
    recipe = recipe_of(options, chosen)
    for line in recipe_lines(recipe):
        say(line)
    inputs = inputs_digest(options, files)
    with _work_directory(out, inputs, restart=restart, say=say) as work:
        set_seed(options.seed)
        with watched(watch), interruptible(work, say):
            trained = stage.train(rows, work, say)
        counts = {name: len(examples) for name, examples in rows.splits.items()}
        cleaning = {name: report.to_json() for name, report in rows.cleaning.items()}
        with artifacts.new_directory(out) as directory:
            trained.model.save_pretrained(directory)
            # Peft writes its own card, with the base model's local path as a hub id.
            (directory / "README.md").unlink(missing_ok=True)
            trained.tokenizer.save_pretrained(directory)
            if trained.scales is not None:
                trained.scales.save(directory)
            write_toml(options, directory / "finetune.toml")
            shutil.copytree(work / "tensorboard", directory / "tensorboard")
            if trained.write_page is not None:
                try:
                    trained.write_page(directory)
                except MissingDependencyError as error:
                    say(f"the run has no page: {error.message}: {error.remedy}")
            write_splits(directory / "splits", rows.splits)
            (directory / "metrics.json").write_text(
                json.dumps(trained.metrics, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
            )
            (directory / "README.md").write_text(
                model_card.render(trained.task, options, counts, cleaning, trained.metrics), encoding="utf-8"
            )
            manifest = artifacts.write_manifest(
                directory,
                "checkpoint",
                trained.task,
                inputs=inputs,
                options=dataclasses.asdict(options),
                metrics={
                    "rows": counts,
                    "cleaning": cleaning,
                    "leaks_dropped": rows.leaks,
                    "recipe": {name: dataclasses.asdict(choice) for name, choice in recipe.items()},
                    **trained.metrics,
                },
            )
        shutil.rmtree(work)
    return Finetuned(out, manifest, reused=False)


def completed(stage: Any, options: FinetuneOptions, rows: Rows[Row, Columns]) -> tuple[FinetuneOptions, Recipe]:
    """Return the options with the values that the run chooses, and the chosen ones."""
    found: tuple[FinetuneOptions, Recipe] = stage.complete(rows) if options.unset else (options, {})
    return found


def as_chosen_before(options: FinetuneOptions, out: Path) -> FinetuneOptions:
    """Return the options with the values that the run at ``out`` has chosen, if it exists."""
    if not options.unset or not (out / artifacts.MANIFEST).is_file():
        return options
    try:
        manifest = artifacts.load_manifest(out, "checkpoint", verify=False)
    except ArtifactError:
        return options
    recipe = manifest.metrics.get("recipe", {})
    found = {
        name: recipe[name]["value"] for name in options.unset if recipe.get(name, {}).get("reason", GIVEN) != GIVEN
    }
    if "num_train_epochs" in options.unset and options.max_steps and recipe:
        # Steps replace epochs, so the recipe has none; the run chose them all the same.
        found["num_train_epochs"] = manifest.options["num_train_epochs"]
    return dataclasses.replace(options, **found)


def file_digests(options: FinetuneOptions) -> Mapping[str, Sequence[str]]:
    """Return option -> the digests of the files of rows that it names on this machine."""
    named = {name: getattr(options, name, None) for name in ROWS}
    several = {name: [one] if isinstance(one, str) else one for name, one in named.items() if one}
    for source in chain(*several.values()):
        if not named_paths(source):
            check_file(source)
    found = {name: [path for source in sources for path in named_paths(source)] for name, sources in several.items()}
    return {name: [artifacts.digest_path(path) for path in paths] for name, paths in found.items() if paths}


def inputs_digest(options: FinetuneOptions, files: Mapping[str, Sequence[str]]) -> str:
    """Return a digest of everything that determines the run: options, and the contents of the ``files`` they name."""
    return artifacts.digest_of("finetune", {**dataclasses.asdict(options), **files})


def _inputs_of(out: Path, options: FinetuneOptions, files: Mapping[str, Sequence[str]]) -> str:
    """Return the digest that the version of deploykit which made the run at ``out`` gives to these inputs.

    It did not know the options that were added since: they do not count if they have their defaults.
    """
    inputs = inputs_digest(options, files)
    try:
        manifest = artifacts.load_manifest(out, "checkpoint", verify=False)
    except ArtifactError:
        return inputs
    values = dataclasses.asdict(options)
    new = {
        field.name
        for field in dataclasses.fields(options)
        if field.name not in manifest.options and values[field.name] == field.default
    }
    left_out = [new]
    if None not in manifest.options.values():
        # Earlier manifests have no options of None: each of them may be new.
        certain = {name for name in new if values[name] is not None}
        left_out = [certain, *(certain | {name} for name in new - certain)]
    found = (
        artifacts.digest_of("finetune", {**{k: v for k, v in values.items() if k not in names}, **files})
        for names in left_out
    )
    return next((digest for digest in found if digest == manifest.inputs), inputs)


@contextmanager
def _work_directory(out: Path, inputs: str, *, restart: bool, say: Say) -> Iterator[Path]:
    """Yield the folder for checkpoints of an unfinished run, next to ``out``, one for each set of inputs."""
    work = out.absolute().with_name(f".{out.name}.{inputs[:12]}.training")
    with processes.first_alone(), artifacts.explained(work):
        if restart and processes.is_first():
            shutil.rmtree(work, ignore_errors=True)
        continued = (work / "trainer").exists() and any((work / "trainer").glob("checkpoint-*"))
        work.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(work / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        if processes.is_first() and not lock(descriptor, wait=False):
            os.close(descriptor)
            raise ArtifactError(
                f"{out}: another deploykit process is training it", "wait for it, or choose another --output-dir"
            )
    try:
        if continued:
            say(f"continuing the unfinished run in {work} (--restart starts over)")
        for other in sorted(work.parent.glob(f".{glob.escape(out.name)}.*.training")):
            if other != work and next(other.glob("trainer/checkpoint-*"), None):
                say(
                    f"{other}: is an unfinished run of other options or rows, or of another version of deploykit; it is not "
                    "continued, and can be removed"
                )
        with artifacts.explained(work):
            yield work
    finally:
        os.close(descriptor)
