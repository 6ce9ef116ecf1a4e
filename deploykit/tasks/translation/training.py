"""Train an encoder-decoder on pairs of texts."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from torch.utils.data import Dataset, Sampler
from transformers import (
    GenerationConfig,
    MarianConfig,
    MarianMTModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from deploykit import artifacts
from deploykit.bootstrap import differences
from deploykit.errors import DataError, UsageError
from deploykit.tasks.translation.checkpoint import TorchTranslator, translation_task
from deploykit.tasks.translation.facts import Translation
from deploykit.tasks.translation.generation_config import generation_config
from deploykit.tasks.translation.metrics import bleu_and_chrf, measure_of, metrics_with_intervals
from deploykit.tasks.translation.options import TranslationOptions
from deploykit.tasks.translation.presets import PRESETS, Preset
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
from deploykit.tasks.translation.vocabulary import train_tokenizer
from deploykit.training import processes, trainer
from deploykit.training.checkpoint import load_config, load_model, load_tokenizer, not_loadable
from deploykit.training.levers import optimizers
from deploykit.training.padding import padded
from deploykit.training.rows import Rows, Say
from deploykit.training.source import check_family
from deploykit.training.student import Side, keep_layers, layer_count
from deploykit.training.trainer import Trained
from deploykit.training.weights import read_generation_config

_POSITIONS = 512
_SAMPLES = 5
_IGNORED = -100
"""The label that PyTorch's loss ignores."""


