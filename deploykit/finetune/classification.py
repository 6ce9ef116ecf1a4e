"""Fine-tune a text classifier: rows in, checkpoint out."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from deploykit import artifacts
from deploykit.data.classification import (
    Columns,
    Example,
    check_labels,
    label_parts,
    load_examples,
    sort_labels,
    validate,
)
from deploykit.data.clean import CleaningReport, clean
from deploykit.data.split import drop_leaks, split
from deploykit.errors import ArtifactError, DataError, UsageError
from deploykit.finetune import model_card
from deploykit.finetune.checkpoint import (
    TorchClassifier,
    label_config,
    load_model,
    load_tokenizer,
    max_tokens,
    pad_token_id,
    quiet,
)
from deploykit.finetune.options import FinetuneOptions, write_toml
from deploykit.finetune.trainer import EncodedTexts, train
from deploykit.metrics import classification_metrics
from deploykit.tasks import Classification

Say = Callable[[str], None]


@dataclass(frozen=True)
class Finetuned:
    """What a run left at ``out``; ``reused`` when equal inputs had made it before."""

    out: Path
    manifest: artifacts.Manifest
    reused: bool


@dataclass(frozen=True)
class Rows:
    """Cleaned rows by split, where they came from, and what cleaning did to them."""

    columns: Columns
    splits: dict[str, list[Example]]
    cleaning: dict[str, CleaningReport]
    leaks: int


def finetune(options: FinetuneOptions, out: Path, *, force: bool = False, restart: bool = False, say: Say) -> Finetuned:
    """Read, clean, split, train, measure, and write the checkpoint to ``out``.

    A run that was killed is continued when it is started again with the same options, unless
    ``restart`` is set.
    """
    options.check()
    quiet()
    tokenizer = load_tokenizer(options.model)
    inputs = _digest(options)
    if (manifest := artifacts.existing(out, "checkpoint", inputs, force=force)) is not None:
        return Finetuned(out, manifest, reused=True)
    rows = _read(options, say)
    task = _task(options, rows, tokenizer)
    with _work_directory(out, inputs, restart=restart, say=say) as work:
        set_seed(options.seed)
        model = _model(options, task)
        reference = TorchClassifier(model, tokenizer, task)
        encoded = {
            name: EncodedTexts(
                reference.encode([e.text for e in examples]), task.targets([e.label for e in examples]), task
            )
            for name, examples in rows.splits.items()
            if examples
        }
        say(f"training on {len(encoded['train']):,} rows, validating on {len(encoded['validation']):,}")
        trained = train(model, encoded["train"], encoded["validation"], options, work / "trainer", work / "tensorboard")
        classifier = TorchClassifier(trained.to("cpu").float().eval(), tokenizer, task)
        metrics = {
            name: _metrics(classifier, rows.splits[name]) for name in ("validation", "test") if rows.splits[name]
        }
        with artifacts.new_directory(out) as directory:
            trained.save_pretrained(directory)
            if options.lora_rank:
                # Peft writes a card of its own, with the base model's local path as an id of the hub.
                (directory / "README.md").unlink(missing_ok=True)
            tokenizer.save_pretrained(directory)
            write_toml(options, directory / "finetune.toml")
            shutil.copytree(work / "tensorboard", directory / "tensorboard")
            _write_splits(directory / "splits", rows.splits)
            (directory / "metrics.json").write_text(
                json.dumps(metrics, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
            )
            counts = {name: len(examples) for name, examples in rows.splits.items()}
            cleaning = {name: report.to_json() for name, report in rows.cleaning.items()}
            (directory / "README.md").write_text(
                model_card.render(task, options, counts, cleaning, metrics), encoding="utf-8"
            )
            manifest = artifacts.write_manifest(
                directory,
                "checkpoint",
                task,
                inputs=inputs,
                options={k: v for k, v in dataclasses.asdict(options).items() if v is not None},
                metrics={"rows": counts, "cleaning": cleaning, "leaks_dropped": rows.leaks, **metrics},
            )
        shutil.rmtree(work)
    return Finetuned(out, manifest, reused=False)


def read_split(checkpoint: Path, name: str) -> list[Example]:
    """The rows of one of the run's own splits. Raises DataError when the run kept no such rows."""
    path = checkpoint / "splits" / f"{name}.jsonl"
    if not path.is_file():
        raise DataError(f"{checkpoint}: has no {name} rows", "name a file of labelled rows instead")
    with path.open(encoding="utf-8") as lines:
        return [Example(**json.loads(line)) for line in lines]


