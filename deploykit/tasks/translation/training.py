"""Train an encoder-decoder on pairs of texts."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deploykit import artifacts
from deploykit.bootstrap import differences
from deploykit.data.noise import noisy_copies
from deploykit.errors import DataError, UsageError
from deploykit.tasks.translation.checkpoint import TorchTranslator, translation_task
from deploykit.tasks.translation.facts import Translation
from deploykit.tasks.translation.generation_config import generation_config
from deploykit.tasks.translation.metrics import measure_of, metrics_with_intervals
from deploykit.tasks.translation.new_marian import POSITIONS, new_marian
from deploykit.tasks.translation.noise import noisy_pair
from deploykit.tasks.translation.options import TranslationOptions
from deploykit.tasks.translation.presets import PRESETS
from deploykit.tasks.translation.rows import (
    Pair,
    PairCleaningReport,
    PairColumns,
    RawPair,
    clean_pairs,
    drop_pair_leaks,
    load_pairs,
    split_pairs,
)
from deploykit.tasks.translation.source_prefix import cut_code
from deploykit.tasks.translation.teacher import open_teacher
from deploykit.tasks.translation.token_batches import EncodedPairs, train_model
from deploykit.tasks.translation.vocabulary import train_tokenizer
from deploykit.training import processes, trainer
from deploykit.training.augmentation import usable_copies
from deploykit.training.checkpoint import check_vocabulary, load_config, load_model, load_tokenizer, not_loadable
from deploykit.training.rows import Rows, Say
from deploykit.training.source import check_family
from deploykit.training.student import Side, keep_layers, layer_count
from deploykit.training.trainer import Trained
from deploykit.training.weights import read_generation_config

_SAMPLES = 5


class TranslationStage:
    """One training run, from checking the options to measuring the model."""

    def __init__(self, options: TranslationOptions) -> None:
        self._options = options
        if options.model is None:
            if options.max_length > POSITIONS:
                raise UsageError(
                    f"--max-length is {options.max_length}, but {options.origin} takes at most {POSITIONS} tokens",
                    f"give --max-length {POSITIONS} or less",
                )
            return
        self._tokenizer = load_tokenizer(options.model, fast=False)
        self._task = checkpoint_task(options, self._tokenizer)
        limit = min(self._task.max_source_length, self._task.max_target_length - 1)
        if options.max_length > limit:
            raise UsageError(
                f"--max-length is {options.max_length}, but {options.origin} takes at most {limit} tokens",
                f"give --max-length {limit} or less",
            )

    def load(self, source: str, split: str, columns: PairColumns | None) -> tuple[list[RawPair], PairColumns]:
        options = self._options
        return load_pairs(
            source,
            source=options.source_lang,
            target=options.target_lang,
            source_column=options.source_column,
            target_column=options.target_column,
            prefer=columns,
            reading=options,
            split=split,
        )

    def clean(self, raw: Sequence[RawPair]) -> tuple[list[Pair], PairCleaningReport]:
        return clean_pairs(raw, source=self._options.source_lang, target=self._options.target_lang)

    def check(self, splits: Mapping[str, Sequence[Pair]]) -> None:
        if not splits["train"]:
            raise DataError(f"{self._options.train}: no usable rows", "give rows that have a source and a target")
        if self._options.model is None:
            return
        for pair in (pair for rows in splits.values() for pair in rows):
            try:
                cut_code(pair.source, self._task)
            except DataError as error:
                raise DataError(f"{pair.origin}: the source {error.message}", error.remedy) from error

    def drop_leaks(self, train: Sequence[Pair], held_out: Sequence[Pair]) -> tuple[list[Pair], int]:
        return drop_pair_leaks(train, held_out)

    def take(self, rows: Sequence[Pair], count: int) -> list[Pair]:
        return random.Random(self._options.seed).sample(list(rows), count)

    def split(
        self, rows: Sequence[Pair], *, validation: float, test: float
    ) -> tuple[list[Pair], list[Pair], list[Pair]]:
        most = self._options.held_out_rows / len(rows)
        train, validation_rows, test_rows = split_pairs(
            rows, validation=min(validation, most), test=min(test, most), seed=self._options.seed
        )
        return list(train), list(validation_rows), list(test_rows)

    def train(self, rows: Rows[Pair, PairColumns], work: Path, say: Say) -> Trained:
        options = self._options
        learned: Sequence[Pair] = rows.splits["train"]
        taught: dict[str, Any] = {}
        answers: dict[str, list[str]] = {}
        if options.teacher is not None:
            learned, taught, answers = self._taught(rows, work, say)
        noisy = self._noisy(rows, learned, say)
        learned = [*learned, *(pair for copies in noisy.values() for pair in copies)]
        model, tokenizer, task = (
            self._from_checkpoint() if options.model is not None else self._from_config(learned, say)
        )
        task = dataclasses.replace(task, source_column=rows.columns.source, target_column=rows.columns.target)
        translator = TorchTranslator(model, tokenizer, task)
        shown = rows.held_out
        before = None
        if options.model and shown and processes.is_first():
            before = _before(translator, rows.splits[shown], work / "before.json", say)
        self._keep_layers(translator, say)
        train_set = EncodedPairs(translator, learned, max_length=options.max_length)
        if left_out := len(learned) - len(train_set):
            say(f"  - {left_out:,} training rows left out: longer than --max-length {options.max_length}")
        if not len(train_set):
            raise DataError(f"{options.train}: every row is longer than --max-length", "raise --max-length")
        validation = rows.splits["validation"][: options.eval_rows]
        say(f"training on {len(train_set):,} rows, validating on {len(validation):,}")
        model = train_model(translator, train_set, validation, options, work, say)
        say("translating the held-out rows")
        after = {name: _translations(translator, rows.splits[name]) for name in ("validation", "test")}
        metrics: dict[str, Any] = {
            name: _metrics(translations, rows.splits[name], task.target)
            for name, translations in after.items()
            if translations
        }
        if before is not None:
            metrics["before"] = {shown: _metrics(before, rows.splits[shown], task.target)}
        metrics |= taught
        if noisy:
            metrics["augmented"] = {noise: len(copies) for noise, copies in noisy.items()}
        others = {"before": before, "teacher": answers.get(shown)}
        metrics["differences"] = {
            name: _difference(after[shown], other, rows.splits[shown], task.target)
            for name, other in others.items()
            if other is not None
        }
        metrics["samples"] = _samples(rows.splits[shown], after[shown], before) if shown else []
        return Trained(task, model, tokenizer, metrics)

    def _noisy(self, rows: Rows[Pair, PairColumns], learned: Sequence[Pair], say: Say) -> dict[str, list[Pair]]:
        """Return noise -> copies of the training pairs with it; none of them has the source of a held-out pair."""
        held_out = [*rows.splits["validation"], *rows.splits["test"]]
        return usable_copies(
            noisy_copies(learned, self._options.augment, self._options.seed, noisy_pair),
            lambda copies: drop_pair_leaks(copies, held_out),
            lambda pair: f"{pair.origin}: {pair.source}",
            say,
        )

    def _taught(
        self, rows: Rows[Pair, PairColumns], work: Path, say: Say
    ) -> tuple[list[Pair], dict[str, dict[str, Any]], dict[str, list[str]]]:
        """Return the training pairs with the teacher's targets, and its metrics and translations of the held-out rows."""
        options = self._options
        with open_teacher(options, work, say) as teacher:
            learned, counts = teacher.taught(rows.splits["train"], join=options.distill_targets == "join")
            say(
                f"of {len(rows.splits['train']):,} training rows {counts['taught']:,} have the teacher's target"
                f"{' too' if options.distill_targets == 'join' else ''}, {counts['same']:,} the same as before, and "
                f"{counts['untranslated']:,} their own: the teacher has none, or one without an end"
            )
            learned, leaks = drop_pair_leaks(learned, [*rows.splits["validation"], *rows.splits["test"]])
            if leaks:
                say(f"  - {leaks:,} of them dropped: the teacher's target is that of a held-out row")
            counts["leaks"] = leaks
            answers = {
                name: [answer or "" for answer in teacher.translations(name, pairs)]
                for name, pairs in rows.splits.items()
                if name != "train" and pairs
            }
        metrics = {name: _metrics(found, rows.splits[name], options.target_lang) for name, found in answers.items()}
        return learned, {"distilled": counts, "teacher": metrics}, answers

    def _keep_layers(self, translator: TorchTranslator, say: Say) -> None:
        """Remove the layers that the student does not have."""
        options, model = self._options, translator.model
        wanted: dict[Side, int] = {"encoder": options.student_layers, "decoder": options.student_layers}
        if any(count and layer_count(model, side) > count for side, count in wanted.items()):
            wanted = {side: count if layer_count(model, side) > count else 0 for side, count in wanted.items()}
        if options.student_decoder_layers:
            wanted["decoder"] = options.student_decoder_layers
        for side, count in wanted.items():
            if count:
                translator.model, kept = keep_layers(translator.model, count, side)
                say(f"the student's {side} has the layers {kept} of {options.origin}, from 0")

    def _from_checkpoint(self) -> tuple[Any, Any, Translation]:
        """Load the checkpoint, set up for ``options``."""
        options, task = self._options, self._task
        if task.family in ("t5", "mt5"):  # one rate for all
            if options.attention_dropout is not None:
                raise UsageError(f"a {task.family} has only one dropout", "give --dropout")
            config = {} if options.dropout is None else {"dropout_rate": options.dropout}
        else:
            config = options.dropout_config(load_config(options.origin))
        assert options.model is not None
        model = load_model(options.model, Translation.name, **config)
        check_vocabulary(model, self._tokenizer, options.origin, but=self._tokenizer.pad_token)
        model.generation_config = generation_config(task, task.generation)
        if options.lora_r:
            model = trainer.with_adapter(model, options, "SEQ_2_SEQ_LM")
        return model, self._tokenizer, task

    def _from_config(self, train: Sequence[Pair], say: Say) -> tuple[Any, Any, Translation]:
        """Create a MarianMT model and its vocabulary."""
        options = self._options
        assert options.from_config is not None
        tokenizer = train_tokenizer(
            [pair.source for pair in train],
            [pair.target for pair in train],
            languages=(options.source_lang, options.target_lang),
            size=options.vocabulary,
            max_length=options.max_length,
        )
        model = new_marian(PRESETS[options.from_config], tokenizer, options)
        say(f"new: {model.num_parameters():,} parameters, a vocabulary of {len(tokenizer):,} pieces")
        task = translation_task(
            model.config, model.generation_config, tokenizer, options.origin, options.source_lang, options.target_lang
        )
        return model, tokenizer, task