class TranslationStage:
    """One training run, from checking the options to measuring the model."""

    def __init__(self, options: TranslationOptions) -> None:
        self._options = options
        if options.model is None:
            if options.max_length > _POSITIONS:
                raise UsageError(
                    f"--max-length is {options.max_length}, but {options.origin} takes at most {_POSITIONS} tokens",
                    f"give --max-length {_POSITIONS} or less",
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
        model = _train(translator, train_set, validation, options, work, say)
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
        others = {"before": before, "teacher": answers.get(shown)}
        metrics["differences"] = {
            name: _difference(after[shown], other, rows.splits[shown], task.target)
            for name, other in others.items()
            if other is not None
        }
        metrics["samples"] = _samples(rows.splits[shown], after[shown], before) if shown else []
        return Trained(task, model, tokenizer, metrics)

    def _taught(
        self, rows: Rows[Pair, PairColumns], work: Path, say: Say
    ) -> tuple[list[Pair], dict[str, dict[str, Any]], dict[str, list[str]]]:
        """Return the training pairs as the teacher has them, and its metrics and translations of the held-out rows."""
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
        """Leave out layers of the model that the student is not to have."""
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
                raise UsageError(f"a {task.family} has one dropout", "give --dropout")
            config = {} if options.dropout is None else {"dropout_rate": options.dropout}
        else:
            config = options.dropout_config(load_config(options.origin))
        assert options.model is not None
        model = load_model(options.model, Translation.name, **config)
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


def new_marian(preset: Preset, tokenizer: Any, options: TranslationOptions) -> Any:
    """Create a MarianMT model with random weights, configured like opus-mt's."""
    vocabulary, pad, eos = len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id
    config = MarianConfig(
        vocab_size=vocabulary,
        d_model=preset.d_model,
        encoder_layers=preset.encoder_layers,
        decoder_layers=preset.decoder_layers,
        encoder_attention_heads=preset.heads,
        decoder_attention_heads=preset.heads,
        encoder_ffn_dim=preset.ffn,
        decoder_ffn_dim=preset.ffn,
        max_position_embeddings=_POSITIONS,
        activation_function="swish",
        scale_embedding=True,
        dropout=options.dropout or 0.0,
        attention_dropout=options.attention_dropout or 0.0,
        # With this scale, embeddings (once multiplied) and logits have a variance of 1.
        init_std=preset.d_model**-0.5,
        pad_token_id=pad,
        eos_token_id=eos,
        bos_token_id=eos,
        decoder_start_token_id=pad,
        forced_eos_token_id=eos,
    )
    model = MarianMTModel._from_config(config, attn_implementation="eager")
    for name, weight in model.named_parameters():
        if name.endswith(("proj.weight", "fc1.weight", "fc2.weight")):
            torch.nn.init.xavier_uniform_(weight)
    model.generation_config = GenerationConfig(
        max_length=min(2 * options.max_length, _POSITIONS),
        num_beams=options.num_beams or 1,
        bad_words_ids=[[pad]],
        pad_token_id=pad,
        eos_token_id=eos,
        bos_token_id=eos,
        decoder_start_token_id=pad,
        forced_eos_token_id=eos,
    )
    return model


class EncodedPairs(Dataset):  # type: ignore[misc]
    """A dataset of pairs' token ids, padded per batch by ``collate``.

    Pairs longer than ``max_length`` on a side are left out; without it, all are truncated to the model's limits.
    """

    def __init__(self, translator: TorchTranslator, pairs: Sequence[Pair], *, max_length: int | None = None) -> None:
        self.task = translator.task
        self._source_pad = translator.source_pad
        cut = max_length is None
        sources = translator.encode([pair.source for pair in pairs], cut=cut)
        targets = translator.encode_targets([pair.target for pair in pairs], cut=cut)
        self.rows = [row for row in zip(sources, targets) if max_length is None or max(map(len, row)) <= max_length]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> tuple[list[int], list[int]]:
        """Return a pair; ``~row`` is one whose target is not learned."""
        return self.rows[row] if row >= 0 else (self.rows[~row][0], [_IGNORED])

    def collate(self, rows: Sequence[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
        """Pad a batch. Labels are the target ids; the decoder's inputs are the labels shifted right by the start
        token."""
        pad = self.task.pad_token_id
        input_ids, attention_mask = padded([source for source, _ in rows], self._source_pad)
        labels, _ = padded([target for _, target in rows], _IGNORED)
        decoder_input_ids, _ = padded([[self.task.decoder_start_token_id, *target[:-1]] for _, target in rows], pad)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "decoder_input_ids": decoder_input_ids,
            "labels": labels,
        }


class TokenBatches(Sampler[list[int]]):  # type: ignore[misc]
    """A sampler of batches of rows of similar length, with at most ``most`` padded tokens on their longer side.

    Each epoch shuffles rows of equal length and the order of the batches; the number of batches stays. Of ``processes`` that
    train together, each has a turn's ``process``-th batch; where the last turn has too few, one that changes nothing.
    """

    def __init__(self, lengths: Sequence[int], most: int, seed: int, *, process: int = 0, processes: int = 1) -> None:
        self._lengths = np.asarray(lengths)
        self._most = most
        self._seed = seed
        self._epoch = 0
        self._bounds = list(self._cut(np.sort(self._lengths)))
        self._process, self._processes = process, processes

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return -(-len(self._bounds) // self._processes)

    def __iter__(self) -> Iterator[list[int]]:
        random_numbers = np.random.default_rng((self._seed, self._epoch))
        drawn = random_numbers.permutation(len(self._lengths))
        rows = drawn[np.argsort(self._lengths[drawn], kind="stable")]
        own = random_numbers.permutation(len(self._bounds))[self._process :: self._processes]
        for i in own:
            yield rows[slice(*self._bounds[i])].tolist()
        if len(own) < len(self):
            yield [~int(rows[0])]

    def _cut(self, lengths: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
        start = 0
        for i, length in enumerate(lengths.tolist()):
            if (i + 1 - start) * length > self._most and i > start:
                yield start, i
                start = i
        yield start, len(lengths)


class TranslationTrainer(Seq2SeqTrainer):  # type: ignore[misc]
    """A Seq2SeqTrainer whose batches are limited by tokens, so that short texts make larger batches."""

    def __init__(self, *, batches: TokenBatches, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._batches = batches

    def get_train_dataloader(self) -> Any:
        return trainer.own_batches(self, self._batches)


def _train(
    translator: TorchTranslator,
    train_set: EncodedPairs,
    validation: Sequence[Pair],
    options: TranslationOptions,
    work: Path,
    say: Say,
) -> Any:
    """The model as it was at its best evaluation, if there are any: highest chrF of greedy search, among equals the lowest
    loss."""
    model, task = translator.model, translator.task
    validation = sorted(validation, key=lambda pair: len(pair.source))  # evaluated in this order, so padded little
    validation_set = EncodedPairs(translator, validation) if validation else None
    batches = TokenBatches(
        [max(map(len, row)) for row in train_set.rows], options.batch_tokens, options.seed,
        process=processes.number(), processes=processes.count(),
    )  # fmt: skip
    longest = max(len(target) for _, target in validation_set.rows) if validation_set else 0
    own = model.generation_config
    # An untrained model generates no end token: limit the length to what is worth measuring.
    greedy = dataclasses.replace(task.generation, beam_size=1, max_length=min(2 * longest + 8, task.max_target_length))
    model.generation_config = generation_config(task, greedy)
    try:
        return trainer.run(
            TranslationTrainer(
                model=model,
                args=trainer.arguments(
                    options,
                    len(batches) * processes.count(),
                    work / "trainer",
                    Seq2SeqTrainingArguments,
                    predict_with_generate=True,
                    include_for_metrics=["loss"],
                ),
                batches=batches,
                train_dataset=train_set,
                eval_dataset=validation_set,
                data_collator=train_set.collate,
                compute_loss_func=_loss(options.label_smoothing_factor),
                compute_metrics=_evaluation(translator, [pair.target for pair in validation]),
                callbacks=trainer.callbacks(options, work / "tensorboard", say),
                optimizers=optimizers(model, options),
            )
        )
    finally:
        model.generation_config = own


def _loss(smoothing: float) -> Callable[..., torch.Tensor]:
    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        # Trainer sums the losses of a step's micro-batches: scale each to its share of the step's mean.
        items = num_items_in_batch if num_items_in_batch is not None else (labels != _IGNORED).sum()
        logits = outputs["logits"].flatten(0, 1).float()
        total = functional.cross_entropy(
            logits, labels.flatten(), ignore_index=_IGNORED, label_smoothing=smoothing, reduction="sum"
        )
        return total / items

    return loss


def _evaluation(translator: TorchTranslator, references: Sequence[str]) -> Callable[[Any], dict[str, float]]:
    def evaluate(prediction: Any) -> dict[str, float]:
        generated = np.where(prediction.predictions == _IGNORED, translator.task.pad_token_id, prediction.predictions)
        scores = bleu_and_chrf(translator.decode(generated.tolist()), references, translator.task.target)
        loss = float(np.mean(prediction.losses))
        # Small validation sets tie often, and Trainer would keep the first of equals: prefer the lower loss.
        return {**scores, "selection": round(scores["chrf"], 2) - 1e-4 * loss}

    return evaluate


def _before(translator: TorchTranslator, pairs: Sequence[Pair], kept: Path, say: Say) -> list[str]:
    """Translate with the original checkpoint; a resumed run reads the translations from ``kept``."""
    if kept.is_file():
        found: list[str] = json.loads(kept.read_text(encoding="utf-8"))
        return found
    say(f"translating {len(pairs):,} held-out rows, to measure the checkpoint as it is")
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
