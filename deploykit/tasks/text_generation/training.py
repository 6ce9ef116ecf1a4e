"""Fine-tune a language model on dialogs and texts."""

from __future__ import annotations

import dataclasses
import json
import random
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.data.noise import noisy_copies
from deploykit.errors import DataError, UsageError
from deploykit.freed_memory import keep_memory
from deploykit.tasks.text_generation.adapter import read_adapter
from deploykit.tasks.text_generation.chat_template import read_template
from deploykit.tasks.text_generation.checkpoint import (
    TorchGenerator,
    chat_tokenizer,
    checkpoint_facts,
    load_base,
    load_base_config,
    load_base_tokenizer,
    set_template,
)
from deploykit.tasks.text_generation.clean_rows import (
    CleaningReport,
    clean_rows,
    drop_leaks,
    length_bins,
    show_row,
    split_rows,
)
from deploykit.tasks.text_generation.distill import Teacher, check_teacher
from deploykit.tasks.text_generation.encode import EncodedRow, fit
from deploykit.tasks.text_generation.evaluate import EvaluationRows, Measured, ask, measure_rows, room_for
from deploykit.tasks.text_generation.four_bit import check_four_bit
from deploykit.tasks.text_generation.generator import RowScore
from deploykit.tasks.text_generation.noise import noisy_prompt
from deploykit.tasks.text_generation.options import DEFAULT_LENGTH, TextGenerationOptions
from deploykit.tasks.text_generation.page import FILE, write_run_page
from deploykit.tasks.text_generation.rows import Columns, RawRow, Row, load_rows
from deploykit.tasks.text_generation.sft import SampleAnswers, shortened, train
from deploykit.training import processes
from deploykit.training.augmentation import usable_copies
from deploykit.training.recipe import ChosenValue, Recipe
from deploykit.training.rows import Rows, Say
from deploykit.training.student import keep_layers
from deploykit.training.trainer import Trained

_SAMPLES = 5
_ANSWERED = 3
"""Number of prompts that are answered at each evaluation."""