def checkpoint_task(options: TranslationOptions, tokenizer: Any) -> Translation:
    """Return the task of the checkpoint in ``options``, without reading its weights."""
    model = options.origin
    config = load_config(model)
    try:
        generation = read_generation_config(model)
    except Exception as error:  # transformers' loaders raise exceptions of many classes
        raise not_loadable(model, error) from error
    check_family(model, config.model_type, Translation.name)
    task = translation_task(config, generation, tokenizer, model, options.source_lang, options.target_lang)
    if options.num_beams is None:
        return task
    return dataclasses.replace(task, generation=dataclasses.replace(task.generation, beam_size=options.num_beams))


def _before(translator: TorchTranslator, pairs: Sequence[Pair], kept: Path, say: Say) -> list[str]:
    """Translate with the original checkpoint; a resumed run reads the translations from ``kept``."""
    if kept.is_file():
        found: list[str] = json.loads(kept.read_text(encoding="utf-8"))
        return found
    say(f"translating {len(pairs):,} held-out rows, to measure the checkpoint before training")
    translations = _translations(translator, pairs)
    with artifacts.new_file(kept) as path:
        path.write_text(json.dumps(translations, ensure_ascii=False), encoding="utf-8")
    return translations


def _translations(translator: TorchTranslator, pairs: Sequence[Pair]) -> list[str]:
    return [answer.text for answer in translator.translate([pair.source for pair in pairs], scored=False)]


def _metrics(translations: Sequence[str], pairs: Sequence[Pair], target: str) -> dict[str, Any]:
    sources, references = [pair.source for pair in pairs], [pair.target for pair in pairs]
    return metrics_with_intervals(translations, references, sources, target)


def _difference(ours: Sequence[str], theirs: Sequence[str], pairs: Sequence[Pair], target: str) -> dict[str, Any]:
    """Compare two translators on the same rows."""
    references = [pair.target for pair in pairs]
    first, second = (measure_of(translations, references, target) for translations in (ours, theirs))
    return differences(first, second, len(pairs))


def _samples(pairs: Sequence[Pair], after: Sequence[str], before: Sequence[str] | None) -> list[dict[str, str]]:
    """Return some evenly spaced held-out rows with their translations."""
    shown = range(0, len(pairs), max(1, len(pairs) // _SAMPLES))[:_SAMPLES]
    return [
        {
            "source": pairs[i].source,
            "reference": pairs[i].target,
            **({} if before is None else {"before": before[i]}),
            "translation": after[i],
        }
        for i in shown
    ]
