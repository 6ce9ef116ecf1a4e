"""Train an answerer on questions with contexts and answers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from torch.utils.data import Dataset

from deploykit.bootstrap import Measure, differences
from deploykit.data.noise import noisy_copies
from deploykit.data.sample import evenly
from deploykit.errors import DataError, UsageError
from deploykit.tasks.question_answering.checkpoint import TorchAnswerer, check_model, facts_of
from deploykit.tasks.question_answering.clean import CleaningReport, clean
from deploykit.tasks.question_answering.distill import (
    distillation,
    hidden_teacher,
    logits_of,
    open_teacher,
    stacked,
)
from deploykit.tasks.question_answering.evaluate import found_for
from deploykit.tasks.question_answering.facts import HEAD, QuestionAnswering
from deploykit.tasks.question_answering.metrics import answer_metrics, is_chinese, measure_of
from deploykit.tasks.question_answering.noise import noisy_question
from deploykit.tasks.question_answering.options import QuestionAnsweringOptions
from deploykit.tasks.question_answering.predictor import Answerer
from deploykit.tasks.question_answering.rows import Example, RawRow, read_rows
from deploykit.tasks.question_answering.split import drop_leaks, split, take
from deploykit.tasks.question_answering.windows import EncodedContext, PairTokenizer, Window
from deploykit.training import trainer
from deploykit.training.augmentation import usable_copies
from deploykit.training.checkpoint import load_config, load_for_training, load_tokenizer, max_tokens
from deploykit.training.hidden_states import HiddenTeacher, check_projection
from deploykit.training.losses import Loss, TaughtTrainer, check_dropout, divergence
from deploykit.training.regularization import optimizers
from deploykit.training.rows import Rows, Say
from deploykit.training.student import keep_layers, layer_count
from deploykit.training.trainer import Trained
from deploykit.training.weights import Loaded

_TRIED_EXAMPLES = 8
"""Number of questions that a student's and a teacher's tokens are compared on."""


class QuestionAnsweringStage:
    """One training run, from checking the options to measuring the model."""

    def __init__(self, options: QuestionAnsweringOptions) -> None:
        self._options = options
        self._tokenizer = load_tokenizer(options.origin)
        self._config = config = load_config(options.origin)
        self._kept: list[int] = []
        self._depth = 0
        limit = max_tokens(self._tokenizer, config)
        if options.max_length > limit:
            raise UsageError(
                f"--max-length is {options.max_length}, but {options.origin} takes at most {limit} tokens",
                f"give --max-length {limit} or less",
            )

    def load(self, source: str, split: str, columns: tuple[()] | None) -> tuple[list[RawRow], tuple[()]]:
        """Read the rows; there are no columns to choose."""
        return list(read_rows(source, reading=self._options, split=split)), ()

    def clean(self, raw: Sequence[RawRow]) -> tuple[list[Example], CleaningReport]:
        return clean(raw)

    def check(self, splits: Mapping[str, Sequence[Example]]) -> None:
        if not any(example.answers.text for example in splits["train"]):
            raise DataError(f"{self._options.train}: no usable question has an answer", "see the counts above")

    def drop_leaks(self, train: Sequence[Example], held_out: Sequence[Example]) -> tuple[list[Example], int]:
        return drop_leaks(train, held_out)

    def take(self, rows: Sequence[Example], count: int) -> list[Example]:
        return take(rows, count, self._options.seed)

    def split(
        self, rows: Sequence[Example], *, validation: float, test: float
    ) -> tuple[list[Example], list[Example], list[Example]]:
        """Split by context."""
        return split(rows, validation=validation, test=test, seed=self._options.seed)

    def train(self, rows: Rows[Example, tuple[()]], work: Path, say: Say) -> Trained:
        options = self._options
        loaded = self._model(say)
        model = loaded.model
        answerer = TorchAnswerer(model, self._tokenizer, self._task(model, rows.splits["train"]))
        check_model(answerer, options.origin)
        noisy = self._noisy(rows, say)
        learned = [*rows.splits["train"], *(example for copies in noisy.values() for example in copies)]
        for examples in (learned, rows.splits["validation"], rows.splits["test"]):
            check_room(answerer.tokenizer, examples, answerer.task.doc_stride)
        labelled = label_windows(answerer.tokenizer, learned)
        teacher = taught = None
        if options.teacher is not None:
            teacher = open_teacher(options.teacher, answerer, evenly(rows.splits["train"], _TRIED_EXAMPLES))
            say(f"reading {len(labelled.windows):,} windows with the teacher")
            taught = logits_of(teacher, labelled.windows)
        train_set = LabelledWindows(labelled.windows, labelled.labels, answerer, taught)
        say(
            f"training on {len(learned):,} questions in {len(train_set):,} windows, {labelled.without:,} of "
            f"them without the answer; validating on {len(rows.splits['validation']):,}"
        )
        if options.lora_r:
            model = trainer.with_adapter(model, options, "QUESTION_ANS", loaded.new)
        if options.r_drop:
            check_dropout(model, "add --dropout 0.1")
        hidden = None
        if teacher is not None and options.distill_hidden:
            hidden = hidden_teacher(teacher, model, labelled.windows[0], self._kept, self._depth)
            check_projection(hidden, options.lora_r)
            say(hidden.told())
        answerer = TorchAnswerer(model, self._tokenizer, answerer.task)
        model = _train(answerer, train_set, rows.splits["validation"], options, work, say, hidden)
        if hidden is not None:
            hidden.detach(model)
        say("measuring on the held-out rows")
        task = self._decided(TorchAnswerer(model, self._tokenizer, answerer.task), rows, say)
        metrics, own = _measured(TorchAnswerer(model, self._tokenizer, task), rows)
        if teacher is not None:
            metrics["teacher"], theirs = _measured(teacher, rows)
            if shown := rows.held_out:
                compared = differences(own[shown], theirs[shown], len(rows.splits[shown]))
                metrics["differences"] = {"teacher": compared}
            teacher.close()
        if noisy:
            metrics["augmented"] = {noise: len(copies) for noise, copies in noisy.items()}
        return Trained(task, model, self._tokenizer, metrics)

    def _noisy(self, rows: Rows[Example, tuple[()]], say: Say) -> dict[str, list[Example]]:
        """Return noise -> copies of the training questions with it. Their contexts are not held out, so neither are they."""
        return usable_copies(
            noisy_copies(rows.splits["train"], self._options.augment, self._options.seed, noisy_question),
            lambda copies: (list(copies), 0),
            lambda example: f"{example.origin}: {example.question}",
            say,
        )

    def _model(self, say: Say) -> Loaded:
        options = self._options
        dropouts = options.dropout_config(self._config)
        loaded = load_for_training(options.origin, QuestionAnswering.name, **HEAD, **dropouts)
        if options.student_layers:
            self._depth = layer_count(loaded.model)
            student, self._kept = keep_layers(loaded.model, options.student_layers)
            say(f"the student has the layers {self._kept} of {options.origin}, from 0")
            return dataclasses.replace(loaded, model=student)
        return loaded

    def _task(self, model: Any, train: Sequence[Example]) -> QuestionAnswering:
        options = self._options
        return facts_of(
            self._tokenizer, model,
            max_length=options.max_length, doc_stride=options.doc_stride, max_answer_length=options.max_answer_length,
            whole_words=options.whole_words != "no",
            by_characters=is_chinese([text for example in train for text in example.answers.text]),
        )  # fmt: skip

    def _decided(self, answerer: TorchAnswerer, rows: Rows[Example, tuple[()]], say: Say) -> QuestionAnswering:
        """Return the facts with the two values that are chosen on the validation rows: whole words or not, and the threshold.

        Without them, answers are whole words unless the options say otherwise, and the threshold is 0, as in Hugging Face's
        run_qa.py, where some training rows have no answer.
        """
        validation, task = rows.splits["validation"], answerer.task
        if not validation:
            if all(example.answers.text for example in rows.splits["train"]):
                return task
            say("threshold for no answer, without validation rows: 0")
            return dataclasses.replace(task, no_answer_threshold=0.0)
        forms = [task]
        if self._options.whole_words == "auto":
            forms.append(dataclasses.replace(task, whole_words=False))
        measured = [measure(TorchAnswerer(answerer.model, self._tokenizer, form), validation) for form in forms]
        best = max(range(len(forms)), key=lambda i: (_selected(measured[i]), -i))
        task, metrics = forms[best], measured[best]
        if len(forms) > 1:
            told = ", ".join(f"{'yes' if f.whole_words else 'no'}: {_selected(m):.4f}" for f, m in zip(forms, measured))
            say(f"whole words, chosen by F1 on the validation rows: {told}")
        if "best_f1_threshold" not in metrics:
            return task
        say(f"threshold for no answer, from the validation rows: {metrics['best_f1_threshold']:.2f}")
        return dataclasses.replace(task, no_answer_threshold=metrics["best_f1_threshold"])


@dataclass(frozen=True)
class Labelled:
    """Windows, first and last position of the answer in each, and the number of windows ``without`` it."""

    windows: list[Window]
    labels: list[tuple[int, int]]
    without: int


def check_room(tokenizer: PairTokenizer, examples: Sequence[Example], doc_stride: int) -> None:
    """Raise DataError naming the row of a question that leaves too little of a window for its context."""
    for example in examples:
        question = tokenizer.question(example.question)
        if tokenizer.room(question) > doc_stride:
            continue
        try:
            tokenizer.check(question, tokenizer.context(example.context))
        except DataError as error:
            raise DataError(f"{example.origin}: {error.message}", error.remedy) from None


def label_windows(tokenizer: PairTokenizer, examples: Sequence[Example]) -> Labelled:
    """Cut the windows of each question and label them with its first answer, or with the first token if a window lacks
    it.

    If the tokenizer adds no first token, windows without the answer are left out.
    """
    contexts: dict[str, EncodedContext] = {}
    windows, labels, without = [], [], 0
    for example in examples:
        if example.context not in contexts:
            contexts[example.context] = tokenizer.context(example.context)
        context, question = contexts[example.context], tokenizer.question(example.question)
        tokens = None
        if example.answers.text:
            start = example.answers.answer_start[0]
            tokens = context.tokens_of(start, start + len(example.answers.text[0]))
        for window in tokenizer.windows(question, context):
            if tokens is not None and window.begin <= tokens[0] and tokens[1] < window.end:
                shift = window.at - window.begin
                labels.append((tokens[0] + shift, tokens[1] + shift))
            elif tokenizer.marks_no_answer:
                labels.append((0, 0))
                without += 1
            else:
                continue
            windows.append(window)
    if not windows:
        raise DataError("no window contains an answer", "give a larger --max-length or --doc-stride")
    return Labelled(windows, labels, without)


class LabelledWindows(Dataset):  # type: ignore[misc]
    """A dataset of labelled windows, padded per batch by ``collate``. ``teacher``, float32 [2, tokens] for each window, are start and
    end logits to learn from."""

    def __init__(
        self,
        windows: Sequence[Window],
        labels: Sequence[tuple[int, int]],
        answerer: TorchAnswerer,
        teacher: Sequence[NDArray[np.float32]] | None = None,
    ) -> None:
        self.windows, self.labels, self._task, self._teacher = windows, labels, answerer.task, teacher

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        window = self.windows[row]
        taught = {} if self._teacher is None else {"teacher": self._teacher[row]}
        return {"input_ids": window.ids, "types": window.types, "label": self.labels[row], **taught}

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)

        def tensor(name: str, padding: int) -> torch.Tensor:
            return torch.tensor([[*row[name], *[padding] * (longest - len(row[name]))] for row in rows])

        batch = {
            "input_ids": tensor("input_ids", self._task.pad_token_id),
            "attention_mask": torch.tensor(
                [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
            ),
            "labels": torch.tensor([row["label"] for row in rows]),
        }
        if self._task.token_types:
            batch["token_type_ids"] = tensor("types", 0)
        if self._teacher is not None:
            batch["teacher"] = stacked([row["teacher"] for row in rows])
        return batch


class _Trainer(TaughtTrainer):
    """A Trainer whose evaluation answers the validation questions as the served model will."""

    def __init__(self, *, measure: Callable[[Any], dict[str, float]], **arguments: Any) -> None:
        super().__init__(**arguments)
        self._measure = measure

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return trainer.GroupedByLength(self.args, [len(window.ids) for window in self.train_dataset.windows])

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        training = self.model.training
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self._measure(self.model.eval()).items()}
        self.model.train(training)
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def _train(
    answerer: TorchAnswerer,
    train_set: LabelledWindows,
    validation: Sequence[Example],
    options: QuestionAnsweringOptions,
    work: Path,
    say: Say,
    hidden: HiddenTeacher | None,
) -> Any:
    """Return the model as it was at its best evaluation, if there are any: highest F1, among equals the highest exact
    match."""

    def evaluate(model: Any) -> dict[str, float]:
        metrics = measure(TorchAnswerer(model, answerer.hub_tokenizer, answerer.task), validation)
        return {
            "exact_match": metrics["exact_match"],
            "f1": metrics["f1"],
            "selection": round(_selected(metrics), 4) + 1e-5 * metrics["exact_match"],
        }

    return trainer.run(
        _Trainer(
            measure=evaluate,
            options=options,
            taught=lambda outputs, teacher: distillation(outputs, teacher, options.distill_temperature),
            hidden=hidden,
            model=answerer.model,
            args=trainer.arguments(
                options,
                math.ceil(len(train_set) / options.per_device_train_batch_size),
                work / "trainer",
                per_device_train_batch_size=options.per_device_train_batch_size,
            ),
            train_dataset=train_set,
            eval_dataset=train_set,  # required by Trainer but unused: ``evaluate`` answers the validation questions
            data_collator=train_set.collate,
            loss=_loss(options),
            callbacks=trainer.callbacks(options, work / "tensorboard", say),
            optimizers=optimizers(answerer.model, options),
        )
    )


def _loss(options: QuestionAnsweringOptions) -> Loss:
    def loss(outputs: Any, labels: torch.Tensor, items_of_step: Any, passes: int) -> torch.Tensor:
        # Trainer sums the losses of a step's micro-batches: scale each to its share of the step's mean.
        items = items_of_step if items_of_step is not None else labels.numel() // passes
        total = torch.zeros((), device=labels.device)
        for i, logits in enumerate((outputs["start_logits"].float(), outputs["end_logits"].float())):
            own = functional.cross_entropy(
                logits, labels[:, i], label_smoothing=options.label_smoothing_factor, reduction="sum"
            )
            total = total + (own / 2 + options.r_drop * divergence(*logits.chunk(2)) if passes == 2 else own)
        return total / items

    return loss


def measure(answerer: Answerer, examples: Sequence[Example]) -> dict[str, Any]:
    """Answer questions and compare."""
    return answer_metrics(answerer.task, answerer.find([(e.question, e.context) for e in examples]), examples)


def _measured(answerer: Answerer, rows: Rows[Example, tuple[()]]) -> tuple[dict[str, Any], dict[str, Measure]]:
    """Return the metrics of each held-out split, and the same as functions of the rows' weights."""
    metrics, measures = {}, {}
    for name in ("validation", "test"):
        if examples := rows.splits[name]:
            found = found_for(answerer, [(e.question, e.context) for e in examples], lambda done, of: None)
            metrics[name] = answer_metrics(answerer.task, found, examples)
            measures[name] = measure_of(answerer.task, found, examples)
    return metrics, measures


def _selected(metrics: Mapping[str, Any]) -> float:
    """Return the F1 for comparing models: with the best threshold if some questions have no answer."""
    return float(metrics.get("best_f1", metrics["f1"]))