def _read(options: FinetuneOptions, say: Say) -> Rows:
    splits: dict[str, list[Example]] = {"train": [], "validation": [], "test": []}
    cleaning: dict[str, CleaningReport] = {}
    columns: Columns | None = None
    for name in splits:
        source = getattr(options, name)
        if source is None:
            continue
        raw, columns = load_examples(
            source,
            text_columns=columns.text if columns else options.text_column,
            label_column=columns.label if columns else options.label_column,
            separator=options.text_separator,
            multi_label=options.multi_label,
            encoding=options.encoding,
            split=name if source == options.train and name != "train" else "train",
        )
        splits[name], cleaning[name] = clean(raw, multi_label=options.multi_label)
        say(f"{name}: {source}")
        for line in cleaning[name].lines():
            say(f"  {line}")
    assert columns is not None
    train_rows = splits["train"]
    validate(train_rows, options.train, multi_label=options.multi_label)
    labels = label_names(train_rows, multi_label=options.multi_label)
    for name in ("validation", "test"):
        source = getattr(options, name)
        if source is not None and not splits[name]:
            raise DataError(f"{source}: no usable rows are left after cleaning", "see the counts above")
        check_labels(splits[name], labels, str(source), multi_label=options.multi_label)
    train_rows, leaks = drop_leaks(train_rows, splits["validation"] + splits["test"])
    if leaks:
        say(f"  - {leaks:,} training rows dropped: the same text is in --validation or --test")
        if not train_rows:
            raise DataError(
                f"{options.train}: every row is also in --validation or --test", "give other rows to train on"
            )
    if options.max_rows and len(train_rows) > options.max_rows:
        kept = split(
            train_rows,
            validation=options.max_rows / len(train_rows),
            test=0,
            seed=options.seed,
            multi_label=options.multi_label,
        )
        train_rows = list(kept.validation)
        say(f"  {len(train_rows):,} of them are used (--max-rows), stratified")
    parts = split(
        train_rows,
        validation=0 if splits["validation"] else options.validation_fraction,
        test=0 if splits["test"] else options.test_fraction,
        seed=options.seed,
        multi_label=options.multi_label,
    )
    splits = {
        "train": list(parts.train),
        "validation": splits["validation"] or list(parts.validation),
        "test": splits["test"] or list(parts.test),
    }
    say("splits: " + ", ".join(f"{name} {len(examples):,}" for name, examples in splits.items()))
    return Rows(columns, splits, cleaning, leaks)


def label_names(examples: Sequence[Example], *, multi_label: bool) -> tuple[str, ...]:
    """Every label that occurs, in the order of the model's outputs."""
    return sort_labels({name for e in examples for name in label_parts(e.label, multi_label=multi_label)})


def _task(options: FinetuneOptions, rows: Rows, tokenizer: Any) -> Classification:
    from transformers import AutoConfig

    limit = max_tokens(tokenizer, AutoConfig.from_pretrained(options.model, trust_remote_code=False))
    if options.max_length > limit:
        raise UsageError(
            f"--max-length is {options.max_length}, but {options.model} takes at most {limit} tokens",
            f"give --max-length {limit} or less",
        )
    return Classification(
        labels=label_names(rows.splits["train"], multi_label=options.multi_label),
        max_length=options.max_length,
        pad_token_id=pad_token_id(tokenizer),
        multi_label=options.multi_label,
        text_columns=rows.columns.text,
        text_separator=options.text_separator,
        label_column=rows.columns.label,
    )


def _model(options: FinetuneOptions, task: Classification) -> torch.nn.Module:
    config: dict[str, Any] = label_config(task)
    config["pad_token_id"] = task.pad_token_id
    if options.dropout is not None:
        config |= dict.fromkeys(("hidden_dropout_prob", "dropout", "classifier_dropout"), options.dropout)
    model: torch.nn.Module = load_model(options.model, **config)
    if options.lora_rank:
        from peft import LoraConfig, TaskType, get_peft_model

        adapter = LoraConfig(
            task_type=TaskType.SEQ_CLS,
            r=options.lora_rank,
            lora_alpha=options.lora_alpha,
            lora_dropout=0.05,
            target_modules="all-linear",
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft and transformers about each other's next release
            model = get_peft_model(model, adapter)
    return model


def _metrics(classifier: TorchClassifier, examples: Sequence[Example]) -> dict[str, Any]:
    truth = classifier.task.targets([e.label for e in examples])
    return classification_metrics(classifier.task, truth, classifier.scores([e.text for e in examples]))


def _write_splits(folder: Path, splits: dict[str, list[Example]]) -> None:
    folder.mkdir()
    for name, examples in splits.items():
        if examples:
            lines = (json.dumps(dataclasses.asdict(e), ensure_ascii=False) for e in examples)
            (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _digest(options: FinetuneOptions) -> str:
    """Everything that determines the run: options, and the contents of the files they name."""
    values = dataclasses.asdict(options)
    for name in ("model", "train", "validation", "test"):
        path = Path(values[name] or "")
        if values[name] and path.exists():
            values[name] = artifacts.digest_path(path)
    return artifacts.digest_of("finetune", values)


@contextmanager
def _work_directory(out: Path, inputs: str, *, restart: bool, say: Say) -> Iterator[Path]:
    """Where a run keeps its training checkpoints until it is done: beside ``out``, one for each set of inputs."""
    work = out.absolute().with_name(f".{out.name}.{inputs[:12]}.training")
    with artifacts.explained(work):
        if restart:
            shutil.rmtree(work, ignore_errors=True)
        continued = (work / "trainer").exists() and any((work / "trainer").glob("checkpoint-*"))
        work.mkdir(parents=True, exist_ok=True)
        lock = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ArtifactError(
            f"{out}: another deploykit is training it now", "wait for it, or choose another --out"
        ) from None
    try:
        if continued:
            say(f"continuing the unfinished run in {work} (--restart begins anew)")
        with artifacts.explained(work):
            yield work
    finally:
        os.close(lock)
