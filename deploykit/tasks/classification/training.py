"""Train a text classifier on labelled rows."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deploykit.bootstrap import differences
from deploykit.data.noise import BACK_TRANSLATION, parse_noise
from deploykit.data.sample import evenly
from deploykit.errors import DataError, UsageError
from deploykit.tasks.classification.augment import augmented, rewriters
from deploykit.tasks.classification.checkpoint import TorchClassifier, check_separates, labels_of, task_of
from deploykit.tasks.classification.clean import CleaningReport, clean
from deploykit.tasks.classification.distill import Teacher, hidden_teacher
from deploykit.tasks.classification.evaluate import LabelledRows, answer_rows
from deploykit.tasks.classification.facts import Classification
from deploykit.tasks.classification.fitting import EncodedTexts, fit
from deploykit.tasks.classification.inspection.confidence import fit_temperature
from deploykit.tasks.classification.options import ClassificationOptions
from deploykit.tasks.classification.recipe import Facts, choose, kind_of
from deploykit.tasks.classification.resampling import measure_of, metrics_with_intervals
from deploykit.tasks.classification.rows import (
    Columns,
    Example,
    RawExample,
    check_labels,
    check_numbers,
    label_parts,
    load_examples,
    sort_labels,
    validate,
)
from deploykit.tasks.classification.split import drop_leaks, split
from deploykit.tasks.classification.trainable import trainable
from deploykit.tasks.classification.unusual_labels import label_doubts, refuse_lone_labels
from deploykit.training import processes, trainer
from deploykit.training.augmentation import usable_copies
from deploykit.training.checkpoint import load_config, load_for_training, load_tokenizer, max_tokens, pad_token_id
from deploykit.training.hidden_states import check_projection
from deploykit.training.losses import check_dropout
from deploykit.training.recipe import ChosenValue, Recipe
from deploykit.training.rows import Rows, Say
from deploykit.training.student import keep_layers, layer_count
from deploykit.training.trainer import Trained

Answered = tuple[NDArray[Any], NDArray[np.float32]]
"""Truth and scores of rows."""
_LOG = logging.getLogger(__name__)
_CALIBRATION_ROWS = 512
_TRIED_TEXTS = 8
_MEASURED_ROWS = 2000
"""Number of training rows whose lengths are measured."""
_MANY_CONFLICTS = 0.1
_MANY_CUT = 0.02


class ClassificationStage:
    """One run, from the checks that need no rows to the measured model."""

    def __init__(self, options: ClassificationOptions) -> None:
        self._options = options
        self.tokenizer = load_tokenizer(options.origin)
        self._config = config = load_config(options.origin)
        self._head = trained_labels(config)
        self._kept: list[int] = []
        self._depth = 0
        self._known_labels = {*self._head, *options.named_labels}
        self._limit = limit = max_tokens(self.tokenizer, config)
        if options.max_length > limit:
            raise UsageError(
                f"--max-length is {options.max_length}, but {options.origin} takes at most {limit} tokens",
                f"give --max-length {limit} or less",
            )
        if options.pair:
            check_separates(self.tokenizer, options.origin)
        if options.qat:
            self._trained_for = task_of(Path(options.origin), self.tokenizer, config)
            if self._trained_for.multi_label != options.multi_label:
                raise UsageError(
                    f"{options.origin} gives {'any number of labels' if self._trained_for.multi_label else 'one label'} a text",
                    f"{'add' if self._trained_for.multi_label else 'leave out'} --multi-label",
                )

    def load(self, source: str, split: str, columns: Columns | None) -> tuple[list[RawExample], Columns]:
        options = self._options
        raw, found = load_examples(
            source,
            text_columns=columns.text if columns else options.text_column,
            label_columns=columns.labels if columns else options.label_column,
            separator=options.text_separator or " ",
            pair=options.pair,
            multi_label=options.multi_label,
            labels=options.label_order,
            known=None if options.regression else self._known_labels,
            label_separator=options.label_separator,
            reading=options,
            split=split,
        )
        if columns is None:  # the training rows
            self._known_labels |= {
                n for row in raw if row.label for n in label_parts(row.label, multi_label=options.multi_label)
            }
            if not options.multi_label and not options.regression:
                given = [row.label for row in raw if row.label]
                if not options.label_order:
                    refuse_lone_labels(given, source, found.labels)
                for doubt in label_doubts(given):
                    _LOG.warning("%s: %s", source, doubt)
        return raw, found

    def clean(self, raw: Sequence[RawExample]) -> tuple[list[Example], CleaningReport]:
        kept, report = clean(raw, multi_label=self._options.multi_label)
        if report.conflicting_duplicates > _MANY_CONFLICTS * report.rows_read:
            _LOG.warning(
                "%d of %d rows have the text of another row with another label; if a text may have several, give --multi-label",
                report.conflicting_duplicates, report.rows_read,
            )  # fmt: skip
        return kept, report

    def check(self, splits: Mapping[str, Sequence[Example]]) -> None:
        multi_label = self._options.multi_label
        validate(splits["train"], self._options.train, multi_label=multi_label)
        if self._options.regression:
            for name, rows in splits.items():
                check_numbers(rows, str(getattr(self._options, name)))
            return
        if self._options.qat:
            known = self._trained_for.labels
            if unknown := set(label_names(splits["train"], multi_label=multi_label)) - set(known):
                raise DataError(
                    f"{self._options.train}: labels that {self._options.origin} does not give: "
                    f"{', '.join(map(repr, sort_labels(unknown)))}; it gives {', '.join(map(repr, known))}",
                    "--qat continues the training of a classifier of these labels: fine-tune it without --qat first",
                )
        labels = label_names(splits["train"], multi_label=multi_label)
        if named := self._options.named_labels:
            check_labels(splits["train"], named, f"{self._options.train}, --labels", multi_label=multi_label)
            labels = named
        for name in ("validation", "test"):
            check_labels(splits[name], labels, str(getattr(self._options, name)), multi_label=multi_label)

    def drop_leaks(self, train: Sequence[Example], held_out: Sequence[Example]) -> tuple[list[Example], int]:
        return drop_leaks(train, held_out)

    def take(self, rows: Sequence[Example], count: int) -> list[Example]:
        return self.split(rows, validation=count / len(rows), test=0)[1][:count]

    def split(
        self, rows: Sequence[Example], *, validation: float, test: float
    ) -> tuple[list[Example], list[Example], list[Example]]:
        """Split rows, stratified by label; numbers by tenths of the rows."""
        options = self._options
        banded = by_tenths(rows) if options.regression else rows
        own = {id(banded_row): row for banded_row, row in zip(banded, rows)}
        parts = split(banded, validation=validation, test=test, seed=options.seed, multi_label=options.multi_label)
        train, validated, tested = (
            [own[id(row)] for row in part] for part in (parts.train, parts.validation, parts.test)
        )
        return train, validated, tested

    def complete(self, rows: Rows[Example, Columns]) -> tuple[ClassificationOptions, Recipe]:
        """Choose the options that the user did not set. Returns all options, and the chosen ones."""
        options = self._options
        chosen: dict[str, ChosenValue] = {}
        if options.unset:
            choices = choose(
                self._facts(rows), batch=options.per_device_train_batch_size,
                accumulation=options.gradient_accumulation_steps, epochs=options.num_train_epochs, max_steps=options.max_steps,
            )  # fmt: skip
            chosen = {name: choices[name] for name in options.unset}
            if options.qat and "max_length" in chosen:
                chosen["max_length"] = ChosenValue(self._trained_for.max_length, "as the checkpoint was trained")
            if options.warmup_ratio == choices["warmup_ratio"].value:
                chosen["warmup_ratio"] = choices["warmup_ratio"]
            values = {name: choice.value for name, choice in chosen.items()}
            self._options = dataclasses.replace(options, **values)
        return self._options, chosen

    def _facts(self, rows: Rows[Example, Columns]) -> Facts:
        options, train, config = self._options, rows.splits["train"], self._config.get_text_config()
        task = dataclasses.replace(self.task(rows), max_length=self._limit)
        texts = [example.asked for example in evenly(train, _MEASURED_ROWS)]
        return Facts(
            kind=kind_of(self._config),
            hidden=getattr(config, "hidden_size", None) or config.d_model,
            limit=self._limit,
            rows=int(len(train) * (1 + sum(map(copies, options.augment)))),
            lengths=[len(ids) for ids in TorchClassifier(None, self.tokenizer, task).encode(texts).ids],
            adapter=bool(options.lora_r),
            rounded=options.qat,
            processes=processes.count(),
        )

    def train(self, rows: Rows[Example, Columns], work: Path, say: Say) -> Trained:
        self.complete(rows)
        classifier = self._classifier(self.task(rows), say)
        model, task = classifier.model, classifier.task
        noisy = self._augmented(rows, work, say)
        training_rows = [*rows.splits["train"], *(row for copies in noisy.values() for row in copies)]
        teacher = None if self._options.teacher is None else Teacher(self._options.teacher, task)
        encoded = {
            name: EncodedTexts(
                classifier.encode([e.asked for e in examples]), task.targets([e.label for e in examples]), task,
                teacher.logits([e.asked for e in examples]) if teacher is not None and name == "train" else None,
            )
            for name, examples in {**rows.splits, "train": training_rows}.items()
            if examples
        }  # fmt: skip
        say(f"training on {len(encoded['train']):,} rows, validating on {len(rows.splits['validation']):,}")
        full = sum(len(ids) >= task.max_length for ids in encoded["train"].encoded.ids)
        if full > _MANY_CUT * len(encoded["train"]):
            say(f"{full:,} texts have {task.max_length} tokens or more: what is beyond is not read (--max-length)")
        if self._options.qat:
            return self._train_rounded(classifier, rows, encoded, work, say)
        if self._options.r_drop:
            check_dropout(model, "add --dropout 0.1")
        hidden = None
        if teacher is not None and self._options.distill_hidden:
            texts = [row.asked for row in evenly(rows.splits["train"], _TRIED_TEXTS)]
            hidden = hidden_teacher(teacher.checkpoint(), classifier, texts, self._kept, self._depth)
            check_projection(hidden, self._options.lora_r)
            say(hidden.told())
        model = fit(model, encoded["train"], encoded.get("validation"), self._options, work, say, hidden)
        if hidden is not None:
            hidden.detach(model)
        if self._options.temperature_scaling:
            found = answer_rows(TorchClassifier(model, self.tokenizer, task), LabelledRows(rows.splits["validation"]))
            task = dataclasses.replace(task, temperature=fit_temperature(task, found.truth, found.scores))
            say(f"temperature of the logits: {task.temperature:g}")
        say("measuring on the held-out rows")
        student = TorchClassifier(model, self.tokenizer, task)
        own = _scored(task, student, rows)
        metrics = _metrics_of(task, own)
        if teacher is not None:
            taught = _scored(task, teacher, rows)
            metrics["teacher"] = _metrics_of(task, taught)
            if shown := rows.held_out:
                ours, theirs = (measure_of(task, *found[shown]) for found in (own, taught))
                metrics["differences"] = {"teacher": differences(ours, theirs, len(rows.splits[shown]))}
            teacher.close()
        if noisy:
            metrics["augmented"] = {noise: len(copies) for noise, copies in noisy.items()}
        return Trained(task, model, self.tokenizer, metrics)

    def _augmented(self, rows: Rows[Example, Columns], work: Path, say: Say) -> dict[str, list[Example]]:
        """Return noise -> copies of the training rows with it; none of them has the text of a held-out row."""
        options = self._options
        held_out = [*rows.splits["validation"], *rows.splits["test"]]
        with rewriters(options, work, say) as known:
            found = augmented(rows.splits["train"], options.augment, options.seed, known)
        return usable_copies(
            found,
            lambda copies: drop_leaks(copies, held_out),
            lambda row: f"{row.origin}: {row.text}{'' if row.text_pair is None else f' | {row.text_pair}'}",
            say,
        )

    def _train_rounded(
        self,
        classifier: TorchClassifier,
        rows: Rows[Example, Columns],
        encoded: Mapping[str, EncodedTexts],
        work: Path,
        say: Say,
    ) -> Trained:
        """Train with linear layers rounded to INT8. ``metrics["qat"]`` has before and after, each fp32 and rounded."""
        from deploykit.training.qat import FakeQuantization

        options, task = self._options, classifier.task
        held_out = rows.held_out
        before = {"fp32": _metrics(task, classifier, rows.splits[held_out])}
        token_ids = evenly(encoded["train"].encoded.ids, _CALIBRATION_ROWS)
        say(f"calibrating on {len(token_ids):,} rows ({options.qat_method})")
        rounded = FakeQuantization(classifier.model, token_ids, options.qat_method)
        before["int8"] = _metrics(task, classifier, rows.splits[held_out])
        model = fit(classifier.model, encoded["train"], encoded.get("validation"), options, work, say)
        say("measuring on the held-out rows")
        classifier = TorchClassifier(model, self.tokenizer, task)
        int8 = _metrics(task, classifier, rows.splits[held_out])
        scales = rounded.remove()
        metrics = _metrics_of(task, _scored(task, classifier, rows))
        metrics["qat"] = {"before": before, "after": {"fp32": metrics[held_out], "int8": int8}}
        return Trained(task, model, self.tokenizer, metrics, scales)

    def task(self, rows: Rows[Example, Columns]) -> Classification:
        options = self._options
        if options.qat:
            return dataclasses.replace(self._trained_for, max_length=self._options.max_length)
        labels = options.named_labels or label_names(rows.splits["train"], multi_label=options.multi_label)
        if options.regression:
            labels = rows.columns.labels
        return Classification(
            labels=labels if options.label_order else kept_order(labels, self._head) or labels,
            regression=options.regression,
            max_length=self._options.max_length,
            pad_token_id=pad_token_id(self.tokenizer),
            multi_label=options.multi_label,
            text_columns=rows.columns.text,
            text_separator=options.text_separator or " ",
            pair=options.pair,
            label_column=rows.columns.labels if len(rows.columns.labels) > 1 else rows.columns.labels[0],
            label_separator=options.label_separator,
        )

    def _classifier(self, task: Classification, say: Say) -> TorchClassifier:
        """Load the checkpoint with a head for the labels: its own where it has one for them, in its order."""
        options = self._options
        config: dict[str, Any] = dict(task.model_config)
        config["pad_token_id"] = task.pad_token_id
        config |= options.dropout_config(self._config)
        loaded = load_for_training(options.origin, **config)
        model = loaded.model
        if options.student_layers:
            self._depth = layer_count(model)
            model, self._kept = keep_layers(model, options.student_layers)
            say(f"the student has the layers {self._kept} of {options.origin}, from 0")
        new = set(loaded.new)
        if (
            self._head
            and not (task.regression and len(self._head) == 1)
            and kept_order(task.labels, self._head) != task.labels
        ):
            say(
                f"the head of {options.origin} answers {', '.join(self._head)}; it is replaced by a new head, for "
                f"{', '.join(task.labels)}"
            )
            new |= _initialize_head(model)
        classifier = trainable(TorchClassifier(model, self.tokenizer, task), options.origin)
        if options.lora_r:
            classifier.model = trainer.with_adapter(model, options, "SEQ_CLS", new)
        return classifier


def copies(noise: str) -> float:
    """Return the share of the rows that a noise makes copies of."""
    name, rate = parse_noise(noise)
    return rate if name == BACK_TRANSLATION else 1.0


def by_tenths(rows: Sequence[Example]) -> list[Example]:
    """Return rows with the tenth of the rows that their number falls in for a label."""
    numbers = np.array([float(row.label) for row in rows])
    tenths = np.searchsorted(np.quantile(numbers, np.arange(0.1, 1, 0.1)), numbers)
    return [dataclasses.replace(row, label=str(tenth)) for row, tenth in zip(rows, tenths)]


def trained_labels(config: Any) -> tuple[str, ...]:
    """Return the labels of a checkpoint's trained head, in the order of its outputs; () without a head."""
    if not any(str(name).endswith("ForSequenceClassification") for name in config.architectures or ()):
        return ()
    return labels_of(config)


