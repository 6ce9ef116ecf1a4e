"""Train on batches of pairs that are limited by tokens, and keep the model of the best evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from torch.utils.data import Dataset, Sampler
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from deploykit.tasks.translation.checkpoint import TorchTranslator
from deploykit.tasks.translation.generation_config import generation_config
from deploykit.tasks.translation.metrics import bleu_and_chrf
from deploykit.tasks.translation.options import TranslationOptions
from deploykit.tasks.translation.pairs import Pair
from deploykit.training import processes, trainer
from deploykit.training.losses import Loss, TaughtTrainer, check_dropout, token_divergence
from deploykit.training.padding import padded
from deploykit.training.regularization import optimizers
from deploykit.training.rows import Say

_IGNORED = -100
"""The label that PyTorch's loss ignores."""


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
    train together, each has the ``process``-th batch of a turn; if the last turn has too few batches, a process gets one that changes nothing.
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


class TranslationTrainer(TaughtTrainer, Seq2SeqTrainer):  # type: ignore[misc]
    """A Seq2SeqTrainer whose batches are limited by tokens, so that short texts make larger batches."""

    def __init__(self, *, batches: TokenBatches, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._batches = batches

    def get_train_dataloader(self) -> Any:
        return trainer.own_batches(self, self._batches)


def train_model(
    translator: TorchTranslator,
    train_set: EncodedPairs,
    validation: Sequence[Pair],
    options: TranslationOptions,
    work: Path,
    say: Say,
) -> Any:
    """Train, and return the model of the best evaluation if there were any: highest chrF of greedy search, among equals
    the lowest loss."""
    model, task = translator.model, translator.task
    if options.r_drop:
        check_dropout(model, "add --dropout 0.1")
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
                options=options,
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
                loss=_loss(options),
                compute_metrics=_evaluation(translator, [pair.target for pair in validation]),
                callbacks=trainer.callbacks(options, work / "tensorboard", say),
                optimizers=optimizers(model, options),
            )
        )
    finally:
        model.generation_config = own


def _loss(options: TranslationOptions) -> Loss:
    def loss(outputs: Any, labels: torch.Tensor, items_of_step: Any, passes: int) -> torch.Tensor:
        known = labels.flatten() != _IGNORED
        # Trainer sums the losses of a step's micro-batches: scale each to its share of the step's mean.
        items = items_of_step if items_of_step is not None else known.sum() / passes
        logits = outputs["logits"].flatten(0, 1).float()
        total = functional.cross_entropy(
            logits,
            labels.flatten(),
            ignore_index=_IGNORED,
            label_smoothing=options.label_smoothing_factor,
            reduction="sum",
        )
        if passes == 2:
            total = total / 2 + options.r_drop * token_divergence(logits, known.chunk(2)[0])
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