class TextGenerationStage:
    """One run, from the checks that need no rows to the measured model.

    ``hf_tokenizer`` has the chat template of the run; ``facts`` are those of the checkpoint that is trained.
    """

    def __init__(self, options: TextGenerationOptions) -> None:
        self._options = options
        if options.load_in_4bit:
            check_four_bit()
        config, generation = load_base_config(options.origin)
        self._dropouts = options.dropout_config(config)
        self.hf_tokenizer = load_base_tokenizer(options.origin)
        self._added = []
        if options.chat_template is not None:
            template = read_template(options.chat_template)
            self._added = set_template(self.hf_tokenizer, template, self._eos(), needed=False)
        if options.init_adapter is not None:
            read_adapter(options)
        if self._added and options.adapts:
            raise UsageError(
                f"the chat template adds tokens ({', '.join(self._added)}), whose embeddings a LoRA adapter does not train",
                "train all weights (--lora-r 0), or give --chat-template alpaca",
            )
        self.facts = checkpoint_facts(config, generation, self.hf_tokenizer)
        self._tokenizer = chat_tokenizer(self.hf_tokenizer, self.facts.eos_token_ids)
        self._max_length = options.max_length or min(DEFAULT_LENGTH, self.facts.max_length)
        if self._max_length > self.facts.max_length:
            raise UsageError(
                f"--max-length is {self._max_length}, but {options.origin} takes at most {self.facts.max_length} tokens",
                f"give --max-length {self.facts.max_length} or less",
            )
        if options.teacher is not None:
            check_teacher(options.teacher, self.hf_tokenizer, self.facts, self._max_length)

    def complete(self, _: object) -> tuple[TextGenerationOptions, Recipe]:
        """Choose the length if the user did not set it. Returns all options, and the chosen ones."""
        length = ChosenValue(self._max_length, f"{DEFAULT_LENGTH:,}, or the model's context if that is shorter")
        return dataclasses.replace(self._options, max_length=self._max_length), {"max_length": length}

    def load(self, source: str, split: str, columns: Columns | None) -> tuple[list[RawRow], Columns]:
        options = self._options
        raw, found = load_rows(
            source, prompt_column=options.prompt_column, completion_column=options.completion_column, prefer=columns,
            reading=options, split=split,
        )  # fmt: skip
        # An error of the checkpoint or the template must not count as an error of the rows.
        dialogs = any(item.row.messages for item in raw)
        set_template(self.hf_tokenizer, None, self._eos(), needed=dialogs)
        return raw, found

    def clean(self, raw: Sequence[RawRow]) -> tuple[list[Row], CleaningReport]:
        options = self._options
        return clean_rows(
            raw, self._tokenizer, max_length=self._max_length, on_long=options.long_rows, loss_on=options.supervised
        )

    def check(self, splits: Mapping[str, Sequence[Row]]) -> None:
        if not splits["train"]:
            raise DataError(f"{self._options.train}: no usable rows", "see the counts above for why they were dropped")

    def drop_leaks(self, train: Sequence[Row], held_out: Sequence[Row]) -> tuple[list[Row], int]:
        return drop_leaks(train, held_out)

    def take(self, rows: Sequence[Row], count: int) -> list[Row]:
        return random.Random(self._options.seed).sample(list(rows), count)

    def split(self, rows: Sequence[Row], *, validation: float, test: float) -> tuple[list[Row], list[Row], list[Row]]:
        most = self._options.held_out_rows / len(rows)
        return split_rows(rows, validation=min(validation, most), test=min(test, most), seed=self._options.seed)

    def train(self, rows: Rows[Row, Columns], work: Path, say: Say) -> Trained:
        options = self._options
        columns = rows.columns
        say(f"format: {columns.told()}")
        noisy = self._noisy(rows, say)
        train_set = self.encoded([*rows.splits["train"], *(row for copies in noisy.values() for row in copies)])
        for row in train_set[: options.show_rows]:
            say(f"a row as the model reads it, with supervised tokens in ⟦ ⟧:\n{show_row(self._tokenizer, row)}")
        if rewritten := sum(row.rewritten for row in train_set):
            say(
                f"{rewritten:,} answers of earlier turns are not supervised: the chat template rewrites them in later turns"
            )
        if joined := sum(row.joined for row in train_set):
            say(
                f"warning: in {joined:,} rows the first token of an answer begins in the prompt, and is not learned: change "
                "the chat template so that the prompt ends with a special token or a line break, not with a space"
            )
        keep_memory()  # each token that is answered copies the caches of all rows
        model = load_base(options.origin, **self._dropouts)
        self._fit_vocabulary(model)
        tokenizer = self.hf_tokenizer
        facts = checkpoint_facts(
            model.config, model.generation_config, tokenizer, (columns.format, columns.prompt, columns.completion)
        )
        model.generation_config.eos_token_id = list(facts.eos_token_ids)
        model.generation_config.pad_token_id = facts.pad_token_id
        generator = TorchGenerator(model, tokenizer, facts)
        shown = rows.held_out
        asked = {
            name: ask(self._tokenizer, rows.splits[name], self.facts.max_length)[0] for name in ("validation", "test")
        }
        if shown and not asked[shown].rows:
            raise DataError(
                f"no {shown} row fits the model's context of {self.facts.max_length:,} tokens",
                "give other held-out rows",
            )
        measured = shown and processes.is_first()
        came = "the checkpoint as it came"
        before = self._measured(generator, asked[shown], work / "before.json", came, say) if measured else None
        teacher = taught = None
        if options.teacher is not None:
            if options.teacher == options.model:
                taught = before
            teacher = Teacher(load_base(options.teacher), options.distill_alpha, options.distill_temperature)
            if measured and taught is None:
                generator = TorchGenerator(teacher.model, tokenizer, facts)
                taught = self._measured(generator, asked[shown], work / "teacher.json", "the teacher", say)
        if options.student_layers:
            model, kept = keep_layers(model, options.student_layers)
            say(f"the student has the layers {kept} of {options.origin}, from 0")
        validation = self.encoded(rows.splits["validation"])
        if not train_set or (rows.splits["validation"] and not validation):
            raise DataError("no row with a supervised token is left to train or to validate on", "raise --max-length")
        say(
            f"training on {len(train_set):,} rows, {sum(len(row.ids) for row in train_set):,} tokens an epoch, "
            f"{sum(int(row.supervised.sum()) for row in train_set):,} supervised; validating on {len(validation):,}"
        )
        questions = asked["validation"].some(_ANSWERED)
        with_answers = [row for row in questions.rows if row.text is None]
        while_training = SampleAnswers(
            [row.prompt for row in with_answers],
            lambda model: self._answers(TorchGenerator(model, tokenizer, facts), questions),
            work / "answers.json",
            say,
        )
        model, history = train(model, train_set, validation, facts, options, work, say, while_training, teacher)
        generator = TorchGenerator(model, tokenizer, facts)
        say("measuring on the held-out rows")
        metrics: dict[str, Any] = {}
        after: dict[str, Measured] = {}
        for name in ("validation", "test"):
            if asked[name].rows:
                after[name] = self._evaluated(generator, asked[name])
                metrics[name] = after[name].metrics()
        metrics["differences"] = {
            name: _differences(after[shown], other)
            for name, other in (("before", before), ("teacher", taught))
            if other is not None
        }
        metrics["history"] = history
        metrics["questions"] = [{"prompt": row.prompt, "reference": row.answer} for row in with_answers]
        metrics["lengths"] = length_bins([len(row.ids) for row in train_set])
        if noisy:
            metrics["augmented"] = {noise: len(copies) for noise, copies in noisy.items()}
        metrics["samples"] = []
        if taught is not None:
            metrics["teacher"] = {shown: taught["metrics"]}
        if before is not None:
            metrics["before"] = {shown: before["metrics"]}
            metrics["samples"] = _samples(after[shown], before["answers"])
        title = f"{Path(options.origin).name}, fine-tuned"
        return Trained(
            facts, model, tokenizer, metrics, write_page=lambda run: write_run_page(title, metrics, run / FILE)
        )

    def _noisy(self, rows: Rows[Row, Columns], say: Say) -> dict[str, list[Row]]:
        """Return noise -> copies of the training rows with it in the prompts; none of them has the prompt of a held-out row."""
        options = self._options
        if options.augment and not any(row.messages for row in rows.splits["train"]):
            raise UsageError("--augment adds noise to prompts, and plain texts have none", "leave it out")
        held_out = [*rows.splits["validation"], *rows.splits["test"]]
        return usable_copies(
            noisy_copies(rows.splits["train"], options.augment, options.seed, noisy_prompt),
            lambda copies: drop_leaks(copies, held_out),
            lambda row: f"{row.origin}: {shortened(row.prompt)}",
            say,
        )

    def encoded(self, rows: Sequence[Row]) -> list[EncodedRow]:
        """Return rows as token ids, those that are too long handled as the options say."""
        options = self._options
        encoded = (self._tokenizer.encode_row(row, options.supervised) for row in rows)
        return [part for row in encoded for part in fit(row, self._max_length, options.long_rows)]

    def _eos(self) -> list[int]:
        return [] if self.hf_tokenizer.eos_token_id is None else [self.hf_tokenizer.eos_token_id]

    def _fit_vocabulary(self, model: Any) -> None:
        """Make room for the tokens that the chat template added: new rows are drawn about the mean of the others."""
        if self._added and len(self.hf_tokenizer) > model.get_input_embeddings().weight.shape[0]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.resize_token_embeddings(len(self.hf_tokenizer), mean_resizing=True)

    def _evaluated(self, generator: TorchGenerator, asked: EvaluationRows) -> Measured:
        sampling = dataclasses.replace(self.facts.sampling, max_new_tokens=room_for(self._tokenizer, asked))
        options = self._options
        measured, refused = measure_rows(
            generator,
            asked,
            sampling,
            answer_regex=options.answer_regex,
            syntax=options.syntax,
            answered=options.eval_rows,
        )
        if refused:  # two models are compared on the same rows
            raise DataError(refused[0], "leave the row out, or start from another checkpoint")
        return measured

    def _answers(self, generator: TorchGenerator, asked: EvaluationRows) -> list[str]:
        sampling = dataclasses.replace(self.facts.sampling, max_new_tokens=room_for(self._tokenizer, asked))
        return [found.text for [found] in generator.generate(asked.prompts, sampling)]

    def _measured(
        self, generator: TorchGenerator, asked: EvaluationRows, kept: Path, what: str, say: Say
    ) -> dict[str, Any]:
        """Measure a model before training. A resumed run reads the result from ``kept``."""
        if kept.is_file():
            record: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
            if "scores" in record:  # an older version kept none
                return record
        say(f"measuring {what}")
        measured = self._evaluated(generator, asked)
        record = {
            "metrics": measured.metrics(),
            "answers": [answer.text for answer in measured.answers],
            "scores": [[score.logprobs.tolist(), score.best.tolist()] for score in measured.scores],
        }
        kept.write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
        return record


def _differences(after: Measured, other: Mapping[str, Any]) -> dict[str, Any]:
    """Compare with a model that ``_measured`` measured."""
    return after.differences([RowScore(*map(np.array, score)) for score in other["scores"]], other["answers"])


def _samples(after: Measured, before: Sequence[str]) -> list[dict[str, str]]:
    """Return some held-out rows, evenly over their order, with what the model answers."""
    rows = [row for row in after.some.rows if row.text is None]
    shown = range(0, len(rows), max(1, len(rows) // _SAMPLES))[:_SAMPLES]
    return [
        {"prompt": rows[i].prompt, "reference": rows[i].answer, "before": before[i], "answer": after.answers[i].text}
        for i in shown
    ]