def kept_order(labels: Sequence[str], head: Sequence[str]) -> tuple[str, ...] | None:
    """Return ``labels`` in the order of a trained head with the same labels, else None.

    A head with default names (LABEL_0, LABEL_1) stands for the labels 0 and 1.
    """
    if list(head) == [f"LABEL_{i}" for i in range(len(head))] and set(labels) == {str(i) for i in range(len(head))}:
        return tuple(str(i) for i in range(len(head)))
    return tuple(head) if sorted(labels) == sorted(head) else None


def _initialize_head(model: Any) -> set[str]:
    """Initialize all weights after the model's encoder again, and return their keys."""
    keys = set()
    for name, part in model.named_children():
        if name != model.base_model_prefix:
            keys |= {f"{name}.{key}" for key in part.state_dict()}
            for parameter in part.parameters():
                parameter._is_hf_initialized = False  # transformers leaves loaded weights alone
            for module in part.modules():
                module._is_hf_initialized = False
            with torch.no_grad():
                for module in part.modules():
                    model._init_weights(module)
    return keys


def label_names(examples: Sequence[Example], *, multi_label: bool) -> tuple[str, ...]:
    """Return every label that occurs, in the order of the model's outputs."""
    return sort_labels({name for e in examples for name in label_parts(e.label, multi_label=multi_label)})


def _metrics(task: Classification, model: TorchClassifier | Teacher, examples: Sequence[Example]) -> dict[str, Any]:
    return metrics_with_intervals(task, *_answered(task, model, examples))


def _metrics_of(task: Classification, scored: Mapping[str, Answered]) -> dict[str, Any]:
    return {name: metrics_with_intervals(task, *found) for name, found in scored.items()}


def _scored(
    task: Classification, model: TorchClassifier | Teacher, rows: Rows[Example, Columns]
) -> dict[str, Answered]:
    """Return the truth and the scores of each split of held-out rows."""
    return {name: _answered(task, model, split) for name in ("validation", "test") if (split := rows.splits[name])}


def _answered(task: Classification, model: TorchClassifier | Teacher, examples: Sequence[Example]) -> Answered:
    return task.targets([e.label for e in examples]), model.scores([e.asked for e in examples])
